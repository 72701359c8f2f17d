#!/usr/bin/env bash
# stargz.test.sh - images converted by laz, read by stargz-snapshotter: its daemon mounts them lazily
# under Debian's containerd, and Debian's ctr-remote pulls and runs them. Needs root. Ends with
# "N passed, M failed".
#
# Everything listens on sockets in a scratch directory, and is ended and unmounted at the end.
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
. "$here/../lib/common.sh"
. "$here/../lib/registry.sh"
. "$here/../lib/laz.sh"
. "$here/../lib/checks.sh"

# daemon NAME SOCKET COMMAND...: starts it and waits for its socket.
daemon() {
  local name=$1 socket=$2; shift 2
  "$@" >"$SCRATCH/$name.log" 2>&1 &
  at_exit stop_pid "$!"
  wait_for 120 "$name" test -S "$socket" || { tail -n 5 "$SCRATCH/$name.log" >&2; die "$name does not start"; }
}

start_stargz() {
  local dir=$SCRATCH/c
  mkdir -p "$dir" "$SCRATCH/stargz"
  cat >"$dir/config.toml" <<CONFIG
version = 2
root = "$dir/root"
state = "$dir/state"
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.internal.v1.opt"]
[grpc]
address = "$dir/containerd.sock"
[proxy_plugins.stargz]
type = "snapshot"
address = "$SCRATCH/stargz.sock"
CONFIG
  daemon stargz "$SCRATCH/stargz.sock" "$BIN/containerd-stargz-grpc" "$SCRATCH/stargz.sock" "$SCRATCH/stargz"
  daemon containerd "$dir/containerd.sock" containerd --config "$dir/config.toml"
  CTR=("$BIN/ctr-remote" --address "$dir/containerd.sock")
}

# check NAME TAG: the converted image runs under stargz-snapshotter, from lazy mounts.
check() {
  local image=$REGISTRY/$1:$2 out
  if ! "${CTR[@]}" images rpull --plain-http "$image" >"$SCRATCH/rpull" 2>&1; then
    bad "ctr-remote pulls $1:$2" "$(tail -n 2 "$SCRATCH/rpull")"; return
  fi
  ok "ctr-remote pulls $1:$2"
  out=$("${CTR[@]}" run --rm --cgroup "$CGROUP/$2" --snapshotter=stargz "$image" "test-$$-$2" sh -c 'cat /etc/debian_version && sha256sum /bin/bash' 2>&1) || true
  if [ "$out" = "$(laz run "$image" sh -c 'cat /etc/debian_version && sha256sum /bin/bash')" ]; then
    ok "$1:$2 reads the same under stargz-snapshotter and laz"
  else bad "$1:$2 reads the same under stargz-snapshotter and laz" "$out"; fi
  if grep -q "$SCRATCH/stargz.*fuse" /proc/mounts; then ok "stargz-snapshotter mounts $1:$2 lazily"
  else bad "stargz-snapshotter mounts $1:$2 lazily" "no FUSE mount of it"; fi
}

is_root || { say "SKIPPED (needs root): stargz.test.sh"; echo "0 passed, 1 failed"; exit 1; }
PATH=$PATH:/usr/local/go/bin
if ! command -v go >/dev/null; then
  say "SKIPPED (needs Go 1.21 or later, which Debian 12 has not): stargz.test.sh"
  echo "0 passed, 0 failed"
  exit 0
fi
BIN=$("$here/stargz.sh")
make_scratch stargz-test
at_exit end_own_cgroups
build_laz
start_registry "$SCRATCH/registry"
read -r _ layout < <("$here/../images/build.sh" debian)
push_layout "$layout" debian debian:gzip
use_fresh_store "$SCRATCH/laz"
printf 'usr/bin/bash\nusr/bin/cat\n' >"$SCRATCH/first"
laz image convert --to estargz "$REGISTRY/debian:gzip" "$REGISTRY/debian:esgz" 2>/dev/null
laz image convert --to estargz --prioritize "$SCRATCH/first" "$REGISTRY/debian:gzip" "$REGISTRY/debian:first" 2>/dev/null
laz image convert --to zstd-chunked --zstd-flavour stargz --prioritize "$SCRATCH/first" \
  "$REGISTRY/debian:esgz" "$REGISTRY/debian:zstd" 2>/dev/null
digest() { skopeo inspect --raw --tls-verify=false "docker://$REGISTRY/$1" | sha256sum; }
if [ "$(digest debian:esgz)" != "$(digest debian:first)" ]; then ok '--prioritize changes the image'
else bad '--prioritize changes the image' 'both are the same manifest'; fi
start_stargz
for tag in esgz first zstd; do check debian "$tag"; done
summary
