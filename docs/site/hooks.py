"""What mkdocs does beyond its settings: pages from outside docs/, and links that mean a folder.

Pages are written for a reader on the forge, where a link may lead to a folder or out of `docs/`. Here such a link is
turned into one to a page of the site; a link that leads nowhere stays as it is, and the build fails on it.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent.parent
OUTSIDE = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md", "SECURITY.md": "security.md"}
OUTSIDE_LINKS = OUTSIDE | {"README.md": "index.md"}
FETCHED = re.compile(r"""<(?:script|img|iframe|link|source)\b[^>]*\b(?:src|href)=["']?((?:https?:)?//[^"'> ]+)""")
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)#\s]+)(#[^)\s]*)?(?=\))")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the documents beside `docs/`, and a page for each folder of results."""
    for name, page in OUTSIDE.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text(encoding="utf-8")))
    for folder in sorted((ROOT / "docs" / "results").glob("*/")):
        if not (folder / "README.md").exists():
            files.append(File.generated(config, f"results/{folder.name}/README.md", content=listing(folder)))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The page with its links as the site needs them."""
    uri = page.file.src_uri
    origin = next((name for name, own in OUTSIDE.items() if own == uri), f"docs/{uri}")
    return LINK.sub(lambda link: target(link.group(1), origin, uri, files) + (link.group(2) or ""), markdown)


def on_post_page(output: str, *, page: Page, config: MkDocsConfig) -> str:
    """Refuse a page that would fetch something from elsewhere.

    Raises:
        PluginError: names the page and the first such address.
    """
    if found := FETCHED.search(output):
        raise PluginError(f"{page.file.src_uri} fetches {found.group(1)}; the site must work without a network")
    return output


def target(link: str, origin: str, uri: str, files: Files) -> str:
    """A link of the page `uri`, which the forge shows as `origin`, as it is written on the site."""
    place = posixpath.normpath(posixpath.join(posixpath.dirname(origin), link))
    found = OUTSIDE_LINKS.get(place) or place.removeprefix("docs/")
    if files.get_file_from_path(f"{found}/README.md"):
        found = f"{found}/README.md"
    if found == place or not files.get_file_from_path(found):
        return link
    return posixpath.relpath(found, posixpath.dirname(uri) or ".")


def listing(folder: Path) -> str:
    """A page for a folder: its files, and the experiment where there is one."""
    names = sorted(path.name for path in folder.iterdir())
    lines = [f"# {folder.name}", "", *(f"- [{name}]({name})" for name in names)]
    asked = folder / "experiment.yaml"
    shown = ["", "```yaml", asked.read_text(encoding="utf-8").rstrip(), "```"] if asked.exists() else []
    return "\n".join([*lines, *shown, ""])
