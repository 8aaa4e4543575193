"""What the site needs beyond its pages: files from elsewhere in the repository, a reference of all public names."""

from __future__ import annotations

import ast
import os
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
DOCS = Path("docs")
ELSEWHERE = {  # pages that do not lie in docs/ -> their place in the site; images that they show come along
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "data/README.md": "make_dataset.md",
    "localctl/micro/MODEL_CARD.md": "micro.md",
    "research/README.md": "research.md",
    "README.md": "index.md",  # the site has a first page of its own
}
AREAS = {  # heading -> modules of localctl whose public names stand there; what is left stands under the last one
    "Scenes": ["layout", "drawing", "images", "bridges.layouts"],
    "Bases and adapters": ["pipelines", "bases", "adapter", "bridges.adapters"],
    "Generate": ["sampling", "weight_search"],
    "Controls": ["control", "denoisers"],
    "Train and evaluate": ["api", "training", "evaluation", "metrics", "data", "settings", "masks"],
    "More": [""],
}
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s#]*)(#[^)\s]*)?\)")
_ROLE = re.compile(r":(?:func|class|meth|mod|attr|data|exc):(?=<code>)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of ``ELSEWHERE`` and ``api.md``."""
    for name, uri in ELSEWHERE.items():
        if files.get_file_from_path(uri) is not None:
            continue
        source = ROOT / name
        files.append(File.generated(config, uri, content=source.read_text()))
        for image, _, target, _ in _LINK.findall(source.read_text()):
            if image and (source.parent / target).is_file():
                files.append(File.generated(config, _below(target), abs_src_path=str(source.parent / target)))
    files.append(File.generated(config, "api.md", content=_reference()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead each link to where its file is in the site. Links to files of the repository that are no part of the site
    become plain text; to files that exist nowhere they stay, for mkdocs to complain."""
    source = {uri: name for name, uri in ELSEWHERE.items() if name != "README.md"}.get(page.file.src_uri)
    folder = Path(source).parent if source else DOCS / Path(page.file.src_uri).parent

    def lead(match: re.Match[str]) -> str:
        image, text, target, anchor = match.groups(default="")
        if not target or "://" in target or target.startswith("mailto:"):
            return match[0]
        place = Path(os.path.normpath(folder / target))
        if place.is_relative_to(DOCS):
            uri = place.relative_to(DOCS).as_posix()
        else:  # the images of a page from elsewhere are added to the site
            uri = ELSEWHERE.get(place.as_posix(), _below(target) if source else "")
        if files.get_file_from_path(uri) is not None:
            return f"{image}[{text}]({os.path.relpath(uri, Path(page.file.src_uri).parent)}{anchor})"
        return text if (ROOT / place).exists() else match[0]

    return _LINK.sub(lead, markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Take away Sphinx' roles, which docstrings use for names."""
    return _ROLE.sub("", html)


def _below(target: str) -> str:
    """Return a place in the site for a path that may leave its folder; mkdocs excludes names that begin with a dot."""
    return target.replace("../", "")


def _reference() -> str:
    """Return a heading for each area, and under it the names that ``localctl`` shows to editors and type checkers."""
    names = _public_names()
    text = ["# API\n", "Every public name: `import localctl`, then `localctl.NAME`; imported when it is used first.\n"]
    for area, modules in AREAS.items():
        found = [name for name, module in names.items() if any(module.startswith(part) for part in modules)]
        if found:
            text.append(f"## {area}\n")
            text += [f"::: localctl.{names.pop(name)}.{name}\n    options: {{heading_level: 3}}\n" for name in found]
    return "\n".join(text)


def _public_names() -> dict[str, str]:
    """Name -> module below ``localctl``."""
    tree = ast.parse((ROOT / "localctl/__init__.pyi").read_text())
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.module]
    return {alias.name: str(node.module) for node in imports for alias in node.names}
