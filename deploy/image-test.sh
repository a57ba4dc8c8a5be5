#!/bin/bash
# Builds the Dockerfile without a container engine and serves from the image, as its user and with its settings.
#
# The base and the build image are made here: a minimal Debian of the machine's own release and mirrors, and the same
# with a C compiler and the machine's Rust toolchain. What cargo and pip need to reach their registries from this
# machine (mirrors, proxies, certificates) is handed into the build image, and none of it into the image that is built.
# Everything lies in target/image-test and is removed at the end; IMAGE_TEST_KEEP=1 keeps it, to look around in or to
# start the next run from.
set -euo pipefail
cd "$(dirname "$0")/.."

LIMIT=80000000
WORK="$PWD/target/image-test"
IMAGE=localhost/tidegate
BASE=localhost/tidegate-base
BUILD=localhost/tidegate-build

[ "$(id -u)" = 0 ] || { echo "image-test: root is needed, to make a Debian and to change into it" >&2; exit 1; }
# shellcheck source=/dev/null
. /etc/os-release

deploy/apt.sh buildah=buildah debootstrap=debootstrap curl=curl ip=iproute2

storage=(--root "$WORK/storage" --runroot "$WORK/run" --storage-driver vfs)
buildah() { command buildah "${storage[@]}" "$@"; }

server=""
clean_up() {
    local status=$?
    trap - EXIT
    if [ -n "$server" ]; then kill -KILL "$server" 2>/dev/null || true; fi
    # Removing a folder would remove what is mounted into it, which is the machine's own.
    local mounted
    mapfile -t mounted < <(awk -v work="$WORK/" 'index($5, work) == 1 { print $5 }' /proc/self/mountinfo | sort -r)
    for place in "${mounted[@]}"; do umount "$place" || { echo "image-test: $place stays mounted" >&2; exit 1; }; done
    if [ -n "${IMAGE_TEST_KEEP:-}" ]; then buildah rm --all >/dev/null 2>&1 || true; else rm -rf "$WORK"; fi
    exit "$status"
}
trap clean_up EXIT
trap 'exit 130' INT TERM
mkdir -p "$WORK"

stage() { echo "== $* ($SECONDS s)"; }
fail() { echo "image-test: $*" >&2; exit 1; }

has_image() { buildah images --quiet "$1" >/dev/null 2>&1; }

