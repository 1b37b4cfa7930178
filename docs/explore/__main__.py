"""Writes the numbers of the library into the page.

    python -m docs.explore                                 # into index.html, between its two marks
    python -m docs.explore --drafts run                    # writes drafts.json first, with the run in `run`
    python -m docs.explore --check                         # exit code 1 if the page has other numbers
"""

from __future__ import annotations

import argparse
import json
import re

from deepseek_jax import cli, io
from deepseek_jax.config import ConfigError
from docs.explore import numbers

PAGE = numbers.FOLDER / "index.html"
BEGIN, END = '<script type="application/json" id="numbers">', "</script><!-- numbers: end -->"
BETWEEN = re.compile(f"{re.escape(BEGIN)}(.*?){re.escape(END)}", re.DOTALL)


def inlined(page: str) -> dict:
    """The numbers that a page has.

    Raises:
      ConfigError: it does not have both marks.
    """
    found = BETWEEN.search(page)
    if not found:
        raise ConfigError(f"index.html has no numbers: the marks {BEGIN} and {END} are not there.")
    return json.loads(found[1])


def with_numbers(page: str, found: dict) -> str:
    """The page with other numbers; each part is one line, so that a diff shows which part changed."""
    inlined(page)
    lines = ",\n".join(f"{json.dumps(part)}: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}"
                       for part, value in json.loads(json.dumps(found)).items())
    safe = lines.replace("</", "<\\/")  # a token may spell the end of a script
    return BETWEEN.sub(lambda _: f"{BEGIN}\n{{{safe}}}\n{END}", page)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m docs.explore", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--drafts", metavar="RUN", help="also decode with the run in this folder, and keep its drafts")
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    return parser.parse_args()


def main() -> int:
    args = parse()
    if args.drafts:
        from docs.explore import drafts

        io.write_json(numbers.FOLDER / "drafts.json", drafts.drafted(args.drafts))
    page, found = PAGE.read_text(encoding="utf-8"), json.loads(json.dumps(numbers.collect()))
    if args.check:
        same = inlined(page) == found
        print("The page has the library's numbers." if same else "The page has other numbers: python -m docs.explore")
        return 0 if same else 1
    io.write_text(PAGE, with_numbers(page, found))
    print(f"Wrote {PAGE.relative_to(numbers.FOLDER.parents[1])}.")
    return 0


if __name__ == "__main__":
    cli.run(main)
