#!/usr/bin/env bash
# podman.test.sh - zstd:chunked and plain images converted by laz, read by podman: pulled in full, pulled
# in part, and mounted. Needs root. Ends with "N passed, M failed".
#
# Debian's podman (4.3) pulls in part only what has the annotations of its day, which are those that
# stargz-snapshotter's flavour still has; the flavour of today's podman it pulls in full. That
# podman's own checks are tried with the library it uses, in runtime/tests/convert_peers.rs.
#
# Podman's store, and the registry, are in a scratch directory, and are unmounted at the end.
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
. "$here/../lib/common.sh"
. "$here/../lib/registry.sh"
. "$here/../lib/laz.sh"
. "$here/../lib/checks.sh"

# use_podman_store DIR: podman keeps everything below DIR, and pulls in part what it can.
use_podman_store() {
  mkdir -p "$1"
  cat >"$1/storage.conf" <<CONFIG
[storage]
driver = "overlay"
graphroot = "$1/root"
runroot = "$1/run"
[storage.options]
pull_options = {enable_partial_images = "true", use_hard_links = "false", ostree_repos = ""}
CONFIG
  export CONTAINERS_STORAGE_CONF=$1/storage.conf
}

# tree TAG: everything that can be seen of an image that podman has.
tree() {
  local point
  point=$(podman image mount "$REGISTRY/test:$1")
  "$here/tree-listing.sh" "$point"
  podman image unmount "$REGISTRY/test:$1" >/dev/null
}

# Directories that no layer names get the time of the pull.
without_times() { sed -E 's/^(dir .*) [0-9.]+$/\1/'; }

# What podman 4.3 keeps when it pulls in part: it sets no times and owners, and makes no devices.
contents() { awk '/^[0-9a-f]{64} / || /^(link|xattr) / {print} /^(dir|[fl]) / {print $1, $2, $3, $NF ~ /\// ? $NF : ""}'; }

# check TAG WORD FILTER: podman pulls the image, says WORD about how, and has the same files as in
# "gzip", as far as FILTER keeps what is known of them.
check() {
  local log=$SCRATCH/pull-$1
  if ! podman --log-level=debug pull --tls-verify=false "$REGISTRY/test:$1" >"$log" 2>&1; then
    bad "podman pulls $1" "$(tail -n 2 "$log")"; return
  fi
  if grep -q "$2" "$log"; then ok "podman pulls $1 ($2)"
  else bad "podman pulls $1 ($2)" "$(grep -i 'partial' "$log" || echo 'nothing about partial pulls')"; fi
  tree "$1" >"$SCRATCH/tree-$1"
  if diff <("$3" <"$SCRATCH/tree-gzip") <("$3" <"$SCRATCH/tree-$1") >"$SCRATCH/diff"; then
    ok "$1 has the same files under podman"
  else bad "$1 has the same files under podman" "$(head -n 4 "$SCRATCH/diff")"; fi
  # Each pull starts from nothing: podman would find the files of the last one.
  podman rmi -f "$REGISTRY/test:$1" >/dev/null
}

is_root || { say "SKIPPED (needs root): podman.test.sh"; echo "0 passed, 1 failed"; exit 1; }
make_scratch podman-test
build_laz
start_registry "$SCRATCH/registry"
"$here/make-image.sh" "$SCRATCH/layout" "$SCRATCH" >"$SCRATCH/image.log" 2>&1 || { cat "$SCRATCH/image.log" >&2; die "make-image.sh"; }
push_layout "$SCRATCH/layout" src test:gzip
use_fresh_store "$SCRATCH/laz"
printf '/usr/lib/numbers\n/etc/lib/noise\n' >"$SCRATCH/first"
convert() { laz image convert "$@" >"$SCRATCH/convert" 2>&1 || { cat "$SCRATCH/convert" >&2; die "laz image convert $*"; }; }
convert --to zstd-chunked "$REGISTRY/test:gzip" "$REGISTRY/test:zstd"
convert --to zstd-chunked --prioritize "$SCRATCH/first" "$REGISTRY/test:zstd" "$REGISTRY/test:zstd-first"
convert --to zstd-chunked --zstd-flavour stargz "$REGISTRY/test:gzip" "$REGISTRY/test:zstd-stargz"
convert --to estargz "$REGISTRY/test:zstd" "$REGISTRY/test:esgz"
convert --to oci "$REGISTRY/test:esgz" "$REGISTRY/test:oci"
use_podman_store "$SCRATCH/podman"
at_exit podman rmi -a -f
podman pull -q --tls-verify=false "$REGISTRY/test:gzip" >/dev/null
tree gzip >"$SCRATCH/tree-gzip"
podman rmi -f "$REGISTRY/test:gzip" >/dev/null
whole='Failed to retrieve partial blob: blob type not supported'
check oci "$whole" without_times
check zstd "$whole" without_times
check zstd-first "$whole" without_times
check zstd-stargz 'Retrieved partial blob' contents
check esgz 'Retrieved partial blob' contents
summary
