#!/usr/bin/env bash
# manifest.sh ROOT - describes every file below ROOT, in three parts: type, mode, owner, mtime, link
# count, size or target, path; then extended attributes; then the sha256 of every regular file,
# which reads every byte. Two equal descriptions are two equal trees. Fields are parted by tabs and
# the last is the path; other file systems mounted below ROOT are not entered.
set -euo pipefail
cd "$1"

# Size and link count of a directory belong to the file system, not to the image.
find . -xdev \( -type d -printf 'd\t%m\t%U:%G\t%T@\t-\t-\t%p\n' \
  -o -type l -printf 'l\t%m\t%U:%G\t%T@\t%n\t%l\t%p\n' \
  -o -type f -printf 'f\t%m\t%U:%G\t%T@\t%n\t%s\t%p\n' \
  -o -printf '%y\t%m\t%U:%G\t%T@\t%n\t-\t%p\n' \) | LC_ALL=C sort -t "$(printf '\t')" -k 7
# One line per file that has any: its attributes, then its path.
find . -xdev -print0 | LC_ALL=C sort -z |
  xargs -0r getfattr -h -d -m '^(user|security|trusted)[.]' -e hex --absolute-names -- |
  awk 'BEGIN {RS = ""; FS = "\n"} {line = "x"; for (i = 2; i <= NF; i++) line = line "\t" $i; sub(/^# file: /, "", $1); print line "\t" $1}'
find . -xdev -type f -print0 | LC_ALL=C sort -z | xargs -0r sha256sum -z | tr '\0' '\n' |
  sed -E 's/^([0-9a-f]{64}) [ *]/c\t\1\t/'
