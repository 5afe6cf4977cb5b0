"""Checks a built documentation without a network: links, anchors and pictures lead somewhere, and nothing is loaded
from elsewhere.

    python docs/check_links.py build/docs

Exit status 1 and one line per fault. Links to other hosts are left to the reader: no build may depend on them.
"""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

# What a browser fetches by itself; links are followed by people.
LOADED = {
    "img": "src",
    "script": "src",
    "iframe": "src",
    "source": "src",
    "audio": "src",
    "video": "src",
    "embed": "src",
}


class Page(HTMLParser):
    """Anchors, links and loaded files of one page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.without_text: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        self.anchors |= {given[name] for name in ("id", "name") if given.get(name)}
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])
        if tag == "link" and given.get("href") and given.get("rel") in ("stylesheet", "icon", "preload"):
            self.loaded.append(given["href"])
        if tag in LOADED and given.get(LOADED[tag]):
            self.loaded.append(given[LOADED[tag]])
        if tag == "img" and not given.get("alt"):
            self.without_text.append(str(given.get("src")))


def faults(root: Path) -> list[str]:
    """One line for every link that leads nowhere, every file from elsewhere, every picture without a text."""
    pages = {path: Page(path) for path in sorted(root.rglob("*.html"))}
    if not pages:
        return [f"{root} holds no page"]
    found = []
    for path, page in pages.items():
        where = path.relative_to(root)
        for target in page.loaded:
            if urlsplit(target).scheme == "data":
                continue
            if urlsplit(target).scheme or target.startswith("//"):
                found.append(f"{where}: loads {target} from elsewhere")
            elif not _file(path, target).is_file():
                found.append(f"{where}: {target} is missing")
        for target in page.links:
            parts = urlsplit(target)
            if parts.scheme or target.startswith("//"):
                continue
            file = _file(path, target)
            if not file.is_file():
                found.append(f"{where}: the link {target} leads to no file")
            elif parts.fragment and file in pages and unquote(parts.fragment) not in pages[file].anchors:
                found.append(f"{where}: the link {target} leads to no such place")
        found += [f"{where}: the picture {source} has no text in its place" for source in page.without_text]
    return found


def _file(page: Path, target: str) -> Path:
    path = unquote(urlsplit(target).path)
    return (page.parent / path).resolve() if path else page.resolve()


def main() -> int:
    if len(sys.argv) != 2:
        raise SystemExit("check_links.py takes one argument, the folder of the pages")
    root = Path(sys.argv[1]).resolve()
    found = faults(root)
    print("\n".join(found) if found else f"{root}: every link leads somewhere")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
