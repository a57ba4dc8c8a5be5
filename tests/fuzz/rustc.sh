#!/bin/sh
# Stands in for rustc: compiles the server and the fuzz targets so that the fuzzer sees which code an input reaches.
set -eu
rustc="$1"
shift
case " $* " in
    # Run by cargo, without a fuzzer to report to.
    *" --crate-name build_script_"*) exec "$rustc" "$@" ;;
esac
exec "$rustc" "$@" -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares
