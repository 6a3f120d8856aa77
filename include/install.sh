#!/bin/sh
# Builds the C library and installs it: headers, shared and static library, and the files by which pkg-config and CMake find
# them. Needs cargo, a C compiler and binutils, for a target that has ELF files.
#
#   sh include/install.sh [--prefix DIR] [OPTION...]
#   sh include/install.sh --archive DIR [--target TRIPLE]
#
#   --prefix DIR       where the library will live; /usr/local
#   --libdir DIR       of the libraries, in the prefix unless it is absolute; lib (or lib64, or lib/x86_64-linux-gnu)
#   --includedir DIR   of the headers, likewise; include
#   --datarootdir DIR  of the CMake package, likewise; share
#   --destdir DIR      a directory that stands for the root of the file system, as packagers use it; the variable
#                     DESTDIR does the same
#   --target TRIPLE    another target of Rust; for musl only the static library is made
#   --archive DIR      writes DIR/kvlane-VERSION-TARGET.tar.gz with all of it and the licences, and installs nothing
#
# CC, AR, NM and OBJCOPY select tools, CARGO cargo, and CARGO_TARGET_DIR where it builds. CARGOFLAGS are further words for
# `cargo build`, as --frozen.
#
# `cargo cinstall` gives the same files. This script does more to the libraries: both come from one object in which only the
# functions of the header have global names, so that the archive can be linked beside other archives of Rust code; neither
# contains debug data or bitcode; and the symbols of the shared library have the versions of include/kvlane.map.
set -eu
export LC_ALL=C

fail() {
    echo "install.sh: $*" >&2
    exit 1
}

