"""The text of studies: files of every Python installation, copied into a folder for a config's sources (no jax).

Each function writes into `folder`, which sources name "corpus/..." (framework/training.py).
"""

import pathlib
import random
import re
import shutil
import sysconfig

from deepseek_jax import io


def _stdlib() -> pathlib.Path:
    return pathlib.Path(sysconfig.get_path("stdlib"))


def quick(folder: pathlib.Path) -> None:
    """Two packages of the standard library, for --quick."""
    for package in ("json", "email"):
        for path in sorted((_stdlib() / package).glob("*.py")):
            target = folder / "quick" / package / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)


def kinds(folder: pathlib.Path) -> None:
    """Three kinds of text in about equal shares: code; prose, the manual that help() prints; tables of characters."""
    for kind in ("code", "prose", "tables"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    for path in sorted(_stdlib().glob("*.py")):
        shutil.copy(path, folder / "code" / path.name)
    for path in sorted((_stdlib() / "encodings").glob("*.py")):
        shutil.copy(path, folder / "tables" / path.name)
    # A module that assigns a dict of strings: data included in Python.
    topics: dict = {}
    exec((_stdlib() / "pydoc_data" / "topics.py").read_text(), topics)
    for name, text in sorted(topics["topics"].items()):
        io.write_text(folder / "prose" / f"{re.sub('[^a-zA-Z0-9]', '_', name)}.txt", text)


FILLING = [
    "the", "river", "runs", "past", "stone", "towers", "and", "green", "gardens", "while", "clouds", "drift",
    "over", "quiet", "hills", "near", "old", "bridges"]
SECRETS = [
    "copper", "silver", "golden", "purple", "yellow", "orange", "violet", "crimson", "ivory", "amber", "cobalt",
    "indigo", "scarlet", "olive", "maroon", "teal", "lemon", "peach", "coral", "khaki", "azure", "magenta",
    "bronze", "plum"]


def needles(folder: pathlib.Path) -> None:
    """Code, and documents of meaningless words that repeat one secret, in equal shares.

    In half of the documents the secret comes every 8 words, from which a model learns to look it up; in the others
    every 8 to 1,000 words, which requires looking far back.
    """
    for name in ("code", "words"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for path in sorted(_stdlib().glob("*.py")):
        shutil.copy(path, folder / "code" / path.name)
    rng = random.Random(0)
    for n in range(500):
        secret, apart = rng.choice(SECRETS), 8 if n % 2 else 8 * 125 ** rng.random()
        words = [f"= {secret}" if rng.random() < 1 / apart else rng.choice(FILLING) for _ in range(2600)]
        io.write_text(folder / "words" / f"{n:03d}.txt", " ".join(words) + "\n")

