#!/bin/sh
# Builds the book of the C API and checks it: no warning, no broken link, and a chapter for every function.
#
#   sh include/book/build.sh [DIR]
#
# writes DIR/html/index.html; DIR is target/book. Needs Doxygen 1.9 or newer, and Python.
set -eu
cd "$(dirname "$0")/../.."
to=${1:-target/book}
mkdir -p "$to"
rm -rf "$to/html"
{
    cat include/book/Doxyfile
    echo "OUTPUT_DIRECTORY = \"$to\""
    echo "GENERATE_TAGFILE = \"$to/kvlane.tag\""
} | doxygen -
python3 include/book/check.py "$to"
echo "$to/html/index.html"
