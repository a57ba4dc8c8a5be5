#!/bin/sh
# Installs what a fresh Debian machine lacks, and unpacks the ONNX Runtime library into .onnxruntime/.
# Rust and Python 3 are expected to be there; everything else comes from package registries.
set -eu
cd "$(dirname "$0")/.."

VERSION=1.31.1
case "$(uname -m)" in
    x86_64) SHA256=5752bd508126ae7c49894d3b9d2e83f0c3d487319246d04c444b393308d7ad7f ;;
    aarch64) SHA256=da05378364c44d4407e463982d2bf8d5e4cfea873283757e48beeb41df97b7f3 ;;
    *) echo "setup: no ONNX Runtime wheel is pinned for $(uname -m)" >&2; exit 1 ;;
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

library=".onnxruntime/libonnxruntime.so.$VERSION"
if [ ! -f "$library" ]; then
    work="$(mktemp -d)"
    trap 'rm -rf "$work"' EXIT
    echo "onnxruntime==$VERSION --hash=sha256:$SHA256" >"$work/requirements.txt"
    .venv/bin/python -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
        --python-version 3.11 --implementation cp --abi cp311 --platform "$PLATFORM" \
        --require-hashes -r "$work/requirements.txt" -d "$work"
    mkdir -p .onnxruntime
    .venv/bin/python - "$work" "$library" <<'PYTHON'
import pathlib, sys, zipfile

work, library = map(pathlib.Path, sys.argv[1:])
member = f"onnxruntime/capi/{library.name}"
partial = library.with_suffix(".partial")
with zipfile.ZipFile(next(work.glob("*.whl"))) as wheel:
    partial.write_bytes(wheel.read(member))
partial.rename(library)
PYTHON
    echo "unpacked $library"
fi
