"""What Doxygen reads in place of a file of the book or a header: the same text, with links and groups.

    python3 include/book/filter.py FILE

- A name of the C API between backticks becomes a link, `kvl_attention` as well as `kvl_attention_params.lengths`; so does a name
  of the C++ layer, such as `kvlane::workspace`. A name that does not exist is a warning of Doxygen, and so an error.
- Everything that kvlane.h declares enters a group of topics.dox, by its name.
- A function, struct, field or constant lists the chapters that name it, or else those whose programs use it.
- The paragraphs "Thread safety" and "Bad input" of a function get headings, and shapes such as [batch, seq] are set as code.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

# Names by group; the first that fits counts.
GROUPS = [
    ("api_abi", r"kvl_(abi|version|status|last_error).*|KVL_(ABI_VERSION|STATUS_.*)"),
    ("api_tuning", r"kvl_(context_(set_)?tuning|tuning|prefetch|key_order|score_tiles|advise_huge_pages)|KVL_(PREFETCH|KEY_ORDER|SCORE_TILES)_.*"),
    ("api_writes", r"kvl_(kv_write.*|kv_read.*|hadamard.*|cache_scales|packing|pack_row_pairs|unpack_row_pairs|repeat_kv|context_v_packing"
                   r"|make_kv_write)|KVL_PACKING_.*"),
    ("api_types", r"kvl_(dtype|format)|KVL_(DTYPE|FORMAT)_.*"),
    ("api_contexts", r"kvl_(context|isa|kernel|op|precision)(_.*)?|KVL_(CONTEXT|ISA|OP|PRECISION)_.*"),
    ("api_views", r"kvl_(view|const_view|make_view|make_const_view|as_const)"),
    ("api_threads", r"kvl_(parallel_runner|thread_pool.*)"),
    ("api_rope", r"kvl_(rope.*|pairing|rms_norm.*)|KVL_(ROPE|PAIRING)_.*"),
    ("api_layouts", r"kvl_layout.*|KVL_LAYOUT_.*"),
    ("api_shards", r"kvl_(shard.*|attention_chunks.*|merge_chunks.*|chunk_states)|KVL_SPLIT_GRID"),
    ("api_plans", r"kvl_plan.*"),
    ("api_attention", r"kvl_(attention.*|mask|bit_mask|alibi_slopes|merge_states|make_causal_attention)|KVL_ATTENTION_.*"),
    ("api_caches", r"kvl_(cache.*|kv_layer)"),
]
# Macros that a program defines, and targets of CMake.
NO_LINK = {"KVL_NO_INLINE_HELPERS", "kvlane::kvlane", "kvlane::static"}

NAME = re.compile(r"`((?:kvl_\w+|KVL_[A-Z]\w*)(?:(?:\.|->|::)\w+)?|kvlane::\w+(?:::\w+)*)(?:\(\))?`")
SHAPE = re.compile(r"(?<![`\w\\])(\[[^\]`\[]*\](?!\())(?![`\w])")


def link(match: re.Match[str]) -> str:
    name = match[1]
    if name in NO_LINK:
        return match[0]
    target = re.sub(r"\.|->", "::", name)
    return f'<tt>\\ref {target} "{name}"</tt>'


def group(name: str) -> str:
    for found, pattern in GROUPS:
        if re.fullmatch(pattern, name):
            return found
    sys.exit(f"filter.py has no group for {name}")


def markdown(text: str) -> str:
    """Links outside of code blocks."""
    parts = re.split(r"(^```.*?^```$)", text, flags=re.S | re.M)
    return "".join(part if part.startswith("```") else NAME.sub(link, part) for part in parts)


def one_line(code: str) -> str:
    return re.sub(r"\s*\n *\* *", " ", code)


def comment(text: str) -> str:
    """The inside of a comment of kvlane.h."""
    # Code that is there already stays out of the way.
    pieces = re.split(r"(`[^`]*`)", text)
    text = "".join(one_line(piece) if piece.startswith("`") else SHAPE.sub(lambda m: f"`{one_line(m[1])}`", piece) for piece in pieces)
    text = re.sub(r"^( *\*) Thread safety: ", r"\1 \\par Thread safety\n\1 ", text, flags=re.M)
    text = re.sub(r"^( *\*) Bad input: ", r"\1 \\par Errors\n\1 ", text, flags=re.M)
    return NAME.sub(link, text)


def chapters() -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Names of the C API, and the chapters that have them: in their text, and in their programs."""
    in_text: dict[str, list[str]] = {}
    in_code: dict[str, list[str]] = {}
    for path in sorted(Path("include/book").glob("*.md")):
        text = path.read_text(encoding="utf-8")
        page = re.search(r"^# .*\{#(\w+)\}$", text, re.M)
        if not page or page[1] == "mainpage":
            continue
        code = ""
        for file, block in re.findall(r"^\\snippet (\S+) (\w+)$", text, re.M):
            code += (Path("ffi-tests/book") / file).read_text(encoding="utf-8").split(f"[{block}]")[1]
        said = {re.sub(r"->|::", ".", name) for name in NAME.findall(text)}
        used = set(re.findall(r"\bkvl_\w+|\bKVL_\w+", code))
        for names, found in (in_text, said), (in_code, used):
            for name in found:
                names.setdefault(name, []).append(page[1])
    return in_text, in_code


