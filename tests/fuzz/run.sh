#!/bin/sh
# Fuzzes each target for FUZZ_SECONDS (15 by default), or only the targets that are named:
#     FUZZ_SECONDS=3600 tests/fuzz/run.sh rest_body
# A run begins with seeds/ and with what earlier runs have found worth keeping in target/fuzz/corpus. An input that
# fails is written to target/fuzz/artifacts; `target/debug/<target> <file>` fails with it again.
set -eu
cd "$(dirname "$0")/../.."

SECONDS_EACH="${FUZZ_SECONDS:-15}"
TARGETS="rest_body binary_header raw_request protobuf compressed_body model_config other_shapes texts"
[ $# -eq 0 ] || TARGETS="$*"

bins=""
for target in $TARGETS; do
    bins="$bins --bin $target"
done
# As in every build for tests, integer overflow and the server's own assertions count as failures.
# shellcheck disable=SC2086 # a list of options
RUSTC_WORKSPACE_WRAPPER="$PWD/tests/fuzz/rustc.sh" CARGO_PROFILE_DEV_OPT_LEVEL=1 \
    cargo build --locked --workspace $bins

mkdir -p target/fuzz/artifacts
for target in $TARGETS; do
    corpus="target/fuzz/corpus/$target"
    log="target/fuzz/$target.log"
    mkdir -p "$corpus"
    words=""
    [ ! -f "tests/fuzz/dictionaries/$target" ] || words="-dict=tests/fuzz/dictionaries/$target"
    # No input is worth more than a few milliseconds; one that takes seconds has found something too.
    # shellcheck disable=SC2086 # an option or none
    if "target/debug/$target" "$corpus" "tests/fuzz/seeds/$target" $words -max_total_time="$SECONDS_EACH" \
        -artifact_prefix="target/fuzz/artifacts/$target-" -max_len=16384 -timeout=10 -rss_limit_mb=512 >"$log" 2>&1; then
        done="$(sed -n 's/^#\([0-9]*\)\tDONE *cov: \([0-9]*\).*/\1 inputs, \2 branches reached/p' "$log")"
        echo "fuzz: $target: $done"
    else
        grep -v '^NEW_FUNC\|NEW  \|REDUCE\|pulse' "$log" | tail -n 40 >&2
        echo "fuzz: $target failed; all of it is in $log" >&2
        exit 1
    fi
done
