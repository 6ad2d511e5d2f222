#!/bin/sh
# Build kernels.fatbin for every GPU we support, into DIR (this folder by default). Prints ptxas' registers a kernel.
set -eu
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
out=${1:-$here}
targets=
for sm in 80 86 87 89 90 120; do targets="$targets -gencode arch=compute_$sm,code=sm_$sm"; done
# PTX: a GPU between or beyond them (sm_100, 110: Thor) compiles the nearest below it when the module is loaded.
# shellcheck disable=SC2086
exec nvcc --fatbin -O3 -Xptxas -v $targets -gencode arch=compute_90,code=compute_90 \
    -gencode arch=compute_120,code=compute_120 \
    "$here/kernels.cu" -o "$out/kernels.fatbin"