make_base() {
    local mirror container
    mirror="$(apt-get indextargets --format '$(REPO_URI)' 'Identifier: Packages' "Codename: $VERSION_CODENAME" \
        'Origin: Debian' | sed -n 1p)"
    [ -n "$mirror" ] || fail "apt knows no mirror of $VERSION_CODENAME; run apt-get update"
    rm -rf "$WORK/debian"
    debootstrap --variant=minbase "$VERSION_CODENAME" "$WORK/debian" "$mirror" >"$WORK/debootstrap.log" 2>&1 \
        || { tail "$WORK/debootstrap.log" >&2; fail "debootstrap failed"; }
    rm -rf "$WORK"/debian/var/cache/apt/* "$WORK"/debian/var/lib/apt/lists/*
    tar --create --file "$WORK/debian.tar" --directory "$WORK/debian" --exclude './dev/*' .
    rm -rf "$WORK/debian"
    container="$(buildah from scratch)"
    buildah add --quiet "$container" "$WORK/debian.tar" / >/dev/null
    rm "$WORK/debian.tar"
    buildah commit --quiet --rm --format docker "$container" "$BASE" >/dev/null
}

make_build_image() {
    local container name
    apt-config dump Acquire >"$WORK/apt.conf"
    container="$(buildah from --pull-never "$BASE")"
    buildah add --quiet "$container" "$WORK/apt.conf" /etc/apt/apt.conf.d/99machine >/dev/null
    buildah run --isolation chroot "$container" -- sh -ec '
        apt-get update -qq
        DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends \
            ca-certificates curl g++ python3 python3-venv' >"$WORK/apt.log" 2>&1 \
        || { tail "$WORK/apt.log" >&2; fail "apt-get failed in the build image"; }
    if [ -f /etc/pip.conf ]; then buildah add --quiet "$container" /etc/pip.conf /etc/pip.conf >/dev/null; fi
    for name in $(compgen -e); do
        case "$name" in
            CARGO_HOME | CARGO_TARGET_DIR | CARGO_MANIFEST_* | CARGO_PKG_* | CARGO_MAKEFLAGS) ;;
            CARGO_* | PIP_* | SSL_* | CURL_* | REQUESTS_*) buildah config --env "$name=${!name}" "$container" ;;
        esac
    done
    # The toolchain and cargo's own folder are mounted there while the image is built.
    buildah config --env CARGO_HOME=/cargo \
        --env "PATH=/rust/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin" "$container"
    buildah commit --quiet --rm --format docker "$container" "$BUILD" >/dev/null
}

if ! has_image "$BASE"; then stage "making the base"; make_base; fi
if ! has_image "$BUILD"; then stage "making the build image"; make_build_image; fi

stage "building the image"
buildah bud --isolation chroot --format docker --pull-never --tag "$IMAGE" \
    --build-arg "BUILD_IMAGE=$BUILD" --build-arg "BASE_IMAGE=$BASE" \
    --volume "$(rustc --print sysroot):/rust:ro" --volume "${CARGO_HOME:-$HOME/.cargo}:/cargo" \
    --volume /etc/ssl/certs:/etc/ssl/certs:ro . >"$WORK/build.log" 2>&1 \
    || { tail -n 40 "$WORK/build.log" >&2; fail "the image could not be built"; }

stage "reading its settings"
buildah inspect --type image "$IMAGE" >"$WORK/image.json"
# Prints one setting, a line for each of its values.
setting() {
    python3 -c '
import json, sys
value = json.load(open(sys.argv[1]))["Docker"]["config"]
for key in sys.argv[2:]:
    value = (value or {}).get(key)
for line in value if isinstance(value, (list, dict)) else [value or ""]:
    print(line)' "$WORK/image.json" "$@"
}
user="$(setting User)"
[[ "$user" =~ ^[1-9][0-9]*:[1-9][0-9]*$ ]] || fail "the image's user is '$user', not numbers other than root's"
mapfile -t health < <(setting Healthcheck Test)
[ "${health[0]}" = CMD ] || fail "the image has no HEALTHCHECK that is a command"
mapfile -t command < <(setting Entrypoint && setting Cmd)
mapfile -t environment < <(setting Env)
folder="$(setting WorkingDir)"
stop="$(setting StopSignal)"
ports="$(setting ExposedPorts)"
for port in 8000/tcp 8001/tcp 8002/tcp; do
    grep --quiet --line-regexp "$port" <<<"$ports" || fail "port $port is not exposed"
done

base="$(buildah from --pull-never "$BASE")"
container="$(buildah from --pull-never "$IMAGE")"
bytes() { du --summarize --apparent-size --block-size=1 "$(buildah mount "$1")" | cut -f 1; }
added=$(($(bytes "$container") - $(bytes "$base")))
[ "$added" -le "$LIMIT" ] || fail "the layers add $added bytes to the base, more than $LIMIT"

stage "serving from it"
root="$(buildah mount "$container")"
mkdir -p "$root/proc" "$root/dev" "$root/models"
# Mounts and ports of its own: nothing is left behind, and nothing that listens on the machine is in the way. The
# shells replace themselves, so that the process keeps its number.
# shellcheck disable=SC2016 # for the inner shell
unshare --mount --net sh -euc '
    root="$1" user="$2" folder="$3" models="$4"
    shift 4
    ip link set lo up
    mount --bind "$models" "$root/models"
    mount -o remount,bind,ro "$root/models"
    mount -t proc proc "$root/proc"
    mount --rbind /dev "$root/dev"
    exec chroot --userspec="$user" "$root" env --ignore-environment --chdir="$folder" "$@"
' sh "$root" "$user" "$folder" "$PWD/models" "${environment[@]}" "${command[@]}" >"$WORK/server.log" 2>&1 &
server=$!

inside() { nsenter --target "$server" --net --mount --root --setuid "${user%:*}" --setgid "${user#*:}" -- "$@"; }
started=$SECONDS
until inside "${health[@]:1}" >"$WORK/health.log" 2>&1; do
    kill -0 "$server" 2>/dev/null || { cat "$WORK/server.log" >&2; fail "the server has ended"; }
    [ $((SECONDS - started)) -lt 60 ] || { cat "$WORK"/{server,health}.log >&2; fail "it did not become healthy"; }
    sleep 0.2
done
echo "healthy: $(cat "$WORK/health.log")"

answer="$(nsenter --target "$server" --net -- curl --silent --show-error --fail --max-time 10 \
    --data @models/iris/request.json http://127.0.0.1:8000/v2/models/iris/infer)"
python3 -c '
import json, sys
outputs = {output["name"]: output["data"] for output in json.loads(sys.argv[1])["outputs"]}
assert outputs["label"] == [0, 1, 2], outputs' "$answer" || fail "the prediction was $answer"
echo "predicted: $answer"

kill -s "$stop" "$server"
status=0
wait "$server" || status=$?
server=""
[ "$status" -eq 0 ] || { cat "$WORK/server.log" >&2; fail "the server ended with $status after $stop"; }

stage "passed"
printf 'image-test: passed; user %s; the layers add %d.%02d MB to the base, of %d MB allowed\n' \
    "$user" $((added / 1000000)) $((added % 1000000 / 10000)) $((LIMIT / 1000000))
