"""Hooks for mkdocs: pages are in docs/, and their links point all over the repository.

Pages link to code, notebooks and pictures by relative paths, so that they work on GitHub. On the site, pictures are
copied, and all other links lead to the repository whose address is in setup.py. A path that does not exist is left
unchanged: `mkdocs build --strict` then fails on it. LOG.md, CHANGELOG.md and CONTRIBUTING.md become pages too.
"""

from __future__ import annotations

import os
import pathlib
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig  # pyright: ignore[reportMissingImports]: of the extra `docs`
    from mkdocs.structure.files import Files  # pyright: ignore[reportMissingImports]
    from mkdocs.structure.pages import Page  # pyright: ignore[reportMissingImports]

ROOT = pathlib.Path(__file__).resolve().parents[1]
REPOSITORY = re.search(r'^REPOSITORY = "(.*?)"', (ROOT / "setup.py").read_text(encoding="utf-8"), re.M)[1]  # pyright: ignore
OF_THE_ROOT = {"log.md": "LOG.md", "changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md"}
PICTURES = (".png", ".svg")
LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?\)")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Says where the repository is."""
    config.repo_url, config.repo_name = REPOSITORY, REPOSITORY.removeprefix("https://github.com/")
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages of the repository's root, and pictures that pages show from elsewhere."""
    from mkdocs.structure.files import File  # pyright: ignore[reportMissingImports]

    for name, source in OF_THE_ROOT.items():
        files.append(File.generated(config, name, content=(ROOT / source).read_text(encoding="utf-8")))
    for file in list(files.documentation_pages()):
        folder = source_folder(file.src_uri)
        for _, target, _ in LINK.findall(file.content_string):
            path = inside(folder / target)
            if path and path.suffix in PICTURES and not path.is_relative_to(ROOT / "docs"):
                uri = picture_uri(path)
                if not files.get_file_from_path(uri):
                    files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns the links that leave docs/ into links of the site or of the repository."""
    uri = page.file.src_uri
    return LINK.sub(lambda found: f"{found[1]}{site_link(uri, found[2])}{found[3] or ''})", markdown)


def source_folder(uri: str) -> pathlib.Path:
    """The folder that the links of a page start from."""
    return ROOT if uri in OF_THE_ROOT else (ROOT / "docs" / uri).parent


def inside(path: pathlib.Path) -> pathlib.Path | None:
    """The path without `..`, if it is one of this repository."""
    path = pathlib.Path(os.path.normpath(path))
    return path if path.is_relative_to(ROOT) and path.exists() else None


def picture_uri(path: pathlib.Path) -> str:
    """The site's path of a picture from outside of docs/."""
    return f"pictures/{path.relative_to(ROOT).as_posix()}"


def site_link(uri: str, target: str) -> str:
    """The link of a page as it is on the site; unchanged if mkdocs resolves it itself."""
    path = None if "://" in target else inside(source_folder(uri) / target)
    if path is None:
        return target
    here = pathlib.PurePosixPath(uri).parent.as_posix()
    pages = {source: name for name, source in OF_THE_ROOT.items()}
    relative = path.relative_to(ROOT).as_posix()
    if relative in pages:
        return os.path.relpath(pages[relative], here)
    if path.is_relative_to(ROOT / "docs") and path.is_file():
        return os.path.relpath(path.relative_to(ROOT / "docs").as_posix(), here)
    if path.suffix in PICTURES:
        return os.path.relpath(picture_uri(path), here)
    return f"{REPOSITORY}/{'tree' if path.is_dir() else 'blob'}/main/{relative}"
