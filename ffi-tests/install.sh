#!/usr/bin/env bash
# What `include/install.sh` installs, used as its users would: by pkg-config and CMake, by GCC and Clang, in every standard, from
# several places, and beside other Rust code.
#
#   bash ffi-tests/install.sh WORK
#
# WORK is a directory that is emptied. MUSL=1 installs and tests the static library for musl too. CINSTALL names a `cargo-cinstall`,
# whose result is compared.
set -euo pipefail
work=$(realpath -m "$1")
cd "$(dirname "$0")/.."
rm -rf "$work"
mkdir -p "$work"

fail() {
    echo "install: $*" >&2
    exit 1
}
# block FILE NAME: the commands that a page marks.
block() {
    local text
    text=$(sed -n "/^<!-- $2 -->\$/,/^\`\`\`\$/p" "$1" | sed '1,2d;$d')
    [ -n "$text" ] || fail "$1 has no commands marked $2"
    printf '%s\n' "$text"
}
# same WANTED COMMAND...
same() {
    local wanted=$1 got
    shift
    got=$("$@") || fail "$* failed"
    [ "$(echo $got)" = "$wanted" ] || fail "$* printed '$got' instead of '$wanted'"
}
unset LD_LIBRARY_PATH

# Staged, and found from there: nothing may depend on where the prefix will be.
DESTDIR=$work/stage PREFIX=/opt/kvlane bash -euo pipefail -c "$(block README.md install)"
tree=$work/stage/opt/kvlane
[ ! -e /opt/kvlane ] || fail "something has been written outside of DESTDIR"

echo "== files"
version=$(sed -n 's/^version = "\(.*\)"$/\1/p' Cargo.toml | head -n 1)
abi=$(sed -n 's/^#define KVL_ABI_VERSION //p' include/kvlane.h)
major=$((abi >> 16)) minor=$((abi & 65535))
same "libkvlane.so.$major.$minor.0" readlink "$tree/lib/libkvlane.so"
same "libkvlane.so.$major.$minor.0" readlink "$tree/lib/libkvlane.so.$major"
readelf -dW "$tree/lib/libkvlane.so" | grep -q "soname: \[libkvlane.so.$major\]" || fail "another SONAME"
# The archive and the shared library export what the list says, and the latter with versions.
sed -n 's/^ *\(kvl_.*\);$/\1/p' include/kvlane.map >"$work/list"
readelf --dyn-syms -W "$tree/lib/libkvlane.so" | awk '$7 != "UND" && $8 ~ /^kvl_/ {print $8}' | sort >"$work/shared"
sed "s/\$/@@KVLANE_$major/" "$work/list" | sort | diff - "$work/shared" || fail "other symbols or versions than in kvlane.map"
readelf -sW "$tree/lib/libkvlane.a" | awk '$5 == "GLOBAL" && $7 != "UND" {print $8}' | sort >"$work/static"
sort "$work/list" | diff - "$work/static" || fail "the archive has other global symbols than kvlane.map"
if readelf -SW "$tree/lib/libkvlane.a" "$tree/lib/libkvlane.so" | grep -E '\.(debug_|llvmbc)'; then
    fail "debug data or bitcode is installed"
fi
for limit in libkvlane.a:12000000 libkvlane.so:6000000; do
    size=$(stat -L -c %s "$tree/lib/${limit%:*}")
    echo "${limit%:*}: $size bytes"
    [ "$size" -le "${limit#*:}" ] || fail "${limit%:*} has $size bytes, more than ${limit#*:}"
done

