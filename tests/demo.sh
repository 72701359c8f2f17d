#!/usr/bin/env bash
# demo.sh - shows a cold start from nothing, told as it goes. `make demo` runs it; needs root.
#
# Everything is real and local: an image made from Debian packages, Debian's docker-registry on
# loopback, this clone's `laz`. All of it is gone at the end, also after an error or ctrl-C; only the
# built program and the built image stay in the cache.
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
. "$here/lib/common.sh"
. "$here/lib/registry.sh"
. "$here/lib/laz.sh"

step() { say; say "$1"; }
megabytes() { awk -v b="$1" 'BEGIN {printf "%.1f MB", b / 1e6}'; }
seconds() { awk -v ms="$1" 'BEGIN {printf "%.2f s", ms / 1000}'; }
field() { jq -r ".$1" "$SCRATCH/$2.json"; }

drop_caches() { sync; echo 3 >/proc/sys/vm/drop_caches 2>/dev/null || say "   (the page cache cannot be dropped here: the times below are a little too good)"; }

# cold NAME OPTION...: one run of the python image with nothing of it on this machine.
cold() {
  local name=$1; shift
  use_fresh_store "$SCRATCH/laz"; drop_caches
  laz run --rm --trace --trace-file "$SCRATCH/$name.json" "$@" "$REGISTRY/python:esgz" \
    >"$SCRATCH/$name.out" 2>"$SCRATCH/$name.waterfall" ||
    { cat "$SCRATCH/$name.waterfall" >&2; die "laz run failed; what it said is above"; }
  sed 's/^/   container: /' "$SCRATCH/$name.out" >&2
  grep -q READY "$SCRATCH/$name.out" || die "the program in the container did not print READY"
}

is_root || die "the demo mounts file systems and starts containers: run sudo make demo"
make_scratch demo

step "1. Build laz (the first time takes a while: most of it is RocksDB)."
build_laz

step "2. Make a real image from Debian packages: python3 with numpy and flask, three layers."
read -r _ layout < <("$here/images/build.sh" python)

step "3. Start a registry on loopback and push the image there."
start_registry "$SCRATCH/registry"
push_layout "$layout" python python:gzip
say "   $REGISTRY/python:gzip, $(megabytes "$(layer_bytes python:gzip)") in gzip layers"

step "4. Convert it to eStargz, which every runtime can still run: laz image convert"
use_fresh_store "$SCRATCH/laz"
laz image convert --to estargz "$REGISTRY/python:gzip" "$REGISTRY/python:esgz" >&2

step "5. The usual way, to compare: forget everything, pull the whole image, then start it."
cold full --full

step "6. The lazy way: forget everything again, start at once, fetch what is read."
cold lazy

image=$(field image_bytes lazy); fetched=$(field fetched_bytes lazy)
cat <<RESULT

Where the time went (lazy):

$(cat "$SCRATCH/lazy.waterfall")

full pull:     ready in $(seconds "$(field ready_ms full)"), $(megabytes "$(field fetched_bytes full)") fetched
lazy:          ready in $(seconds "$(field ready_ms lazy)")
bytes fetched: $(megabytes "$fetched") of the image's $(megabytes "$image") ($((fetched * 100 / image)) %)
RESULT
