"""A hook of MkDocs: pages of the site that stand at the repository's root, so that no text is there twice."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}


def on_files(files: Files, config: Any) -> Files:
    """Add them, with their links as the site has them."""
    for name, page in PAGES.items():
        text = re.sub(r"\[([^]]+)\]\(([^)]+)\)", _as_here, (ROOT / name).read_text(encoding="utf-8"))
        files.append(File.generated(config, page, content=text))
    return files


def _as_here(link: re.Match[str]) -> str:
    """A link to a page of the site; what the site lacks is named, as a path of the repository."""
    text, target = link.groups()
    if target.startswith(("http", "#")):
        return link[0]
    if target in PAGES or target.startswith("docs/"):
        return f"[{text}]({PAGES.get(target, target.removeprefix('docs/'))})"
    return f"`{target}`"
