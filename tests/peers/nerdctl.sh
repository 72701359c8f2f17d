#!/usr/bin/env bash
# nerdctl.sh - builds nerdctl once from its Go module, and prints the directory it is in. Exits with 3
# where there is no Go.
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
. "$here/../lib/common.sh"
. "$here/../lib/go.sh"

VERSION=v2.3.5
MODULE=github.com/containerd/nerdctl

build() {
  # A helper of nerdctl's tests, which the program contains, names a type of a module that no proxy
  # has. This one stands in for it; the program never uses it.
  mkdir -p tigron/tig
  printf 'module %s/mod/tigron\n\ngo 1.23\n' "$MODULE" >tigron/go.mod
  printf 'package tig\n\ntype T interface {\n\tLog(args ...any)\n\tFailNow()\n}\n' >tigron/tig/tig.go
  printf 'module scratch\n\ngo 1.26.0\n\nrequire %s/v2 %s\n\nreplace %s/mod/tigron => ./tigron\n' "$MODULE" "$VERSION" "$MODULE" >go.mod
  quietly "$SCRATCH/log" env CGO_ENABLED=0 go build -mod=mod -trimpath -o "$SCRATCH/nerdctl" "$MODULE/v2/cmd/nerdctl"
}

built_once nerdctl "$VERSION"
