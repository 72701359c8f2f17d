#!/usr/bin/env bash
# crictl.sh - builds crictl, the client of CRI, once from its Go module, and prints the directory it is
# in. Exits with 3 where there is no Go: Debian 12's is too old.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../lib/common.sh"

VERSION=v1.36.0
BIN=$LAZ_CACHE/peers/crictl-$VERSION

command -v go >/dev/null || { say "crictl is built with Go, which is not here: install Go 1.21 or later"; exit 3; }
mkdir -p "$LAZ_CACHE/peers"
exec 9>"$LAZ_CACHE/peers/crictl.lock"
flock 9
if [ ! -x "$BIN/crictl" ]; then
  make_scratch crictl
  say "Building crictl $VERSION from its Go module (a few minutes, once)"
  # Go 1.21 and later fetch the toolchain that a module asks for through the module proxy. A module that
  # names the version needs no list of versions, which not every proxy has.
  cd "$SCRATCH"
  printf 'module scratch\n\ngo 1.26.0\n\nrequire sigs.k8s.io/cri-tools %s\n' "$VERSION" >go.mod
  quietly "$SCRATCH/log" env CGO_ENABLED=0 go build -mod=mod -trimpath -o "$SCRATCH/crictl" sigs.k8s.io/cri-tools/cmd/crictl
  mkdir -p "$BIN"
  mv "$SCRATCH/crictl" "$BIN/crictl"
fi
echo "$BIN"
