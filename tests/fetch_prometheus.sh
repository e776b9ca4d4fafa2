#!/bin/sh
# Puts Debian's prometheus and promtool into the folder $1 without installing them: for the tests of docker/. What is on
# the PATH is used as it is. Without apt the tests that need them are skipped, and say so.
set -eu
folder=$1
mkdir -p "$folder"
[ ! -x "$folder/promtool" ] || exit 0
if server=$(command -v prometheus) && tool=$(command -v promtool); then
    ln -sf "$server" "$folder/prometheus"
    ln -sf "$tool" "$folder/promtool"
    exit 0
fi
command -v apt-get > /dev/null && command -v dpkg-deb > /dev/null || exit 0
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
apt-get download -qq prometheus 2> /dev/null || { apt-get update -qq && apt-get download -qq prometheus; } || exit 0
dpkg-deb -x prometheus_*.deb root
mv root/usr/bin/prometheus root/usr/bin/promtool "$folder"
