#!/usr/bin/env bash
# containerd-go.sh VERSION - builds that containerd (as v2.0.14), its ctr and its shim from their Go
# module, once, and prints the directory they are in: releases that no Debian has. Needs Go.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../lib/common.sh"

VERSION=$1
DIR=$LAZ_CACHE/peers/containerd-go-$VERSION
PROGRAMS=(containerd ctr containerd-shim-runc-v2)
MODULE=github.com/containerd/containerd/v2

build() {
  local program
  command -v go >/dev/null || die "containerd $VERSION is built with Go, which is not here: install Go 1.21 or later"
  say "Building containerd $VERSION from its Go module (some minutes, once)"
  mkdir "$SCRATCH/module"; cd "$SCRATCH/module"
  printf 'module scratch\n\ngo 1.23.0\n\nrequire %s %s\n' "$MODULE" "$VERSION" >go.mod
  { echo 'package main'; printf 'import _ "%s"\n' "${PROGRAMS[@]/#/$MODULE/cmd/}"; } >main.go
  quietly "$SCRATCH/log" go mod tidy -e
  rm -rf "$DIR.new"; mkdir "$DIR.new"
  for program in "${PROGRAMS[@]}"; do
    quietly "$SCRATCH/log" env CGO_ENABLED=0 go build -trimpath -o "$DIR.new/$program" "$MODULE/cmd/$program"
  done
  rm -rf "$DIR"
  mv "$DIR.new" "$DIR"
}

mkdir -p "$LAZ_CACHE/peers"
exec 9>"$LAZ_CACHE/peers/containerd-go-$VERSION.lock"
flock 9
[ -x "$DIR/containerd-shim-runc-v2" ] || { make_scratch containerd-go; build; }
echo "$DIR"
