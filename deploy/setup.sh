#!/bin/sh
# Installs what a fresh Debian machine lacks, and unpacks the ONNX Runtime library into .onnxruntime/.
# Rust and Python 3 are expected to be there; everything else comes from package registries. The image is built with
# it too, for another PACKAGE where a GPU is to be used.
set -eu
cd "$(dirname "$0")/.."

# onnxruntime-gpu is the library for NVIDIA GPUs, with CUDA 13 and cuDNN 9 from elsewhere.
PACKAGE="${ONNXRUNTIME_PACKAGE:-onnxruntime}"
VERSION=1.31.1
FILES="libonnxruntime.so.$VERSION"
case "$PACKAGE $(uname -m)" in
    "onnxruntime x86_64") SHA256=5752bd508126ae7c49894d3b9d2e83f0c3d487319246d04c444b393308d7ad7f ;;
    "onnxruntime aarch64") SHA256=da05378364c44d4407e463982d2bf8d5e4cfea873283757e48beeb41df97b7f3 ;;
    "onnxruntime-gpu x86_64")
        SHA256=e26c475fe361b2015f45b4b824bd13f0bb20204e59b62814e6f0acd5f3d491a6
        FILES="$FILES libonnxruntime_providers_shared.so libonnxruntime_providers_cuda.so"
        ;;
    *) echo "setup: no wheel of $PACKAGE is pinned for $(uname -m)" >&2; exit 1 ;;
esac
PLATFORM="manylinux_2_28_$(uname -m)"

missing=""
command -v cc >/dev/null || missing="$missing gcc libc6-dev"
command -v c++ >/dev/null || missing="$missing g++"
command -v curl >/dev/null || missing="$missing curl"
python3 -c 'import ensurepip, venv' 2>/dev/null || missing="$missing python3-venv"
if [ -n "$missing" ]; then
    apt-get update -qq
    # shellcheck disable=SC2086 # a list of packages
    DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $missing
fi

[ -x .venv/bin/python ] || python3 -m venv .venv

is_unpacked() {
    for file in $FILES; do
        [ -f ".onnxruntime/$file" ] || return 1
    done
}

if ! is_unpacked; then
    work="$(mktemp -d)"
    trap 'rm -rf "$work"' EXIT
    echo "$PACKAGE==$VERSION --hash=sha256:$SHA256" >"$work/requirements.txt"
    .venv/bin/python -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
        --python-version 3.11 --implementation cp --abi cp311 --platform "$PLATFORM" \
        --require-hashes -r "$work/requirements.txt" -d "$work"
    mkdir -p .onnxruntime
    # shellcheck disable=SC2086 # a list of names
    .venv/bin/python - "$work" $FILES <<'PYTHON'
import pathlib, shutil, sys, zipfile

work, *files = sys.argv[1:]
with zipfile.ZipFile(next(pathlib.Path(work).glob("*.whl"))) as wheel:
    for name in files:
        library = pathlib.Path(".onnxruntime", name)
        partial = library.with_name(f"{name}.partial")
        with wheel.open(f"onnxruntime/capi/{name}") as member, partial.open("wb") as out:
            shutil.copyfileobj(member, out)
        partial.rename(library)
PYTHON
    echo "unpacked $FILES into .onnxruntime/"
fi