# by_pkg_config TREE LIBDIR: versions and paths of a place.
export PKG_CONFIG_PATH
by_pkg_config() {
    PKG_CONFIG_PATH=$1/$2/pkgconfig
    same "$version" pkg-config --modversion kvlane
    [ "$(realpath "$(pkg-config --variable=libdir kvlane)")" = "$(realpath "$1/$2")" ] || fail "pkg-config finds another $2"
    [ "$(realpath "$(pkg-config --variable=includedir kvlane)")" = "$(realpath "$1/include")" ] || fail "pkg-config finds other headers"
}
warnings=(-Wall -Wextra -Werror -pedantic -O1)
# program TREE LIBDIR COMPILER STANDARD SOURCE WANTED [FLAG...]: built and run with both libraries.
program() {
    local to=$work/program lib=$1/$2 compile
    compile=("$3" "-std=$4" "${warnings[@]}" "${@:7}" "ffi-tests/$5" -o "$to")
    # shellcheck disable=SC2046 # words on purpose
    "${compile[@]}" $(pkg-config --cflags --libs kvlane) -Wl,-rpath,"$lib"
    same "$6" "$to"
    # shellcheck disable=SC2046
    "${compile[@]}" $(pkg-config --cflags kvlane) "$lib/libkvlane.a" $(pkg-config --static --libs-only-l kvlane | sed 's/-lkvlane//')
    same "$6" "$to"
}

echo "== the commands of the README and of the page on the C API"
for page in README.md src/docs/c_api.md; do
    rm -rf "$work/page" && mkdir "$work/page" && ln -s "$PWD/ffi-tests" "$work/page/ffi-tests"
    (cd "$work/page" && PREFIX=$tree bash -euo pipefail -c "$(block "$OLDPWD/$page" link)") >"$work/printed"
    while read -r line; do
        case $line in
        "1 2 3" | 3 | "$abi") ;;
        *) fail "$page printed '$line'" ;;
        esac
    done <"$work/printed"
    echo "$page: $(wc -l <"$work/printed") programs"
    [ "$(wc -l <"$work/printed")" -ge 2 ] || fail "$page runs no program"
done

