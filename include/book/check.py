"""Checks the built book.

    python3 include/book/check.py DIR

Every link leads to a file and an anchor that exist; everything that the headers declare is documented; and a chapter names every
function, struct and enumeration of kvlane.h.
"""

from __future__ import annotations

import re
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

ROOT = Path(__file__).resolve().parents[2]


class Page(HTMLParser):
    """The anchors of a page and the targets of its links."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("id", "name") and value:
                self.anchors.add(value)
            if name in ("href", "src") and value and tag in ("a", "img", "link", "script"):
                self.links.add(value)


def main() -> None:
    to = Path(sys.argv[1])
    html = to / "html"
    pages = {path.name: Page(path.read_text(encoding="utf-8")) for path in sorted(html.glob("*.html"))}
    wrong: list[str] = []

    count = 0
    for name, page in pages.items():
        for target in page.links:
            if re.match(r"[a-z]+:", target):
                continue
            count += 1
            file, _, anchor = unquote(target).partition("#")
            file = file or name
            if not (html / file).exists():
                wrong.append(f"{name} links to {target}, which does not exist")
            elif anchor and file in pages and anchor not in pages[file].anchors and not anchor.startswith("index_"):
                # Newer versions of Doxygen link letters of an index that has none, from the index itself.
                wrong.append(f"{name} links to {target}, but {file} has no such anchor")

    # name -> (page, anchor) of everything that is documented.
    found: dict[str, str] = {}
    chapters: list[str] = []
    for compound in ET.parse(to / "kvlane.tag").getroot():
        kind, name = compound.get("kind"), compound.findtext("name", "")
        page = compound.findtext("filename", "")
        if kind == "page":
            chapters.append(page if page.endswith(".html") else page + ".html")
        elif kind in ("struct", "class"):
            found[name] = page
        for member in compound.findall("member"):
            inside = f"{name}." if kind in ("struct", "class") else "kvlane::" if name == "kvlane" else ""
            found[inside + member.findtext("name", "")] = f"{member.findtext('anchorfile')}#{member.findtext('anchor')}"

    header = (ROOT / "include/kvlane.h").read_text(encoding="utf-8")
    constants = re.findall(r"^#define (KVL_[A-Z0-9_]+) ", header, re.M)
    structs = dict(re.findall(r"^typedef struct (\w+) \{\n(.*?)^\} \w+;", header, re.S | re.M))
    named = re.findall(r"^typedef [^({]*\b(kvl_\w+);", header, re.M)
    functions = sorted(set(re.findall(r"^[\w \*]*?\b(kvl_\w+)\(", header, re.M)))
    declared = [name for name in constants if name != "KVL_NO_INLINE_HELPERS"] + list(structs) + named + functions
    for struct, body in structs.items():
        body = re.sub(r"/\*.*?\*/", "", body, flags=re.S)
        declared += [f"{struct}.{field}" for field in re.findall(r"(?:\b|\(\*)(\w+)(?:\[\d\])?(?:\)\(.*\))?;", body)]
    for name in declared:
        if name not in found and name not in ("kvl_context", "kvl_plan", "kvl_thread_pool"):
            wrong.append(f"{name} is not documented")

    # The main page lists names; a chapter says what they are for.
    linked = {link for chapter in chapters if chapter != "index.html" for link in pages[chapter].links}
    for name in functions + list(structs) + named:
        if name in found and found[name] not in linked:
            wrong.append(f"no chapter names {name}")

    hpp = (ROOT / "include/kvlane.hpp").read_text(encoding="utf-8")
    for name in sorted(set(re.findall(r"^KVLANE_RESULT_ (\w+)\(", hpp, re.M))):
        if f"kvlane::{name}" not in found:
            wrong.append(f"kvlane::{name} is not documented")

    for program in sorted((ROOT / "ffi-tests/book").glob("*.c*")):
        page = f"{program.name.replace('.', '_8')}-example.html"
        if program.suffix in (".c", ".cpp") and page not in pages:
            wrong.append(f"programs.dox does not have {program.name}")

    if wrong:
        sys.exit("\n".join(wrong))
    print(f"{len(chapters)} chapters and {len(pages)} pages, {count} links, {len(declared)} names of kvlane.h")


main()
