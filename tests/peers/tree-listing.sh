#!/bin/sh
# Prints all that a layer can say of the tree at $1, one line a fact, sorted: kind, mode,
# owners, size, links, times, targets, devices, contents, extended attributes. What a
# conversion adds (TOC, landmarks) and what depends on it (the root directory's own times
# and link count, directory sizes) is left out.
set -eu
cd "$1"
ours='-name stargz.index.json -o -name .prefetch.landmark -o -name .no.prefetch.landmark'
{
    # shellcheck disable=SC2086
    find . -mindepth 1 -type d -printf 'dir %p %m %U:%G %T@\n'
    # shellcheck disable=SC2086
    find . -mindepth 1 ! -type d ! \( $ours \) -printf '%y %p %m %U:%G %s %n %T@ %l\n'
    # shellcheck disable=SC2086
    find . -type f ! \( $ours \) -print0 | xargs -0r sha256sum
    find . \( -type b -o -type c \) -print0 | xargs -0r stat -c 'device %n %t:%T'
    getfattr -R -P -h -d -m - . 2>/dev/null | awk '/^# file: /{name=$0; next} NF{print "xattr", name, $0}'
    # Names of one file, as the first of them.
    # shellcheck disable=SC2086
    find . -type f -links +1 ! \( $ours \) -printf '%i %p\n' | sort -k2 |
        awk '{if (!($1 in first)) first[$1]=$2; print "link", $2, first[$1]}'
} | LC_ALL=C sort
