"""Installs `deepseek_jax` and `kernels_pallas`; experiments, notebooks and benchmarks run from a checkout."""

import pathlib
import re

from setuptools import find_packages, setup

HERE = pathlib.Path(__file__).resolve().parent
REPOSITORY = "https://github.com/OWNER/deepseek-jax"  # defined only here: docs/notebooks.md


def absolute_links(page: str) -> str:
    """A page of the repository as others can show it: pictures and links lead there."""
    page = re.sub(r"(!\[[^]]*\])\((?!https?:|#)", rf"\1({REPOSITORY}/raw/main/", page)
    return re.sub(r"(?<!\))(\]\()(?!https?:|#)", rf"\1{REPOSITORY}/blob/main/", page)


setup(
    name="deepseek-jax",
    version=re.search(r'__version__ = "(.*)"', HERE.joinpath("deepseek_jax", "__init__.py").read_text())[1],
    description="DeepSeek-V3 in JAX: model, training and serving as the V3 technical report describes them",
    long_description=absolute_links(HERE.joinpath("README.md").read_text(encoding="utf-8")),
    long_description_content_type="text/markdown",
    author="The deepseek-jax authors",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    url=REPOSITORY,
    project_urls={"Documentation": f"{REPOSITORY}/tree/main/docs", "Source": REPOSITORY,
                  "Changelog": f"{REPOSITORY}/blob/main/CHANGELOG.md", "Issues": f"{REPOSITORY}/issues"},
    platforms=["Linux"],
    keywords="jax flax deepseek mixture-of-experts mla fp8 pallas dualpipe language-model",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Console",
        "Intended Audience :: Developers",
        "Intended Audience :: Education",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    entry_points={"console_scripts": ["deepseek-jax = deepseek_jax.__main__:main"]},
    packages=find_packages(include=["deepseek_jax", "deepseek_jax.*", "kernels_pallas", "kernels_pallas.*"]),
    package_data={"deepseek_jax": ["py.typed"], "deepseek_jax.serving.openai": ["chat.html"],
                  "deepseek_jax.chat": ["*.jinja"], "kernels_pallas": ["py.typed"]},
    python_requires=">=3.11,<3.14",
    install_requires=[
        "jax>=0.7.2,<0.13",  # the kernels need 0.11.2: kernels_pallas/api.py
        "numpy>=2.0",
        "flax>=0.11.2",
        "optax>=0.2.7",
        "orbax-checkpoint>=0.11.30",
        "etils>=1.9",
        "chex>=0.1.90",
        "ml-collections>=1.0",
        "tensorstore>=0.1.85",
        "grain>=0.2.12",
        "tokenizers>=0.20",
        "safetensors>=0.5",
        "tqdm>=4.60",
        "filelock>=3.12",  # for jax's bounded compilation cache
        "matplotlib>=3.9",
        "tensorboardX>=2.6.2.2",
        "crc32c>=2.4",  # without it tensorboardX sums in Python: 0.4 ms for each row
    ],
    extras_require={
        # jax for an accelerator, with all of its libraries; without one of these it runs on CPUs.
        "cuda12": ["jax[cuda12]"],
        "cuda13": ["jax[cuda13]"],
        "tpu": ["jax[tpu]"],
        # Reading compressed and columnar text.
        "data": ["zstandard>=0.22", "pyarrow>=16", "array_record>=0.5"],
        # Work directories, corpora and checkpoints in buckets: gs:// and s3://.
        "gcs": ["gcsfs>=2024.12"],
        "s3": ["s3fs>=2025.5"],
        "dev": [
            "pytest>=8",
            "pytest-xdist>=3.5",
            "hypothesis>=6.100",
            "ruff>=0.9",
            "pyright[nodejs]>=1.1.400",
            "build>=1.2",
            "setuptools>=77",
            "zstandard>=0.22",
            "pyarrow>=16",
            "starlette>=0.40",
            "uvicorn>=0.30",
            "httpx>=0.27",
            "jinja2>=3.1",
            "prometheus-client>=0.20",
            "pyyaml>=6",  # mkdocs.yml and CITATION.cff, which tests read
            "jsonschema>=4.20",
            "gcsfs>=2024.12",
            "s3fs>=2025.5",
            "gcp-storage-emulator>=2024.8",
            "moto[server]>=5",  # an emulator of S3
            "openai>=1.40",  # the client whose protocol the server speaks
            "wandb>=0.31",
            "mlflow-skinny>=3",
            "sqlalchemy>=2",
            "alembic>=1.10",
            "xprof>=2.20; python_version >= '3.12'",  # reads traces
        ],
        # Compiling for absent GPUs: the plugin and CUDA's own tools, without the libraries that a run needs.
        "aot": ["jax-cuda13-plugin>=0.11.2,<0.13", "nvidia-cuda-nvcc>=13", "nvidia-cuda-nvdisasm>=13"],
        "serve": ["starlette>=0.40", "uvicorn>=0.30", "jinja2>=3.1", "prometheus-client>=0.20"],
        # Trackers in addition to metrics.jsonl and TensorBoard (train.tracker); MLflow stores runs in a local file.
        "wandb": ["wandb>=0.31"],
        "mlflow": ["mlflow-skinny>=3", "sqlalchemy>=2", "alembic>=1.10"],
        "rl": ["reasoning-gym>=0.1"],  # more tasks for reinforcement learning
        "eval": ["lm-eval[api]>=0.4.10"],
        "docs": ["mkdocs>=1.6,<2", "mkdocs-material>=9.6,<10", "mkdocstrings[python]>=1.0", "ruff>=0.9"],  # the site
        "notebooks": ["nbclient>=0.10", "nbformat>=5.10", "ipykernel>=6.29", "ipywidgets>=8.1"],
    },
)
