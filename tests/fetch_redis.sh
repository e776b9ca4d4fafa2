#!/bin/sh
# Puts a Debian redis-server into the folder $1 without installing it, for the tests that run on both servers.
# A redis-server on the PATH is used as it is. Without apt the tests run on Valkey alone, and say so.
set -eu
folder=$1
[ -x "$folder/redis-server" ] && exit 0
mkdir -p "$folder"
if found=$(command -v redis-server); then
    printf '#!/bin/sh\nexec %s "$@"\n' "$found" > "$folder/redis-server"
    chmod +x "$folder/redis-server"
    exit 0
fi
command -v apt-get > /dev/null && command -v dpkg-deb > /dev/null || exit 0
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
packages="redis-tools libjemalloc2 liblua5.1-0 lua-cjson lua-bitop liblzf1 libatomic1"
cd "$work"
# shellcheck disable=SC2086
apt-get download -qq $packages 2> /dev/null || { apt-get update -qq && apt-get download -qq $packages; } || exit 0
for package in *.deb; do dpkg-deb -x "$package" "$folder/root"; done
libraries=$(dirname "$(find "$folder/root" -name 'liblzf.so.1' | head -n 1)")
ln -sf redis-check-rdb "$folder/root/usr/bin/redis-server"
printf '#!/bin/sh\nLD_LIBRARY_PATH=%s exec %s "$@"\n' "$libraries" "$folder/root/usr/bin/redis-server" > "$folder/redis-server"
chmod +x "$folder/redis-server"