prefix=/usr/local libdir=lib includedir=include datarootdir=share destdir=${DESTDIR:-} target='' archive=''
while [ $# -gt 0 ]; do
    case $1 in
    --prefix | --libdir | --includedir | --datarootdir | --destdir | --target | --archive)
        [ $# -ge 2 ] && [ -n "$2" ] || fail "$1 needs a value"
        option=${1#--}
        eval "$option=\$2"
        shift 2
        ;;
    --prefix=?* | --libdir=?* | --includedir=?* | --datarootdir=?* | --destdir=?* | --target=?* | --archive=?*)
        value=${1#*=} option=${1%%=*}
        shift
        set -- "$option" "$value" "$@"
        ;;
    *) fail "$1 is no option; the head of the script lists them" ;;
    esac
done
# absolute PATH: without a final slash, from the directory in which the script was called.
absolute() {
    case $1 in
    /) ;;
    /*) printf %s "${1%/}" ;;
    *) printf %s "$PWD/${1%/}" ;;
    esac
}
prefix=$(absolute "$prefix")
[ -z "$destdir" ] || destdir=$(absolute "$destdir")
if [ -n "$archive" ]; then
    archive=$(absolute "$archive")
    prefix=/
fi
cd "$(dirname "$0")/.."

cargo=${CARGO:-cargo}
host=$(rustc -vV | sed -n 's/^host: //p')
triple=${target:-$host}
case $triple in
*-linux-* | *-freebsd | *-netbsd | *-openbsd | *-dragonfly | *-illumos | *-android*) ;;
*) fail "$triple has no ELF libraries: install with cargo-c, by cargo cinstall --release --prefix $prefix" ;;
esac
# The compiler and the tools beside it.
case ${CC:+given}-$triple in
given-*) ;;
*-musl*) [ "$triple" = "$host" ] && CC=cc || CC=musl-gcc ;;
*) [ "${triple%%-*}" = "${host%%-*}" ] && CC=cc || CC=${triple%%-*}-linux-gnu-gcc ;;
esac
tools=''
case $CC in
*-linux-*-gcc) tools=${CC%gcc} ;;
esac
command -v "${tools}objcopy" >/dev/null || tools=''
AR=${AR:-${tools}ar} NM=${NM:-${tools}nm} OBJCOPY=${OBJCOPY:-${tools}objcopy}
for tool in "$cargo" "${CC%% *}" "$AR" "$NM" "$OBJCOPY"; do
    command -v "$tool" >/dev/null || fail "$tool is not there"
done

# Versions: of the crate, and of the ABI from the header.
version=$(sed -n 's/^version = "\(.*\)"$/\1/p' Cargo.toml | head -n 1)
abi=$(sed -n 's/^#define KVL_ABI_VERSION \([0-9]*\)$/\1/p' include/kvlane.h)
major=$((abi / 65536)) minor=$((abi % 65536))
soname=libkvlane.so.$major file=libkvlane.so.$major.$minor.0

# shellcheck disable=SC2086 # words on purpose
"$cargo" build --release --lib --features capi ${target:+--target "$target"} ${CARGOFLAGS:-} --message-format=json-render-diagnostics >/dev/null
built=${CARGO_TARGET_DIR:-target}/${target:+$target/}release
[ -e "$built/libkvlane.a" ] || fail "cargo has built no $built/libkvlane.a"
work=$(mktemp -d "${TMPDIR:-/tmp}/kvlane-install.XXXXXX")
trap 'rm -rf "$work"' EXIT
trap 'exit 1' HUP INT TERM

# One object of what the exported functions need. Sections that none of them needs are left to the final link: GNU ld makes weak
# names local when it collects them here.
sed -n 's/^ *\(kvl_[a-z0-9_]*\);$/\1/p' include/kvlane.map >"$work/exports"
from=$built/libkvlane.a
unwind=''
case $triple in
# The unwinder of a GCC that was built for glibc does not link with musl; Rust's own does.
*-musl*) unwind=$(rustc --print target-libdir ${target:+--target "$target"})/self-contained/libunwind.a ;;
esac
[ -e "$unwind" ] || unwind=''
# shellcheck disable=SC2046,SC2086 # words on purpose
$CC -r -nostdlib -Wl,--force-group-allocation $(sed 's/^/-Wl,-u,/' "$work/exports") -o "$work/all.o" \
    "$from" ${unwind:+"$unwind"}
"$OBJCOPY" --strip-debug --remove-section=.llvmbc --remove-section=.llvmcmd "$work/all.o" "$work/kvlane.o"
# What it defines becomes local, what it needs stays as it is: the names of newer C libraries are weak.
"$NM" -g --defined-only "$work/kvlane.o" | sed 's/.* //' | sort >"$work/defined"
sort "$work/exports" | comm -13 - "$work/defined" >"$work/internal"
"$OBJCOPY" --localize-symbols="$work/internal" "$work/kvlane.o"
rm "$work/all.o"
(cd "$work" && "$AR" rcs libkvlane.a kvlane.o)
case $triple in
*-musl*) shared='' ;;
*)
    shared=yes
    $CC -shared -Wl,-soname,"$soname" -Wl,--version-script=include/kvlane.map -Wl,--gc-sections -Wl,--no-undefined \
        -Wl,-z,relro,-z,now -Wl,-s -o "$work/$file" "$work/kvlane.o" -lgcc_s -lpthread -ldl -lm
    ;;
esac

# inside DIR: the directory in the prefix.
inside() {
    case $1 in
    /*) printf %s "$1" ;;
    *) printf %s "${prefix%/}/$1" ;;
    esac
}
name=kvlane-$version-$triple
[ -z "$archive" ] || destdir=$work/$name
lib=$destdir$(inside "$libdir") include=$destdir$(inside "$includedir") share=$destdir$(inside "$datarootdir")
mkdir -p "$lib/pkgconfig" "$include" "$share/cmake/kvlane"
# put MODE FROM TO: whole files only, so that a program that runs the old library keeps it.
put() {
    rm -f "$3"
    cp "$2" "$3"
    chmod "$1" "$3"
}
for header in kvlane.h kvlane.hpp; do
    put 644 "include/$header" "$include/$header"
done
put 644 "$work/libkvlane.a" "$lib/libkvlane.a"
if [ -n "$shared" ]; then
    put 755 "$work/$file" "$lib/$file"
    ln -sf "$file" "$lib/$soname"
    ln -sf "$file" "$lib/libkvlane.so"
fi
for part in kvlaneConfig.cmake kvlaneConfigVersion.cmake; do
    put 644 "include/$part" "$share/cmake/kvlane/$part"
done

# In the prefix, paths start from the .pc file, so that the tree can be moved.
case $libdir in
/*) base=$prefix ;;
*) base=\${pcfiledir}/..$(printf %s "/$libdir" | sed 's,/\.\?/*$,,; s,//*\(\./\)*[^/]*,/..,g') ;;
esac
# variable DIR: as the .pc file says it.
variable() {
    case $1 in
    /*) printf %s "$1" ;;
    *) printf '${prefix}/%s' "$1" ;;
    esac
}
cat >"$work/kvlane.pc" <<PC
prefix=$base
exec_prefix=\${prefix}
libdir=$(variable "$libdir")
includedir=$(variable "$includedir")

Name: kvlane
Description: $(sed -n 's/^description = "\(.*\)"$/\1/p' Cargo.toml)
Version: $version
Libs: -L\${libdir} -lkvlane
Cflags: -I\${includedir}
Libs.private: -lpthread -ldl -lm
PC
put 644 "$work/kvlane.pc" "$lib/pkgconfig/kvlane.pc"

if [ -n "$archive" ]; then
    documents=$share/doc/kvlane
    mkdir -p "$documents" "$archive"
    cp README.md CHANGELOG.md THIRD_PARTY.md LICENSE-APACHE LICENSE-MIT "$documents"
    # The notices of every crate in the library, from its source, and of Rust's standard library.
    "$cargo" tree --quiet --edges normal --features capi --target "$triple" --prefix none --no-dedupe --format '{p}' |
        sed -n 's/^\([^ ]*\) v\([^ ]*\).*/\1-\2/p' | sort -u >"$work/crates"
    home=${CARGO_HOME:-$HOME/.cargo}
    while read -r crate; do
        case $crate in
        kvlane-*) continue ;;
        esac
        found=''
        for notice in "$home"/registry/src/*/"$crate"/[LCNU][IOPN]*; do
            case ${notice##*/} in
            LICEN[SC]E* | COPYING* | COPYRIGHT* | NOTICE* | UNLICENSE*)
                mkdir -p "$documents/licenses/$crate"
                cp -R "$notice" "$documents/licenses/$crate/"
                found=yes
                ;;
            esac
        done
        # Some crates name their licence only.
        [ -n "$found" ] || echo "$crate" >>"$documents/licenses/named-only.txt"
    done <"$work/crates"
    for notice in "$(rustc --print sysroot)"/share/doc/rust/COPYRIGHT-library.html; do
        [ ! -e "$notice" ] || { mkdir -p "$documents/licenses/rust" && cp "$notice" "$documents/licenses/rust/"; }
    done
    tar -C "$work" --sort=name --owner=0 --group=0 --numeric-owner -czf "$archive/$name.tar.gz" "$name"
    echo "$archive/$name.tar.gz"
fi
