#!/usr/bin/env bash
# runc-go.sh - builds a runc that maps the owners of mounts, from its Go module, once, and prints the directory
# it is in. CRI gives its own files to a pod in a user namespace that way; Debian 12's runc cannot. Exits with
# 3 where there is no Go.
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
. "$here/../lib/common.sh"
. "$here/../lib/go.sh"

VERSION=v1.3.3
MODULE=github.com/opencontainers/runc

build() {
  printf 'module scratch\n\ngo 1.23.0\n\nrequire %s %s\n' "$MODULE" "$VERSION" >go.mod
  printf 'package main\nimport _ "%s"\n' "$MODULE" >main.go
  quietly "$SCRATCH/log" go mod tidy -e
  quietly "$SCRATCH/log" env CGO_ENABLED=1 go build -trimpath -tags seccomp -o "$SCRATCH/runc" "$MODULE"
}

built_once runc "$VERSION"