IN_TEXT, IN_CODE = chapters()


def see(name: str) -> str:
    pages = IN_TEXT.get(name) or IN_CODE.get(name, [])[:4]
    # What only the fields of a struct are named for.
    pages = pages or sorted({page for field, found in IN_TEXT.items() if field.startswith(f"{name}.") for page in found})
    return " * \\par Chapters\n * " + ", ".join(f"\\ref {page}" for page in pages) + "\n" if pages else ""


def declared(line: str, rest: str) -> str:
    """The name that a declaration at the start of a line declares."""
    found = re.match(r"#define (\w+)", line) or re.match(r"typedef struct (\w+) \{", line) or re.match(r"typedef .*?(\w+);", line)
    if not found:
        found = re.search(r"\b(kvl_\w+)\(", rest)
    if not found:
        sys.exit(f"filter.py does not understand {line!r}")
    return found[1]


def c_header(text: str) -> str:
    out = ["/** \\file\n * The C API. Its members are also listed by subject, under Topics.\n */\n"]
    at = 0
    # A comment before a declaration, or before an inline function, where it is a plain one.
    for match in re.finditer(r"^/\*\*\n(.*?)^ \*/\n(?=(.*))|^/\* ([^\n]*(?:\n \*[^\n]*)*?) \*/\n(?=(static inline .*))", text, re.S | re.M):
        if match.start() < at:
            continue
        out.append(fields(text[at:match.start()]))
        rest = text[match.end():]
        line = rest.split("\n", 1)[0]
        body = match[1] if match[1] is not None else " * " + match[3] + "\n"
        name = declared(line, rest)
        out.append(f"/**\n{comment(body)}{see(name)} * \\ingroup {group(name)}\n */\n")
        at = match.end()
    out.append(fields(text[at:]))
    # Links to static functions of another file are not resolved.
    text = re.sub(r"^static inline ", "inline ", "".join(out), flags=re.M)
    return re.sub(r"^(#define (KVL_\w+_INIT) KVL_SIZED_INIT_\((\w+)\))$",
                  lambda m: f"/** Initialises a <tt>\\ref {m[3]} \"{m[3]}\"</tt>: everything is 0 but the size.\n"
                            f" * \\ingroup {group(m[3])} */\n#define {m[2]}", text, flags=re.M)


def fields(text: str) -> str:
    """The comments of the fields of a struct, which are indented."""
    struct = re.match(r"typedef struct (\w+) \{", text)
    if not struct:
        return text

    def field(match: re.Match[str]) -> str:
        name = re.search(r"(\w+)(?:\[\d+\])?;$|\(\*(\w+)\)", match[3])
        pages = IN_TEXT.get(f"{struct[1]}.{name[1] or name[2]}", []) if name else []
        links = "     * \\par Chapters\n     * " + ", ".join(f"\\ref {page}" for page in pages) + "\n" if pages else ""
        return f"{comment(match[1])}{links}{match[2]}{match[3]}"

    return re.sub(r"^(    /\*\*\n(?:     \*(?!/).*\n)*)(     \*/\n)(.*)$", field, text, flags=re.M)


def cpp_header(text: str) -> str:
    # The reader sees one namespace.
    text = re.sub(r"^(inline namespace (throwing|returning) \{|\} // namespace (throwing|returning))$", "", text, flags=re.M)
    functions = set(re.findall(r"\b(kvl_\w+)\(", Path("include/kvlane.h").read_text(encoding="utf-8")))
    owner, out = "", []
    for line in text.split("\n"):
        owner = (re.match(r"class (\w+)", line) or [None, owner])[1]
        # A function without a comment of its own is named for what it calls.
        wrapper = re.match(r"( *)(?!return)(?:KVLANE_RESULT_|[\w:<> ,]+[ *]) ?\*?(\w+)\(.*[{,]$", line)
        if wrapper and not (out and out[-1].lstrip().startswith("///")):
            called = wrapper[2].removesuffix("_in_place")
            for name in (f"kvl_{owner}_{called}" if wrapper[1] else "", f"kvl_{called}"):
                if name in functions:
                    where = " with one tensor as source and target" if called != wrapper[2] else ""
                    out.append(f"{wrapper[1]}/// Calls `{name}`{where}.")
                    break
        out.append(line)
    return re.sub(r"^ *///.*$", lambda m: NAME.sub(link, m[0]), "\n".join(out), flags=re.M)


def main() -> None:
    path = Path(sys.argv[1])
    text = path.read_text(encoding="utf-8")
    kinds = {".md": markdown, ".h": c_header, ".hpp": cpp_header}
    sys.stdout.write(kinds[path.suffix](text))


main()
