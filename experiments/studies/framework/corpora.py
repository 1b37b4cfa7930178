"""Where a study's text comes from: what every Python has, written into a folder that its sources name (no jax)."""

import dataclasses
import pathlib
import random
import re
import shutil
import sysconfig

from deepseek_jax.config import Config
from deepseek_jax.data.prepare import prepare
from experiments.studies.framework.study import Study


def write(study: Study, quick_run: bool, folder: pathlib.Path):
    """Writes the texts of the sources named "corpus/...", and makes tokens of what all arms read, once."""
    if quick_run:
        quick(folder / "corpus")
    if study.corpus:
        globals()[study.corpus](folder / "corpus")
    for arm in study.selected(quick_run)[0]:
        prepare_data(study, arm, quick_run, folder)


def _stdlib() -> pathlib.Path:
    return pathlib.Path(sysconfig.get_path("stdlib"))


def quick(folder: pathlib.Path):
    """Two packages of the standard library, for --quick."""
    for package in ("json", "email"):
        for path in sorted((_stdlib() / package).glob("*.py")):
            target = folder / "quick" / package / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)


def kinds(folder: pathlib.Path):
    """Three kinds of text in about equal shares: code; prose, the manual that help() prints; tables of characters."""
    for kind in ("code", "prose", "tables"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    for path in sorted(_stdlib().glob("*.py")):
        shutil.copy(path, folder / "code" / path.name)
    for path in sorted((_stdlib() / "encodings").glob("*.py")):
        shutil.copy(path, folder / "tables" / path.name)
    # A dict of topics, with string literals as values: run here, it is data of Python itself.
    topics = {}
    exec((_stdlib() / "pydoc_data" / "topics.py").read_text(), topics)
    for name, text in sorted(topics["topics"].items()):
        (folder / "prose" / f"{re.sub('[^a-zA-Z0-9]', '_', name)}.txt").write_text(text)


FILLING = [
    "the", "river", "runs", "past", "stone", "towers", "and", "green", "gardens", "while", "clouds", "drift",
    "over", "quiet", "hills", "near", "old", "bridges"]
SECRETS = [
    "copper", "silver", "golden", "purple", "yellow", "orange", "violet", "crimson", "ivory", "amber", "cobalt",
    "indigo", "scarlet", "olive", "maroon", "teal", "lemon", "peach", "coral", "khaki", "azure", "magenta",
    "bronze", "plum"]


def needles(folder: pathlib.Path):
    """Code, and as many documents of words that mean nothing, in each of which one secret is told again and again.

    In half of those it is told every 8 words, which is where looking it up is learned; in the others every 8 to 1,000,
    so that what is far away is needed too.
    """
    for name in ("code", "words"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for path in sorted(_stdlib().glob("*.py")):
        shutil.copy(path, folder / "code" / path.name)
    rng = random.Random(0)
    for n in range(500):
        secret, apart = rng.choice(SECRETS), 8 if n % 2 else 8 * 125 ** rng.random()
        words = [f"= {secret}" if rng.random() < 1 / apart else rng.choice(FILLING) for _ in range(2600)]
        (folder / "words" / f"{n:03d}.txt").write_text(" ".join(words) + "\n")


def located(config: Config, workdir: pathlib.Path) -> Config:
    """The config with its "corpus/..." sources and its caches inside the study's work directory."""
    sources = tuple((str(workdir / path) if path.startswith("corpus/") else path, weight)
                    for path, weight in config.data.sources)
    data = dataclasses.replace(config.data, sources=sources, cache_dir=str(workdir.parent / "cache"))
    return dataclasses.replace(config, data=data)


def prepare_data(study: Study, arm: str, quick: bool, workdir: pathlib.Path):
    """Tokens and their tokenizer: (Prepared, digests of the corpora)."""
    config = located(study.config(arm, 0, quick), workdir)
    # A directory for each vocabulary: it holds the tokenizer.
    made = prepare(config, str(workdir / f"tokens-{config.model.vocab_size}"))
    return made, [source["digest"] for source in made.report]
