#!/usr/bin/env bash
# runc-go.sh - builds a runc that maps the owners of mounts, from its Go module, once, and prints the directory
# it is in. CRI gives its own files to a pod in a user namespace that way; Debian 12's runc cannot. Exits with
# 3 where there is no Go.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../lib/common.sh"

VERSION=v1.3.3
BIN=$LAZ_CACHE/peers/runc-go-$VERSION
MODULE=github.com/opencontainers/runc

command -v go >/dev/null || { say "runc $VERSION is built with Go, which is not here: install Go 1.21 or later"; exit 3; }
mkdir -p "$LAZ_CACHE/peers"
exec 9>"$LAZ_CACHE/peers/runc-go.lock"
flock 9
if [ ! -x "$BIN/runc" ]; then
  make_scratch runc-go
  say "Building runc $VERSION from its Go module (a minute, once)"
  cd "$SCRATCH"
  printf 'module scratch\n\ngo 1.23.0\n\nrequire %s %s\n' "$MODULE" "$VERSION" >go.mod
  printf 'package main\nimport _ "%s"\n' "$MODULE" >main.go
  quietly "$SCRATCH/log" go mod tidy -e
  quietly "$SCRATCH/log" env CGO_ENABLED=1 go build -trimpath -tags seccomp -o "$SCRATCH/runc" "$MODULE"
  mkdir -p "$BIN"
  mv "$SCRATCH/runc" "$BIN/runc"
fi
echo "$BIN"
