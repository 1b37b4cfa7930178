"""The site: each page is in the menu, links that leave docs/ lead somewhere, and a build complains of nothing."""

import importlib.util
import pathlib
import re
import subprocess
import sys

import pytest
import yaml

from docs import site_hooks

ROOT = pathlib.Path(__file__).resolve().parents[2]


def menu():
    """Every page that mkdocs.yml lists, in order."""
    def leaves(item):
        if isinstance(item, str):
            yield item
        else:
            for part in item.values() if isinstance(item, dict) else item:
                yield from leaves(part)

    return list(leaves(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))


def test_the_menu_has_each_page_once():
    written = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert sorted(menu()) == sorted(written | set(site_hooks.OF_THE_ROOT) | {"explore/index.html"})


def test_pages_of_the_root_are_there():
    assert all((ROOT / source).is_file() for source in site_hooks.OF_THE_ROOT.values())


@pytest.mark.parametrize(("page", "target", "link"), [
    ("fp8.md", "../deepseek_jax/fp8/__init__.py", "{}/blob/main/deepseek_jax/fp8/__init__.py"),
    ("training.md", "../deepseek_jax/configs", "{}/tree/main/deepseek_jax/configs"),
    ("claims.md", "../experiments/studies/mla/mla.png", "pictures/experiments/studies/mla/mla.png"),
    ("training.md", "../LOG.md", "log.md"), ("training.md", "loss.png", "loss.png"),
    ("api/fp8.md", "../fp8.md", "../fp8.md"), ("log.md", "docs/chat.png", "chat.png"),
    ("log.md", "README.md", "{}/blob/main/README.md"), ("index.md", "explore/index.html", "explore/index.html"),
    ("faq.md", "https://example.org/x.png", "https://example.org/x.png"),
    ("faq.md", "../no/such/file.py", "../no/such/file.py"), ("faq.md", "../../outside.md", "../../outside.md")])
def test_links_lead_to_pages_pictures_or_the_repository(page, target, link):
    assert site_hooks.site_link(page, target) == link.format(site_hooks.REPOSITORY)


def test_anchors_stay_with_their_links():
    text = site_hooks.LINK.sub(lambda found: f"{found[1]}X{found[3] or ''})", "[a](b.md#c) and ![d](e.png), (f)")
    assert text == "[a](X#c) and ![d](X), (f)"


@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None or importlib.util.find_spec("mkdocstrings") is None,
                    reason="needs the extra `docs`")
def test_the_site_builds_without_a_complaint(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    built = (tmp_path / "site" / "claims.html").read_text()
    assert 'src="pictures/experiments/studies/load_balance/load_balance.png"' in built
    assert (tmp_path / "site" / "pictures/experiments/studies/load_balance/load_balance.png").is_file()
    assert "deepseek_jax.model.router.route" in (tmp_path / "site" / "api" / "model.html").read_text()


def test_every_version_of_python_that_is_promised_is_tested():
    promised = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', (ROOT / "setup.py").read_text())
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
    assert jobs["test"]["strategy"]["matrix"]["python"] == promised
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M)
    runs = [step.get("run", "") for job in jobs.values() for step in job["steps"]]
    said = [word for run in runs for word in re.findall(r"^make (\w+)", run)]
    assert said == ["lint", "test", "readme", "docs", "kernels"] and set(said) <= set(targets)
    oldest = re.search(r"jax-cuda13-plugin>=([\d.]+)", (ROOT / "setup.py").read_text())
    assert oldest and jobs["kernels"]["strategy"]["matrix"]["include"][0]["jax"] == oldest[1]


def test_hooks_run_what_is_there():
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    for hook in repository["hooks"]:
        assert hook["language"] == "system"
        assert all((ROOT / path).exists() for path in re.findall(r"(?:tests|docs)/[\w./]*\w", hook["entry"]))
