#!/usr/bin/env bash
# warm.sh - complete images shown by lazd to containerd, beside overlayfs on ext4. Needs root.
#   warm.sh [--images A,B] [--backends A,B] [--rounds N] [--writable] [--begun]
#     --images    python (default), and the others of tests/images; each is on disk once for each backend
#                 and twice for containerd
#     --backends  of [mounts] in lazd's config; erofs,fuse (default)
#     --rounds    5 by default
#     --writable  as a container has it, instead of a view
#     --begun     as a container has it that began before the image was complete
#   LAZD=path     measures that lazd instead of building it
#   CONTAINERD_NEW=dir  takes the containerd and ctr in dir instead of those of Debian's sid
# `make bench ARGS=--warm` runs it. Everything started here is ended, and everything made outside
# the cache is removed, also on failure.
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")/../tests
# shellcheck source=../tests/lib/common.sh
. "$here/lib/common.sh"
# shellcheck source=../tests/lib/registry.sh
. "$here/lib/registry.sh"

# parse_options OPTION...: sets IMAGES and OPTIONS for the program.
parse_options() {
  IMAGES=python OPTIONS=()
  while [ $# -gt 0 ]; do
    case $1 in
      --writable|--begun) OPTIONS+=("$1") ;;
      --images|--backends|--rounds)
        [ $# -gt 1 ] || die "$1 needs a value"
        if [ "$1" = --images ]; then IMAGES=$2; else OPTIONS+=("$1" "$2"); fi
        shift ;;
      *) sed -n '2,/^set /{/^#/p}' "${BASH_SOURCE[0]}" >&2; die "no option '$1'" ;;
    esac
    shift
  done
}

is_root || die "the benchmark drops caches and mounts images: run sudo make bench ARGS=--warm"
parse_options "$@"
say "Building the benchmark"
(cd "$REPO" && cargo build --workspace --locked >&2)
BENCH=$CARGO_TARGET_DIR/debug/lazarette-benches
make_scratch bench-warm
at_exit end_cgroups "$(namespace_cgroups)"
LAZD=${LAZD:-$CARGO_TARGET_DIR/debug/lazd}
CONTAINERD=${CONTAINERD_NEW:-$("$here/peers/containerd.sh")}
start_registry "$SCRATCH/registry"
read -ra names <<<"${IMAGES//,/ }"
while read -r -u 3 name path; do
  push_layout "$path" "$name" "$name:gzip"
done 3< <("$here/images/build.sh" "${names[@]}")
mkdir "$SCRATCH/run"
# A run that is interrupted leaves daemons and mounts.
at_exit "$BENCH" clean-up "$SCRATCH/run"
"$BENCH" warm --registry "$REGISTRY" --scratch "$SCRATCH/run" --lazd "$LAZD" --containerd "$CONTAINERD" \
  --images "$IMAGES" --out "$CARGO_TARGET_DIR/bench" "${OPTIONS[@]}" &
MEASURING=$!
at_exit stop_pid "$MEASURING"
wait "$MEASURING"
