#!/usr/bin/env bash
# Makes a wheel of PyTorch for GPUs load without the libraries that it is linked with, for use on the CPU alone:
#
#     bash ffi-tests/cpu_torch.sh PYTHON
#
# PYTHON is the interpreter of the environment in which PyTorch was installed with --no-deps. Each missing library becomes an
# empty one, with the versions that are asked for, in which every function returns CUDA's error for "no device", or a text that says so.
set -euo pipefail

lib=$("$1" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torch/lib
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
nm --dynamic --undefined-only "$lib"/*.so |
    sed -nE -e 's/^ *[Uw] ((cuda|cudnn|cublas|cufft|cusparse|nccl|nvrtc)[A-Za-z]*Get[A-Za-z]*(String|Name))\b.*/const char *\1(void) { return "no device"; }/p' \
        -e t -e 's/^ *[Uw] ((_*cu|nccl|nvrtc|nvshmem)[A-Za-z0-9_]*).*/int \1(void) { return 100; }/p' | sort -u >"$work/stubs.c"
ldd "$lib"/*.so | sed -nE 's/^\s*(lib\S+) => not found$/\1/p' | sort -u | while read -r name; do
    objdump -p "$lib"/*.so | awk -v from="$name:" '/required from/ { on = $3 == from; next } NF != 4 { on = 0 } on { print $4 }' |
        sort -u | sed 's/.*/& { global: *; };/' >"$work/versions"
    [ -s "$work/versions" ] || echo '{ global: *; };' >"$work/versions"
    cc -shared -w -fno-builtin -o "$lib/$name" -Wl,-soname,"$name",--version-script,"$work/versions" "$work/stubs.c"
done
"$1" -c 'import torch; print("PyTorch", torch.__version__, "on the CPU:", torch.ones(2).sum().item())'
