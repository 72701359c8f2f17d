#!/usr/bin/env bash
# stargz.sh - gets stargz-snapshotter once: the daemon built from its Go module, ctr-remote from
# Debian. Prints the directory they are in.
# The module proxy has the library but not the commands (a nested module that was never tagged), and
# Debian has ctr-remote but not the daemon. So stargzd.go here is a main that serves the library's
# snapshotter with its own default configuration, and nothing else.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../lib/common.sh"

VERSION=v0.18.2
BIN=$LAZ_CACHE/peers/bin
SOURCE=$REPO/tests/peers/stargzd.go
KEY=$VERSION-$(cat "$SOURCE" "${BASH_SOURCE[0]}" | sha256sum | cut -c1-16)

have() { [ "$(cat "$BIN/.stargz" 2>/dev/null)" = "$KEY" ] && [ -x "$BIN/containerd-stargz-grpc" ] && [ -x "$BIN/ctr-remote" ]; }

build_daemon() {
  # Go 1.21 and later fetch the toolchain that a module asks for through the module proxy.
  command -v go >/dev/null || die "stargz-snapshotter is built with Go, which is not here: install Go 1.21 or later"
  say "Building stargz-snapshotter $VERSION from its Go module (a few minutes, once)"
  mkdir "$SCRATCH/daemon"; cd "$SCRATCH/daemon"
  cp "$SOURCE" main.go
  printf 'module scratch\n\ngo 1.25.0\n\nrequire github.com/containerd/stargz-snapshotter %s\n' "$VERSION" >go.mod
  quietly "$SCRATCH/log" go mod tidy
  quietly "$SCRATCH/log" env CGO_ENABLED=0 go build -trimpath -o "$BIN/containerd-stargz-grpc" .
}

unpack_ctr_remote() {
  mkdir "$SCRATCH/debian"; cd "$SCRATCH/debian"
  quietly "$SCRATCH/log" apt-get -q -o APT::Sandbox::User=root download stargz-snapshotter
  dpkg-deb -x stargz-snapshotter_*.deb root
  install -m 755 root/usr/bin/ctr-remote "$BIN/ctr-remote"
}

mkdir -p "$BIN"
exec 9>"$LAZ_CACHE/peers/stargz.lock"
flock 9
have || {
  make_scratch stargz
  build_daemon
  unpack_ctr_remote
  echo "$KEY" >"$BIN/.stargz"
}
echo "$BIN"
