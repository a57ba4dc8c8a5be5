#!/bin/sh
# Installs Debian packages for commands that are missing: deploy/apt.sh COMMAND="PACKAGE ..." ...
set -eu
missing=""
for pair; do
    command -v "${pair%%=*}" >/dev/null || missing="$missing ${pair#*=}"
done
[ -n "$missing" ] || exit 0
apt-get update -qq
# Tests start what they need by themselves, on ports of their own: no package shall start a server now.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    trap 'rm -f "$policy"' EXIT
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod +x "$policy"
fi
# shellcheck disable=SC2086 # a list of packages
DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $missing >/dev/null