echo "== pkg-config"
by_pkg_config "$tree" lib
compilers=("gcc g++")
command -v clang >/dev/null && compilers+=("clang clang++")
[ -z "${CI:-}" ] || [ ${#compilers[@]} = 2 ] || fail "clang is not there"
for pair in "${compilers[@]}"; do
    cc=${pair% *} cxx=${pair#* }
    for standard in c99 c11; do
        program "$tree" lib "$cc" $standard step.c "1 2 3"
    done
    for standard in c++17 c++20; do
        program "$tree" lib "$cxx" $standard step.cpp 3
        program "$tree" lib "$cxx" $standard cpp_status.cpp "" -fno-exceptions
    done
done

echo "== CMake"
# by_cmake TREE COMPILERS
by_cmake() {
    local log=$work/cmake.log
    rm -rf "$work/cmake"
    cmake -S ffi-tests/cmake -B "$work/cmake" -DCMAKE_PREFIX_PATH="$1" -DCMAKE_C_COMPILER="${2% *}" -DCMAKE_CXX_COMPILER="${2#* }" >"$log" 2>&1 &&
        cmake --build "$work/cmake" --parallel 2 >>"$log" 2>&1 || { cat "$log"; fail "CMake does not build with $2 in $1"; }
    for kind in kvlane static; do
        for standard in 99 11; do same "1 2 3" "$work/cmake/c$standard-$kind"; done
        for standard in 17 20; do
            same 3 "$work/cmake/cpp$standard-$kind"
            same "" "$work/cmake/cpp$standard-$kind-status"
        done
    done
    readelf -dW "$work/cmake/c99-kvlane" | grep -q "NEEDED.*\[libkvlane.so.$major\]" || fail "CMake links the shared library by another name"
    if readelf -dW "$work/cmake/c99-static" | grep -q 'NEEDED.*libkvlane'; then fail "kvlane::static is the shared library"; fi
}
for pair in "${compilers[@]}"; do by_cmake "$tree" "$pair"; done
# Versions that this one does not serve, and those that it does.
sed -n 's/^set(PACKAGE_VERSION "\(.*\)")$/\1/p' "$tree/share/cmake/kvlane/kvlaneConfigVersion.cmake" | grep -qx "$version" ||
    fail "kvlaneConfigVersion.cmake has another version than Cargo.toml"
asks() {
    mkdir -p "$work/asks"
    printf 'cmake_minimum_required(VERSION 3.19)\nproject(asks NONE)\nfind_package(kvlane %s REQUIRED)\n' "$1" >"$work/asks/CMakeLists.txt"
    rm -rf "$work/asks/build"
    cmake -S "$work/asks" -B "$work/asks/build" -DCMAKE_PREFIX_PATH="$tree" >"$work/cmake.log" 2>&1
}
for wanted in "" "$version" "$version EXACT" "${version%.*}" "${version%%.*}" "0...9"; do
    asks "$wanted" || { cat "$work/cmake.log"; fail "find_package(kvlane $wanted) does not find $version"; }
done
for wanted in 0.0.1 0.99 1 "9.0" "0.99...1.0"; do
    ! asks "$wanted" || fail "find_package(kvlane $wanted) accepts $version"
done

echo "== other places"
multiarch=$(gcc -print-multiarch)
for libdir in lib64 "lib/${multiarch:-x86_64-linux-gnu}"; do
    DESTDIR='' sh include/install.sh --prefix "$work/first" --libdir "$libdir"
    rm -rf "$work/moved to"
    mv "$work/first" "$work/moved to"
    by_cmake "$work/moved to" "${compilers[0]}"
    mv "$work/moved to" "$work/moved"
    by_pkg_config "$work/moved" "$libdir"
    program "$work/moved" "$libdir" gcc c99 step.c "1 2 3"
    rm -rf "$work/moved"
done
# A libdir outside of the prefix cannot move.
DESTDIR=$work/outside sh include/install.sh --prefix /usr --libdir=/srv/lib
grep -qx 'libdir=/srv/lib' "$work/outside/srv/lib/pkgconfig/kvlane.pc" || fail "an absolute libdir is lost"
grep -qx 'prefix=/usr' "$work/outside/srv/lib/pkgconfig/kvlane.pc" || fail "an absolute prefix is lost"

echo "== the archive of a release"
sh include/install.sh --archive "$work/release" >"$work/printed"
release=$(cat "$work/printed")
mkdir "$work/unpacked"
tar -C "$work/unpacked" -xzf "$release"
unpacked=$(echo "$work"/unpacked/kvlane-"$version"-*)
by_pkg_config "$unpacked" lib
program "$unpacked" lib gcc c99 step.c "1 2 3"
for document in LICENSE-MIT LICENSE-APACHE THIRD_PARTY.md licenses; do
    [ -e "$unpacked/share/doc/kvlane/$document" ] || fail "the release lacks $document"
done
# Every crate that THIRD_PARTY.md lists for the library has left a notice, or is known to name its licence only.
notices=$(ls "$unpacked/share/doc/kvlane/licenses")
for crate in bytemuck half libm pulp rayon rayon-core zerocopy; do
    [[ $notices == *"$crate-"[0-9]* ]] || fail "the release has no notice of $crate"
done
echo "$(basename "$release"): $(stat -c %s "$release") bytes"

echo "== a plugin with the archive inside"
gcc "${warnings[@]}" -shared -fPIC -I"$tree/include" ffi-tests/plugin.c "$tree/lib/libkvlane.a" -Wl,--exclude-libs,libkvlane.a -lm -o "$work/plugin.so"
exported=$(readelf --dyn-syms -W "$work/plugin.so" | awk '$5 == "GLOBAL" && $7 != "UND" {print $8}')
[ "$exported" = plugin_kvlane_version ] || fail "the plugin exports $exported"
same "$abi" python3 -c 'import ctypes, sys; print(ctypes.CDLL(sys.argv[1]).plugin_kvlane_version())' "$work/plugin.so"

echo "== beside other Rust code"
compilers_of_rust=(rustc)
for toolchain in $(rustup toolchain list 2>/dev/null | sed 's/ .*//'); do compilers_of_rust+=("rustc +$toolchain"); done
[ ! -x /usr/bin/rustc ] || compilers_of_rust+=(/usr/bin/rustc)
for rustc in "${compilers_of_rust[@]}"; do
    $rustc --crate-type staticlib --edition 2024 -O -o "$work/libother.a" ffi-tests/two_archives.rs 2>"$work/rustc.log" ||
        { cat "$work/rustc.log"; continue; }
    for order in "$tree/lib/libkvlane.a $work/libother.a" "$work/libother.a $tree/lib/libkvlane.a"; do
        # shellcheck disable=SC2086
        gcc "${warnings[@]}" -I"$tree/include" ffi-tests/two_archives.c $order -lpthread -ldl -lm -o "$work/two"
        [[ $("$work/two") == *null* ]] || fail "two archives, of $rustc"
    done
    echo "$($rustc --version)"
done

if [ -n "${MUSL:-}" ]; then
    echo "== musl"
    # A check of linking: the kernels need not be fast.
    DESTDIR='' CARGO_PROFILE_RELEASE_OPT_LEVEL=1 CARGO_PROFILE_RELEASE_DEBUG=false \
        sh include/install.sh --prefix "$work/musl" --target x86_64-unknown-linux-musl
    [ ! -e "$work/musl/lib/libkvlane.so" ] || fail "a shared library for musl"
    PKG_CONFIG_PATH=$work/musl/lib/pkgconfig
    # shellcheck disable=SC2046
    musl-gcc -static -std=c99 "${warnings[@]}" ffi-tests/step.c $(pkg-config --static --cflags --libs kvlane) -o "$work/program"
    same "1 2 3" "$work/program"
    musl-gcc -static -std=c11 -O1 -D_GNU_SOURCE -I"$work/musl/include" ffi-tests/threads.c "$work/musl/lib/libkvlane.a" -lpthread -lm -o "$work/program"
    "$work/program" >/dev/null || fail "threads.c fails with musl"
fi

if [ -n "${CINSTALL:-}" ]; then
    echo "== cargo-c"
    "$CINSTALL" cinstall --release --prefix /opt/kvlane --libdir lib --destdir "$work/cargo-c" --target-dir "${CARGO_TARGET_DIR:-target}/cargo-c"
    other=$work/cargo-c/opt/kvlane
    listing() { (cd "$1" && find . \( -type f -o -type l \) -printf '%p %y %l\n' | sort); }
    diff <(listing "$tree") <(listing "$other") || fail "cargo-c installs other files"
    for same in include/kvlane.h include/kvlane.hpp share/cmake/kvlane/kvlaneConfig.cmake share/cmake/kvlane/kvlaneConfigVersion.cmake; do
        cmp "$tree/$same" "$other/$same"
    done
    readelf -dW "$other/lib/libkvlane.so" | grep -q "soname: \[libkvlane.so.$major\]" || fail "cargo-c gives another SONAME"
    readelf --dyn-syms -W "$other/lib/libkvlane.so" | awk '$7 != "UND" && $8 ~ /^kvl_/ {print $8}' | sort | diff "$work/list" - ||
        fail "cargo-c exports other symbols"
    # Its .pc file has the prefix in it, and moves with pkg-config's own option.
    for query in --modversion --cflags "--libs" ; do
        [ "$(PKG_CONFIG_PATH=$other/lib/pkgconfig pkg-config --define-prefix $query kvlane | sed "s,$other,T,g")" = \
            "$(PKG_CONFIG_PATH=$tree/lib/pkgconfig pkg-config --define-prefix $query kvlane | sed "s,$tree,T,g")" ] ||
            fail "pkg-config $query differs between cargo-c and install.sh"
    done
    PKG_CONFIG_PATH=$other/lib/pkgconfig
    gcc -std=c99 "${warnings[@]}" ffi-tests/step.c -I"$other/include" -L"$other/lib" -lkvlane -Wl,-rpath,"$other/lib" -o "$work/program"
    same "1 2 3" "$work/program"
    by_cmake "$other" "${compilers[0]}"
fi
echo "== installed, found and run"
