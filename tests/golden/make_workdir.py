"""Makes tests/golden/workdir_v0.1: a small work directory of version 0.1.0, interrupted after two of four steps.

    cd CHECKOUT_OF_VERSION_0.1.0; python .../tests/golden/make_workdir.py DESTINATION

`run/` has the files of the run at step 2 (without its caches), `corpus/` and `config.py` are its inputs.
`expected.json` has the results of version 0.1.0 from that state: its score, a greedy continuation, and the metrics of
the complete run.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys

CONFIG = '''"""Started in this folder as `python -m deepseek_jax.train --config config.py --workdir run`."""

from deepseek_jax.config import default_config


def get_config():
    config = default_config("tiny")
    config.model.update(dict(
        vocab_size=264, d_model=8, num_layers=2, num_heads=2, q_rank=4, kv_rank=4, nope_head_dim=4, rope_head_dim=4,
        v_head_dim=4, dense_ffn_dim=8, expert_ffn_dim=4, num_experts=4, experts_per_token=2, num_groups=2,
        groups_kept=1, dtype="float32", attention_block=16))
    config.data.sources = (("corpus", 1.0),)
    config.data.validation_fraction = 0.3
    config.train.update(dict(steps=4, batch_size=4, micro_batches=2, sequence_length=16, eval_every=2, eval_batches=1,
                             checkpoint_every=2, loss_chunk=32, sample_tokens=0))
    config.optimizer.update(dict(learning_rate=1e-2, warmup=0.1, moment_dtype="bfloat16"))
    return config
'''
PROMPT = "def value"


def command(name: str, *arguments: str) -> str:
    """Stdout of `python -m deepseek_jax.NAME` of the package in the current folder's checkout."""
    return subprocess.run([sys.executable, "-m", f"deepseek_jax.{name}", *arguments], check=True, text=True,
                          stdout=subprocess.PIPE).stdout


def main():
    folder = pathlib.Path(sys.argv[1]).absolute()
    # Uses the package of the checkout, not an installed one, in the folder to which config.json's paths are relative.
    os.environ |= {"PYTHONPATH": os.getcwd(), "JAX_PLATFORMS": "cpu"}
    (folder / "corpus").mkdir(parents=True)
    os.chdir(folder)
    for i in range(6):
        lines = [f"def value_{i}_{j}(x):\n    return x * {i + j} + {j}\n" for j in range(6)]
        pathlib.Path("corpus", f"{i}.py").write_text("\n".join(lines))
    pathlib.Path("config.py").write_text(CONFIG)
    command("train", "--config", "config.py", "--workdir", "run")
    rows = [json.loads(line) for line in pathlib.Path("run/metrics.jsonl").read_text().splitlines()]
    for path in ("checkpoints/4", "tensorboard", "cache", "loss.png", "expert_load.png"):
        shutil.rmtree(path) if (path := pathlib.Path("run", path)).is_dir() else path.unlink(missing_ok=True)
    command("evaluate", "--workdir", "run", "--json", "score.json")
    expected = {"score": json.loads(pathlib.Path("score.json").read_text()), "prompt": PROMPT,
                "text": command("generate", "--workdir", "run", "--prompt", PROMPT, "--max-new-tokens", "12"),
                "rows": rows}
    pathlib.Path("score.json").unlink()
    shutil.rmtree("run/cache", ignore_errors=True)
    pathlib.Path("expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    main()
