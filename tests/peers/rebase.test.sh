#!/usr/bin/env bash
# rebase.test.sh - layers of an image that a real containerd 2.2 unpacks at the same time, into our snapshots:
# it makes them on nothing and says what they lie on when it commits them (the capability "rebase"). What comes of
# it is compared with what the same containerd makes of the image one layer after another with a snapshotter of
# its own: names, attributes, bytes, and what a layer deletes of those below. Needs root, and Go unless
# CONTAINERD22=directory has containerd 2.2, ctr and the shim. Ends with "N passed, M failed".
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
. "$here/../lib/common.sh"
. "$here/../lib/registry.sh"
. "$here/../lib/laz.sh"
. "$here/../lib/checks.sh"
. "$here/../lib/grpc.sh"
. "$here/../lib/lazd.sh"

VERSION=v2.2.9
PARALLEL='s/^  capabilities = .*/  capabilities = ["remap-ids", "rebase"]/
/^# What ctr and nerdctl pull/i [debug]\n  level = "debug"\n[plugins."io.containerd.transfer.v1.local"]\n  max_concurrent_unpacks = 4'
# The same, where containerd does not say which image a layer is of.
PLAIN=$PARALLEL'
s/enable_remote_snapshot_annotations = "true"/enable_remote_snapshot_annotations = "false"/'

# tree SNAPSHOTTER: the image that is there, as a container sees it; only one is.
tree() {
  local top command at=$DIR/look snapshots=("${CTR[@]}" snapshots --snapshotter "$1")
  top=$("${snapshots[@]}" ls | awk 'NR > 1 {if (NF == 3) lower[$2]; if ($NF == "Committed") all[$1]}
    END {for (name in all) if (!(name in lower)) print name}')
  mkdir -p "$at"
  # Not a view: of one nobody says to containerd that it is wanted, and it may collect it.
  "${snapshots[@]}" prepare look "$top" >/dev/null
  command=$("${snapshots[@]}" mounts "$at" look)
  # The root directory's own times are those of the unpacking.
  bash -ec "$command" && "$here/../lib/manifest.sh" "$at" | grep -v "$(printf '\t')\.\$"
  umount "$at"
  "${snapshots[@]}" rm look
}

# is_right WHAT TAG
is_right() {
  tree lazarette >"$SCRATCH/tree" || true
  if cmp -s "$SCRATCH/tree" "$SCRATCH/expected.$2"; then ok "$1"
  else bad "$1" "$(diff "$SCRATCH/expected.$2" "$SCRATCH/tree" | head -n 6)"; fi
}

# expect TAG: makes $SCRATCH/expected.TAG.
expect() {
  local image=$REGISTRY/python:$1
  works "containerd unpacks $1 by itself" "${CTR[@]}" images pull --local --plain-http --snapshotter overlayfs "$image"
  tree overlayfs >"$SCRATCH/expected.$1"
  works 'and removes it' "${CTR[@]}" images rm --sync "$image"
}

# unpacks TAG LAZY: at the same time, but for the LAZY lowest layers.
unpacks() {
  local image=$REGISTRY/python:$1
  : >"$DIR/c/log"
  works "pulls $1" "${CTR[@]}" images pull --plain-http --snapshotter lazarette "$image"
  equal "$1: containerd unpacked at the same time" "$(grep -ac 'image unpacked.*parallel=true' "$DIR/c/log" || true)" 1
  equal "$1: layers that are lazy, and all" "$(lazy_mounts) $(remote_snapshots) $(snapshots | grep -cw Committed)" "$2 $2 3"
  is_right "$1: is what it is" "$1"
  stop_pid "$LAZD_PID"
  start_lazd snapshotter.sock
  reconnected
  is_right "$1: is that after a restart of lazd" "$1"
  equal "$1: runs" "$("${CTR[@]}" run --rm --cgroup "$CGROUP/$1" --snapshotter lazarette "$image" "test-$$-$1" sh -c "$SUM" 2>/dev/null)" "$EXPECTED_SUM"
  works "removes $1" "${CTR[@]}" images rm --sync "$image"
  nothing_left "$1"
}

# of_kubelet: by CRI, which says which image a layer is of and then unpacks one layer after another.
of_kubelet() {
  local plain=("${CTR[@]}") name
  CTR+=(--namespace k8s.io)
  works 'CRI pulls' cri_pull "$REGISTRY/python:esgz"
  equal 'CRI: every layer is lazy' "$(lazy_mounts) $(remote_snapshots)" '3 3'
  # Lazy layers do not show what eStargz has put beside the files.
  grep -vE "$(printf '\t')\./(\.(no\.)?prefetch\.landmark|stargz\.index\.json)\$" "$SCRATCH/expected.esgz" >"$SCRATCH/expected.lazy"
  is_right 'CRI: it is what it is' lazy
  for name in $("${CTR[@]}" images ls -q); do "${CTR[@]}" images rm --sync "$name" >/dev/null; done
  nothing_left 'an image of CRI'
  CTR=("${plain[@]}")
}

is_root || { say "SKIPPED (needs root): rebase.test.sh"; echo "0 passed, 1 failed"; exit 1; }
if [ -z "${CONTAINERD22:-}" ] && ! command -v go >/dev/null; then
  say "SKIPPED (needs Go 1.21 or later, which Debian 12 has not, or CONTAINERD22=directory): rebase.test.sh"
  echo "0 passed, 0 failed"
  exit 0
fi
BIN=${CONTAINERD22:-$("$here/containerd-go.sh" "$VERSION")}
make_scratch rebase
build_laz
build_lazd
start_registry "$SCRATCH/registry"
while read -r -u 3 name layout; do
  push_layout "$layout" "$name" "$name:gzip"
done 3< <("$here/../images/build.sh" python)
use_fresh_store "$SCRATCH/laz"
laz image convert --to estargz "$REGISTRY/python:gzip" "$REGISTRY/python:esgz" >/dev/null 2>&1
EXPECTED_SUM=$(laz run "$REGISTRY/python:gzip" sh -c "$SUM")
remove_tree "$SCRATCH/laz"

begin 2.2 3 "$BIN" "$PLAIN"
expect gzip
expect esgz
unpacks gzip 0
finish
begin 2.2 3 "$BIN" "$PARALLEL"
unpacks gzip 1
unpacks esgz 1
of_kubelet
finish
summary
