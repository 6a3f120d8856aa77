#!/usr/bin/env python3
"""Builds the wheel of kvlane: the shared library that include/install.sh makes, and the modules of this directory.

    python3 include/python/build_wheel.py DIRECTORY

The wheel serves every Python 3.10 and newer, of the platform and the glibc of this machine or newer; its name says which.
"""

from __future__ import annotations

import base64
import hashlib
import platform
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from generate import generate

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


def platform_tag(library: Path) -> str:
    """manylinux with the newest version of glibc that the library asks for."""
    text = subprocess.run(["readelf", "-W", "--version-info", library], check=True, capture_output=True, text=True).stdout
    versions = [tuple(map(int, v)) for v in re.findall(r"GLIBC_(\d+)\.(\d+)", text)]
    major, minor = max(versions)
    return f"manylinux_{major}_{minor}_{platform.machine()}"


def main() -> None:
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    to = Path(sys.argv[1])
    manifest = (ROOT / "Cargo.toml").read_text()
    version, description, licence = (re.search(rf'^{key} = "(.*)"$', manifest, re.M)[1] for key in ("version", "description", "license"))
    with tempfile.TemporaryDirectory() as prefix:
        subprocess.run(["sh", ROOT / "include/install.sh", "--prefix", prefix], check=True, stdout=sys.stderr)
        library = (Path(prefix) / "lib/libkvlane.so").resolve()
        tag = f"py3-none-{platform_tag(library)}"
        info = f"kvlane-{version}.dist-info"
        files = {f"kvlane/{path.name}": path.read_bytes() for path in sorted((HERE / "kvlane").glob("*.py"))}
        files["kvlane/capi.py"] = generate((ROOT / "include/kvlane.h").read_text()).encode()
        files["kvlane/py.typed"] = b""
        files["kvlane/libkvlane.so.0"] = library.read_bytes()
        files[f"{info}/METADATA"] = (
            f"Metadata-Version: 2.4\nName: kvlane\nVersion: {version}\nSummary: {description}\nLicense-Expression: {licence}\n"
            "License-File: LICENSE-MIT\nLicense-File: LICENSE-APACHE\nLicense-File: THIRD_PARTY.md\n"
            "Requires-Python: >=3.10\nRequires-Dist: numpy\n"
            "Provides-Extra: torch\nRequires-Dist: torch>=2.6; extra == \"torch\"\n"
            "Provides-Extra: hf\nRequires-Dist: torch>=2.6; extra == \"hf\"\nRequires-Dist: transformers>=5; extra == \"hf\"\n").encode()
        for name in ("LICENSE-MIT", "LICENSE-APACHE", "THIRD_PARTY.md"):
            files[f"{info}/licenses/{name}"] = (ROOT / name).read_bytes()
        files[f"{info}/WHEEL"] = f"Wheel-Version: 1.0\nGenerator: kvlane\nRoot-Is-Purelib: false\nTag: {tag}\n".encode()
    record = ""
    for name, data in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        record += f"{name},sha256={digest},{len(data)}\n"
    files[f"{info}/RECORD"] = f"{record}{info}/RECORD,,\n".encode()
    to.mkdir(parents=True, exist_ok=True)
    wheel = to / f"kvlane-{version}-{tag}.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            entry = zipfile.ZipInfo(name)
            entry.external_attr = 0o644 << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, data)
    print(wheel)


if __name__ == "__main__":
    main()
