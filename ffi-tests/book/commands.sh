#!/bin/sh
# The commands of the chapter on building, and all programs of the book, with an installation.
#
#   sh ffi-tests/book/commands.sh WORK
#
# WORK is a directory for what is built. PREFIX is where the library is installed, or will be.
set -eu
work=$1
if [ ! -e "$PREFIX/lib/pkgconfig/kvlane.pc" ]; then
    # [install]
    sh include/install.sh --prefix "$PREFIX"
    # [install]
fi
mkdir -p "$work"
cp ffi-tests/book/* ffi-tests/threads/pool.hpp "$work"
cd "$work"

# [shared]
export PKG_CONFIG_PATH="$PREFIX/lib/pkgconfig"
cc -std=c11 decode.c $(pkg-config --cflags --libs kvlane) -lm -Wl,-rpath,"$PREFIX/lib" -o decode
./decode
# [shared]

# [static]
cc -std=c11 decode.c $(pkg-config --cflags kvlane) "$PREFIX/lib/libkvlane.a" -lpthread -ldl -lm -o decode-static
./decode-static
# [static]

# [cmake]
cmake -S . -B build -DCMAKE_PREFIX_PATH="$PREFIX"
cmake --build build
build/decoder
# [cmake]

for source in *.c *.cpp; do
    case $source in
    *.c) compile="cc -std=c11" ;;
    *) compile="c++ -std=c++17" ;;
    esac
    $compile -Wall -Wextra -Werror -D_POSIX_C_SOURCE=200809L -O1 "$source" $(pkg-config --cflags --libs kvlane) -Wl,-rpath,"$PREFIX/lib" \
        -pthread -lm -o program
    ./program >/dev/null || { echo "$source fails" >&2; exit 1; }
done
echo "the programs of the book give the results that it states"
