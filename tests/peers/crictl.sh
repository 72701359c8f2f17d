#!/usr/bin/env bash
# crictl.sh - builds crictl, the client of CRI, once from its Go module, and prints the directory it is
# in. Exits with 3 where there is no Go.
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
. "$here/../lib/common.sh"
. "$here/../lib/go.sh"

VERSION=v1.36.0

build() {
  printf 'module scratch\n\ngo 1.26.0\n\nrequire sigs.k8s.io/cri-tools %s\n' "$VERSION" >go.mod
  quietly "$SCRATCH/log" env CGO_ENABLED=0 go build -mod=mod -trimpath -o "$SCRATCH/crictl" sigs.k8s.io/cri-tools/cmd/crictl
}

built_once crictl "$VERSION"
