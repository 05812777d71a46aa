"""Every link within the project leads somewhere: ``make links``, or ``python tools/links.py docs/_build``. No network.

Two kinds of documents are read. In Markdown (the root's and ``docs/``), as a repository's site shows it: the file of a
relative link is there, and its anchor is that of a heading. In the built documentation, as a browser shows it: every
``href`` and ``src`` has its file and its ``id``. Links to other sites are not followed.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parent.parent
CODE = re.compile(r"^( *)(```+|~~~+).*?^\1\2`*~*\s*?$|<!--.*?-->|`[^`\n]*`", re.MULTILINE | re.DOTALL)
FENCED = re.compile(r"^( *)(```+|~~~+).*?^\1\2`*~*\s*?$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(\s*<?([^)\s>]+)>?[^)]*\)|^\[[^\]]+\]:\s*(\S+)|<(?:a|img)\s[^>]*(?:href|src)=\"([^\"]+)\"", re.M)
HEADING = re.compile(r"^#{1,6} +(.*?)(?: +#+)? *$", re.MULTILINE)


class Page(NamedTuple):
    """A document.

    Attributes:
        links: the targets of its links, each with the line that it is in.
        anchors: what a fragment may name.
    """

    links: list[tuple[int, str]]
    anchors: set[str]


def markdown_page(path: Path) -> Page:
    """Read a Markdown file."""
    text = path.read_text(encoding="utf-8")
    # Blanked, not cut out: the lines keep their numbers.
    prose = CODE.sub(lambda code: re.sub(r"[^\n]", " ", code[0]), text)
    links = [
        (prose.count("\n", 0, found.start()) + 1, next(group for group in found.groups() if group))
        for found in LINK.finditer(prose)
    ]
    slugs = [heading_anchor(heading) for heading in HEADING.findall(FENCED.sub("", text))]
    # The second heading of the same words has the anchor "words-1".
    earlier = [slugs[:place].count(slug) for place, slug in enumerate(slugs)]
    return Page(links, {f"{slug}-{n}" if n else slug for slug, n in zip(slugs, earlier, strict=True)})


def heading_anchor(heading: str) -> str:
    """Compute the anchor of a heading: its words in small letters, without punctuation, with hyphens for spaces."""
    shown = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading)
    return re.sub(r"[^\w\- ]", "", shown.lower()).strip().replace(" ", "-")


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.page = Page([], {"", "top"})

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if value is not None and name in ("href", "src"):
                self.page.links.append((self.getpos()[0], value))
            elif value is not None and (name == "id" or (tag == "a" and name == "name")):
                self.page.anchors.add(value)


def html_page(path: Path) -> Page:
    """Read an HTML file."""
    reader = _Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    return reader.page


def problems(root: Path, paths: list[Path]) -> Iterator[str]:
    """Say of each link that leads nowhere what is missing, and where it stands.

    Args:
        root: No link may lead out of this folder.
        paths: Markdown and HTML files below it.
    """
    pages: dict[Path, Page] = {}

    def page_of(path: Path) -> Page:
        if path not in pages:
            pages[path] = html_page(path) if path.suffix == ".html" else markdown_page(path)
        return pages[path]

    for path in paths:
        for line, link in page_of(path).links:
            where = f"{path.relative_to(root)}:{line}: {link}"
            scheme, site, target, _, anchor = urlsplit(link)
            if scheme or site:
                continue
            file = (path.parent / unquote(target)).resolve() if target else path
            if not file.is_relative_to(root):
                yield f"{where}: leads out of {root.name}"
            elif not file.exists():
                yield f"{where}: there is no such file"
            elif anchor and file.suffix in (".md", ".html") and unquote(anchor) not in page_of(file).anchors:
                yield f"{where}: {file.relative_to(root)} has no such anchor"


def main(arguments: list[str]) -> int:
    """Check the sources, and the built documentation that is named.

    Args:
        arguments: folders of built documentation.

    Returns:
        The exit code.
    """
    sources = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
    found = list(problems(ROOT, sources))
    pages = 0
    for folder in arguments:
        built = Path(folder).resolve()
        html = sorted(built.rglob("*.html"))
        if not html:
            found.append(f"{folder}: holds no built documentation")
        pages += len(html)
        found += problems(built, html)
    for problem in found:
        print(problem)
    checked = f"{len(sources)} Markdown files and {pages} built pages"
    print(f"links: {len(found)} lead nowhere" if found else f"links: no problem found in {checked}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
