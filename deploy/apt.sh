#!/bin/sh
# Installs Debian packages for commands that are missing: deploy/apt.sh COMMAND=PACKAGE ...
set -eu
missing=""
for pair; do
    command -v "${pair%%=*}" >/dev/null || missing="$missing ${pair#*=}"
done
[ -n "$missing" ] || exit 0
apt-get update -qq
# shellcheck disable=SC2086 # a list of packages
DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $missing >/dev/null
