#!/bin/sh
# Runs a command that compiles the feature cuda: deploy/cuda.sh cargo build --release --features cuda
#
# It takes the nvcc of the PATH. Where there is none, NVIDIA's compiler comes from the Python registry into .venv/cuda/:
# 100 MB, under NVIDIA's licence. Neither a GPU nor its driver is needed.
#
# Kernels are for GPUs of the compute capability in CUDA_COMPUTE_CAP (86 for 8.6) and all later ones: by default that of
# the first GPU here, and without one 80.
set -eu
cd "$(dirname "$0")/.."

# All of one CUDA, which is also that of the package onnxruntime-gpu; drivers from 580 on have it.
REQUIREMENTS="\
nvidia-cuda-nvcc==13.0.88 --hash=sha256:56fe502eb77625a12f25172caa3cdddb4e4c8ba2c8c17dba44b164761b380f03
nvidia-cuda-crt==13.0.88 --hash=sha256:2c8043c7c9e02492716426e9919fc78d2c5b3b2a7a768a88e952676b08aa55a4
nvidia-nvvm==13.0.88 --hash=sha256:c5f41ffeb6466944a026dfa5317d7d85355c119bbec279205d22f1869d1054e0
nvidia-cuda-runtime==13.0.96 --hash=sha256:7f82250d7782aa23b6cfe765ecc7db554bd3c2870c43f3d1821f1d18aebf0548
nvidia-cuda-cccl==13.0.85 --hash=sha256:e0da7ad981f3a8aff08241b5bfc1af868742a63e2762f53a5171c492ef242649"
PLACE=.venv/cuda

if ! command -v nvcc >/dev/null; then
    if [ "$(cat "$PLACE/requirements.txt" 2>/dev/null)" != "$REQUIREMENTS" ]; then
        [ "$(uname -m)" = x86_64 ] || { echo "cuda: install nvcc; no wheels of it are pinned for $(uname -m)" >&2; exit 1; }
        [ -x .venv/bin/python ] || { echo "cuda: run deploy/setup.sh first" >&2; exit 1; }
        rm -rf "$PLACE" "$PLACE.partial"
        mkdir "$PLACE.partial"
        echo "$REQUIREMENTS" >"$PLACE.partial/requirements.txt"
        .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --only-binary=:all: --no-compile \
            --require-hashes -r "$PLACE.partial/requirements.txt" --target "$PLACE.partial"
        mv "$PLACE.partial" "$PLACE"
        echo "installed nvcc into $PLACE/"
    fi
    PATH="$PWD/$PLACE/nvidia/cu13/bin:$PATH"
fi
nvcc="$(command -v nvcc)"

# candle's kernels ask for the library cudart, which the linker would take from any shared library of that name: the
# binary would then start on no machine without it. The linker looks here first, and finds the static one. A release
# build is rid of it again, since only kernels for quantized weights need it, and none is used here.
link="$PWD/target/cuda"
root="$(dirname "$(dirname "$(readlink -f "$nvcc")")")"
static=""
for folder in "$root/lib64" "$root/lib" "$root/targets/$(uname -m)-linux/lib" "/usr/lib/$(uname -m)-linux-gnu"; do
    [ -n "$static" ] || [ ! -f "$folder/libcudart_static.a" ] || static="$folder/libcudart_static.a"
done
[ -n "$static" ] || { echo "cuda: no libcudart_static.a beside $nvcc" >&2; exit 1; }
mkdir -p "$link"
ln -sf "$static" "$link/libcudart.a"
export PATH LIBRARY_PATH="$link${LIBRARY_PATH:+:$LIBRARY_PATH}"
export RUSTC_WRAPPER="$PWD/deploy/cudarc.sh"

if [ -z "${CUDA_COMPUTE_CAP:-}" ]; then
    unset CUDA_COMPUTE_CAP
    nvidia-smi >/dev/null 2>&1 || export CUDA_COMPUTE_CAP=80
fi
exec "$@"
