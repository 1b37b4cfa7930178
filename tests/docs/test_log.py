"""LOG.md: its index names every entry, in order, by question, answer and command, and leads to it."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
ROW = re.compile(r"^\| (\d{4}-\d\d-\d\d) \| (.+?) \| \[(.+?)\]\(#(.+?)\) \| (.+?) \|$", re.M)


def anchor(heading):
    """What GitHub and the site make of a heading, for the signs that `test_...` below allows in one."""
    return re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", heading).lower())


def entries(text):
    return re.findall(r"^## (\S+): (.+)$", text, re.M)


def differences(text):
    """What the index lacks or has too much, one line each."""
    wrong = []
    rows, heads = ROW.findall(text), entries(text)
    if len(rows) != len(heads):
        wrong.append(f"{len(rows)} rows for {len(heads)} entries")
    for (date, question, answer, target, command), (day, heading) in zip(rows, heads):
        if date != day or answer[0].lower() + answer[1:] != heading[0].lower() + heading[1:]:
            wrong.append(f"row {date} {answer!r} where the entry is {day} {heading!r}")
        if target != anchor(f"{day}: {heading}"):
            wrong.append(f"{answer!r} leads to #{target}")
        if not question.endswith("?"):
            wrong.append(f"no question: {question!r}")
        if not re.fullmatch(r"`.+`|none was kept", command):
            wrong.append(f"no command: {command!r}")
    return wrong


def test_the_index_is_that_of_the_entries():
    text = (ROOT / "LOG.md").read_text()
    assert len(entries(text)) > 30 and not differences(text)


def test_headings_have_signs_that_every_site_makes_the_same_anchor_of():
    odd = [heading for _, heading in entries((ROOT / "LOG.md").read_text()) if re.search(r"[^\w ,.;:'()-]|  ", heading)]
    assert not odd


@pytest.mark.parametrize(("old", "new"), [
    ("## 2026-11-22: b", "## 2026-11-22: b\n\n## 2026-11-21: c"), ("[B]", "[C]"), ("(#2026-11-22-b)", "(#b)"),
    ("Why?", "Why"), ("`make`", "make"), ("| 2026-11-22", "| 2026-11-23")])
def test_an_index_that_is_not_is_seen(old, new):
    text = "| 2026-11-22 | Why? | [B](#2026-11-22-b) | `make` |\n\n## 2026-11-22: b\n\n- text\n"
    assert not differences(text) and differences(text.replace(old, new))
