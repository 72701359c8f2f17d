#!/usr/bin/env bash
# run.sh - gets everything a measured run needs, then measures. `make bench` runs it; needs root.
#   run.sh [--quick] [OPTION OF lazarette-benches...]      --quick is one round
#   LAZ=path          measures that laz instead of building it
#   LAZ=none          measures the peers alone
#   CONTAINERD_NEW=dir  measures the containerd, ctr and shim in dir instead of those of Debian's sid
# Everything started here is ended, and everything made outside the cache is removed, also on failure.
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")/../tests
# shellcheck source=../tests/lib/common.sh
. "$here/lib/common.sh"
# shellcheck source=../tests/lib/registry.sh
. "$here/lib/registry.sh"
# shellcheck source=../tests/lib/laz.sh
. "$here/lib/laz.sh"

# optimize IMAGE ARGS: eStargz with the files this workload reads in front: stargz's best case.
optimize() {
  local from=$REGISTRY/$1:gzip to=$REGISTRY/$1:optimized
  local ctr=("$STARGZ/ctr-remote" --address "$SCRATCH/optimizer/containerd.sock")
  quietly "$SCRATCH/log" "${ctr[@]}" images pull --plain-http "$from"
  quietly "$SCRATCH/log" "${ctr[@]}" images optimize --oci --period 10 --args "$2" "$from" "$to"
  quietly "$SCRATCH/log" "${ctr[@]}" images push --plain-http "$to"
}

optimize_all() {
  local dir=$SCRATCH/optimizer
  mkdir -p "$dir"
  printf 'version = 2\nroot = "%s/root"\nstate = "%s/state"\ndisabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.internal.v1.opt"]\n[grpc]\naddress = "%s/containerd.sock"\n' \
    "$dir" "$dir" "$dir" >"$dir/config.toml"
  containerd --config "$dir/config.toml" >"$dir/log" 2>&1 &
  local pid=$!
  at_exit stop_pid "$pid"
  wait_for 20 "containerd" test -S "$dir/containerd.sock"
  optimize debian '["/bin/true"]'
  optimize python '["python3","/app/app.py"]'
  stop_pid "$pid"
  remove_tree "$dir"
}

is_root || die "the benchmark drops the page cache and starts containers: run sudo make bench"
options=()
for option in "$@"; do
  case $option in --quick) options+=(--rounds 1) ;; *) options+=("$option") ;; esac
done
make_scratch bench
say "Building the benchmark"
(cd "$REPO" && cargo build --workspace --locked >&2)
[ "${LAZ:-}" = none ] || build_laz
STARGZ=$("$here/peers/stargz.sh")
start_registry "$SCRATCH/registry"
while read -r name path; do push_layout "$path" "$name" "$name:gzip"; done < <("$here/images/build.sh" debian python)
say "Optimising the images for stargz-snapshotter"
optimize_all
if [ "${LAZ:-}" != none ]; then
  options+=(--laz "$LAZ")
  use_fresh_store "$SCRATCH/convert"
  for name in debian python; do laz image convert --to estargz "$REGISTRY/$name:gzip" "$REGISTRY/$name:esgz" >&2; done
fi
options+=(--containerd-new "${CONTAINERD_NEW:-$("$here/peers/containerd.sh")}")
mkdir "$SCRATCH/starts"
say "Measuring"
"$CARGO_TARGET_DIR/debug/lazarette-benches" --registry "$REGISTRY" --scratch "$SCRATCH/starts" --stargz "$STARGZ" \
  --json "$CARGO_TARGET_DIR/bench/cold-start.json" "${options[@]}"
