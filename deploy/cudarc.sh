#!/bin/sh
# Calls the compiler, as cargo has it with RUSTC_WRAPPER, for deploy/cuda.sh: with the crate cudarc opening NVIDIA's
# libraries when they are first needed. candle asks for one that is linked to them, which starts on no machine without
# a GPU's driver, and cargo lets nobody take a feature away. What was compiled without this is not compiled anew for it:
# `cargo clean -p cudarc` before.
if [ "${CARGO_PKG_NAME:-}" = cudarc ]; then
    for argument do
        shift
        [ "$argument" != 'feature="dynamic-linking"' ] || argument='feature="dynamic-loading"'
        set -- "$@" "$argument"
    done
fi
exec "$@"
