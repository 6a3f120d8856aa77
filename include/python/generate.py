"""Writes the module `kvlane.capi` from kvlane.h: every constant, struct and function, with its comment as docstring."""

from __future__ import annotations

import keyword
import re

SCALARS = {
    "int32_t": "C.c_int32", "uint32_t": "C.c_uint32", "int64_t": "C.c_int64", "uint64_t": "C.c_uint64", "uint8_t": "C.c_uint8",
    "size_t": "C.c_size_t", "float": "C.c_float", "double": "C.c_double", "uint16_t": "C.c_uint16", "int8_t": "C.c_int8",
}
ELEMENTS = {"int32_t": "int32", "uint32_t": "uint32", "int64_t": "int64", "float": "float32", "double": "float64", "uint8_t": "uint8"}
CALLBACK = "C.CFUNCTYPE(C.c_int32, C.c_void_p, C.c_size_t, C.CFUNCTYPE(None, C.c_void_p, C.c_size_t), C.c_void_p)"


def comment(text: str) -> str:
    """The text of a `/** */` comment, safe in a docstring."""
    lines = [re.sub(r"^\s*\*? ?", "", line) for line in text.strip().splitlines()]
    return "\n".join(lines).strip().replace("\\", "\\\\").replace('"""', "'''")


def docstring(text: str, indent: str) -> str:
    body = text.replace("\n", "\n" + indent).replace("\n" + indent + "\n", "\n\n")
    return f'{indent}"""{body}\n{indent}"""\n'


def declared(text: str, enums: dict[str, str]) -> tuple[str, str, tuple[str, bool] | None]:
    """Name, ctypes type, and for a pointer what it points to and whether it is only read."""
    text = " ".join(text.split())
    if "(*run)" in text:
        return "run", CALLBACK, None
    array = re.fullmatch(r"(.*?)(\w+)\[(\d+)\]", text)
    if array:
        return array[2], f"{SCALARS[array[1].strip()]} * {array[3]}", None
    parts = re.fullmatch(r"(.*?)(\w+)", text)
    assert parts, text
    kind, name = parts[1].strip(), parts[2]
    if "*" in kind:
        target = re.sub(r"\b(struct|const)\b|\*", "", kind).strip()
        if kind.count("*") > 1:
            target = "pointer"
        return name, "C.c_void_p", (ELEMENTS.get(enums.get(target, target), target), kind.startswith("const"))
    kind = kind.replace("struct ", "")
    kind = enums.get(kind, kind)
    return name, SCALARS.get(kind, kind), None


def generate(header: str) -> str:
    enums = {name: kind for kind, name in re.findall(r"^typedef (int32_t|uint32_t) (\w+);", header, re.M)}
    out = ['"""kvlane.h for Python, generated from it. Pointers to lists take arrays of exactly the element type of the header, pointers to\n'
           'structs take structs, views take arrays of numpy and of anything with DLPack. A status other than 0 is raised as `Error`."""\n',
           "from __future__ import annotations\n", "import ctypes as C\n",
           "from ._base import LIBRARY as _library, Struct, argument as _argument, check as _check, text as _text\n"]
    for doc, name, value in re.findall(r"/\*\*\n((?: \*[^\n]*\n)*?) \*/\n#define (KVL_[A-Z0-9_]+) (\d+)\n", header):
        out.append(f"{name} = {value}\n{docstring(comment(doc), '')}")
    structs = re.findall(r"/\*\*\n((?: \*[^\n]*\n)*?) \*/\ntypedef struct (\w+) \{\n(.*?)\n\} \w+;", header, re.S)
    for doc, name, body in structs:
        fields, pointers, docs = [], {}, []
        for field_doc, declaration in re.findall(r"/\*\*\n(.*?)\*/\s*(.*?);", body, re.S):
            field, kind, pointer = declared(declaration, enums)
            if kind == "C.c_void_p" and pointer and pointer[0] == "char":
                kind, pointer = "C.c_char_p", None
            fields.append(f'        ("{field}", {kind}),\n')
            if pointer:
                pointers[field] = pointer
            docs.append(f"{field}: " + comment(field_doc).replace("\n", "\n    "))
        out.append(f"\nclass {name}(Struct):\n{docstring(comment(doc) + chr(10) * 2 + chr(10).join(docs), '    ')}"
                   f"    _fields_ = (\n{''.join(fields)}    )\n    _pointers_ = {pointers!r}\n")
    functions = re.findall(r"/\*\*\n((?: \*[^\n]*\n)*?) \*/\n((?:const )?\w+ \*?)(kvl_\w+)\(([^;{]*)\);", header)
    for doc, result, name, parameters in functions:
        arguments = [] if parameters.strip() == "void" else [declared(p, enums) for p in parameters.split(",")]
        names = [n + "_" if keyword.iskeyword(n) else n for n, _, _ in arguments]
        result = result.strip()
        restype = ("None" if result == "void" else "C.c_char_p" if "*" in result else
                   SCALARS[enums.get(result, result)])
        kinds = ", ".join(kind for _, kind, _ in arguments)
        passed = ", ".join(f"_argument({n}, {n!r}, {pointer[0]!r}, {pointer[1]})" if pointer else n
                           for n, (_, _, pointer) in zip(names, arguments))
        call = f"_library.{name}({passed})"
        call = f"_check({call})" if result == "kvl_status" else f"_text({call})" if "*" in result else call
        out.append(f"\n_library.{name}.restype = {restype}\n_library.{name}.argtypes = [{kinds}]\n\n\n"
                   f"def {name}({', '.join(names)}):\n{docstring(comment(doc), '    ')}    return {call}\n")
    return "\n".join(out)
