#!/bin/sh
# Puts a Debian redis-server, and strace, into the folder $1 without installing them: for the tests that run on both
# servers and for those that count fsyncs. What is on the PATH is used as it is. Without apt these tests are left out,
# and the header of the test run says so.
set -eu
folder=$1
mkdir -p "$folder"
wanted=""
if [ ! -x "$folder/redis-server" ]; then
    if found=$(command -v redis-server); then
        printf '#!/bin/sh\nexec %s "$@"\n' "$found" > "$folder/redis-server"
        chmod +x "$folder/redis-server"
    else
        wanted="redis-tools libjemalloc2 liblua5.1-0 lua-cjson lua-bitop liblzf1 libatomic1"
    fi
fi
command -v strace > /dev/null || [ -x "$folder/strace" ] || wanted="$wanted strace libunwind8"
[ -n "$wanted" ] || exit 0
command -v apt-get > /dev/null && command -v dpkg-deb > /dev/null || exit 0
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
# shellcheck disable=SC2086
apt-get download -qq $wanted 2> /dev/null || { apt-get update -qq && apt-get download -qq $wanted; } || exit 0
for package in *.deb; do dpkg-deb -x "$package" "$folder/root"; done
wrap() { # name, program
    printf '#!/bin/sh\nLD_LIBRARY_PATH=%s exec %s "$@"\n' "$libraries" "$folder/root/usr/bin/$2" > "$folder/$1"
    chmod +x "$folder/$1"
}
libraries=$(find "$folder/root/usr/lib" -name '*.so.*' -printf '%h\n' | sort | uniq -c | sort -rn | awk 'NR == 1 {print $2}')
case $wanted in *redis*) ln -sf redis-check-rdb "$folder/root/usr/bin/redis-server" && wrap redis-server redis-server ;; esac
case $wanted in *strace*) wrap strace strace ;; esac
