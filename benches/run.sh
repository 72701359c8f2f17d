#!/usr/bin/env bash
# run.sh - gets everything a measured run needs, then measures. `make bench` runs it; needs root.
#   run.sh [--quick] [--all] [OPTION OF lazarette-benches measure...]
#     --images A,B    debian,python,java,nginx (default), ml    --links A,B  loopback,1g (default), 100m
#     --systems A,B   all by default                            --rounds N   5 by default
#     --quick         one round                                 --all        every image and link
#     --reference S, --starts-only: see `lazarette-benches measure --help`
#   run.sh --warm [OPTION...]: complete images instead of cold starts; see warm.sh
#   LAZ=path          measures that laz instead of building it; lazd and laz-mountd are those beside it
#   LAZ=none          measures the peers alone
#   CONTAINERD_NEW=dir  measures the containerd, ctr and shim in dir instead of those of Debian's sid
# Everything started here is ended, and everything made outside the cache is removed, also on failure.
set -euo pipefail
[ "${1:-}" != --warm ] || { shift; exec "$(dirname "${BASH_SOURCE[0]}")/warm.sh" "$@"; }
here=$(dirname "${BASH_SOURCE[0]}")/../tests
# shellcheck source=../tests/lib/common.sh
. "$here/lib/common.sh"
# shellcheck source=../tests/lib/registry.sh
. "$here/lib/registry.sh"
# shellcheck source=../tests/lib/laz.sh
. "$here/lib/laz.sh"
# shellcheck source=links.sh
. "$here/../benches/links.sh"

# What optimize records: the command of the image as a JSON list, and for how long, seconds.
workload_of() {
  case $1 in
    debian) echo '10 ["/bin/true"]' ;;
    python) echo '10 ["python3","/app/app.py"]' ;;
    java) echo '10 ["java","-cp","/app","Hello"]' ;;
    nginx) echo '10 ["nginx"]' ;;
    ml) echo '40 ["python3","/app/app.py"]' ;;
  esac
}

# parse_options OPTION...: sets IMAGES, SELECTED (links), SYSTEMS (all if empty) and OPTIONS for the
# program.
parse_options() {
  IMAGES=debian,python,java,nginx SELECTED=loopback,1g SYSTEMS='' OPTIONS=()
  while [ $# -gt 0 ]; do
    case $1 in
      --quick) OPTIONS+=(--rounds 1) ;;
      --all) IMAGES=debian,python,java,nginx,ml SELECTED=loopback,1g,100m ;;
      --images|--links|--systems|--rounds|--reference)
        [ $# -gt 1 ] || die "$1 needs a value"
        case $1 in
          --images) IMAGES=$2 ;;
          --links) SELECTED=$2 ;;
          --systems) SYSTEMS=$2; OPTIONS+=("$1" "$2") ;;
          *) OPTIONS+=("$1" "$2") ;;
        esac
        shift ;;
      --starts-only) OPTIONS+=("$1") ;;
      *) sed -n '2,/^set /{/^#/p}' "${BASH_SOURCE[0]}" >&2; die "no option '$1'" ;;
    esac
    shift
  done
}

# optimize NAME LAYOUT: NAME:optimized, eStargz with the files this workload reads in front:
# stargz's best case. It is kept beside the image it is made of, for the next run.
optimize() {
  local name=$1 kept ctr period command
  kept=$2-optimized-$(workload_of "$name" | sha256sum | cut -c1-8)
  if [ ! -e "$kept/index.json" ]; then
    read -r period command < <(workload_of "$name")
    ctr=("$STARGZ/ctr-remote" --address "$SCRATCH/optimizer/containerd.sock")
    say "Optimising $name for stargz-snapshotter (once; kept in $kept)"
    quietly "$SCRATCH/log" "${ctr[@]}" images pull --plain-http "$REGISTRY/$name:gzip"
    quietly "$SCRATCH/log" "${ctr[@]}" images optimize --oci --period "$period" --args "$command" \
      "$REGISTRY/$name:gzip" "$REGISTRY/$name:optimized"
    quietly "$SCRATCH/log" "${ctr[@]}" images push --plain-http "$REGISTRY/$name:optimized"
    quietly "$SCRATCH/log" "${ctr[@]}" images rm "$REGISTRY/$name:gzip" "$REGISTRY/$name:optimized"
    quietly "$SCRATCH/log" skopeo --insecure-policy copy -q --preserve-digests --all --src-tls-verify=false \
      "docker://$REGISTRY/$name:optimized" "oci:$SCRATCH/kept-$name:$name"
    mv -T "$SCRATCH/kept-$name" "$kept"
  fi
  push_layout "$kept" "$name" "$name:optimized" --all
}

# The containerd that ctr-remote needs to optimise.
start_optimizer() {
  local dir=$SCRATCH/optimizer
  mkdir -p "$dir"
  printf 'version = 2\nroot = "%s/root"\nstate = "%s/state"\ndisabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.internal.v1.opt"]\n[grpc]\naddress = "%s/containerd.sock"\n' \
    "$dir" "$dir" "$dir" >"$dir/config.toml"
  containerd --config "$dir/config.toml" >"$dir/log" 2>&1 8>&- &
  OPTIMIZER_PID=$!
  at_exit stop_pid "$OPTIMIZER_PID"
  wait_for 20 "containerd" test -S "$dir/containerd.sock"
}

# convert NAME: NAME:esgz, and NAME:profiled if it is measured and this laz can write it; what it
# cannot, the program finds missing and says so.
convert() {
  local from=$REGISTRY/$1:gzip period command args
  laz image convert --to estargz "$from" "$REGISTRY/$1:esgz" >&2
  case ,${SYSTEMS:-laz-converted}, in *,laz-converted,*) ;; *) return 0 ;; esac
  case $(laz image convert --help) in *zstd-chunked*--profile*|*--profile*zstd-chunked*) ;;
    *) say "no $1:profiled: this laz has no image convert --to zstd-chunked --profile"; return 0 ;;
  esac
  read -r period command < <(workload_of "$1")
  mapfile -t args < <(jq -r '.[]' <<<"$command")
  # One that goes on, as nginx does, is ended: its profile is kept like that of one that ends.
  quietly "$SCRATCH/log" timeout --preserve-status "$period" \
    "$LAZ" --root "$LAZ_ROOT" --state "$LAZ_STATE" run --rm "$from" "${args[@]}" || true
  laz image convert --to zstd-chunked --profile "$from" "$REGISTRY/$1:profiled" >&2 ||
    say "laz cannot convert $1 by its profile; see above"
}

is_root || die "the benchmark drops the page cache and starts containers: run sudo make bench"
parse_options "$@"
lock_links
say "Building the benchmark"
(cd "$REPO" && cargo build --workspace --locked >&2)
BENCH=$CARGO_TARGET_DIR/debug/lazarette-benches
# No other run is alive, so what is there is of one that was killed.
for stale in "$LAZ_CACHE"/tmp/bench-run.*/; do [ ! -d "$stale" ] || "$BENCH" clean-up "${stale%/}"; done
make_scratch bench-run
at_exit end_cgroups "$(namespace_cgroups)"
[ "${LAZ:-}" = none ] || build_laz
STARGZ=
if command -v go >/dev/null; then STARGZ=$("$here/peers/stargz.sh"); OPTIONS+=(--stargz "$STARGZ"); fi
start_registry "$SCRATCH/registry" 8>&-
OPTIONS+=(--registry "loopback=$REGISTRY")
for link in "${LINKS[@]}"; do
  case ",$SELECTED," in *",$link,"*) ;; *) continue ;; esac
  start_link "$link" "$SCRATCH/registry/data" "$SCRATCH"
  OPTIONS+=(--registry "$link=$LINK_REGISTRY")
done
[ "${LAZ:-}" = none ] || { OPTIONS+=(--laz "$LAZ"); use_fresh_store "$SCRATCH/convert"; }
if [ -x "${LAZ%/*}/lazd" ] && [ -x "${LAZ%/*}/laz-mountd" ]; then OPTIONS+=(--lazd "${LAZ%/*}/lazd"); fi
[ -z "$STARGZ" ] || start_optimizer
read -ra names <<<"${IMAGES//,/ }"
# On a descriptor of its own: containers may read standard input.
while read -r -u 3 name path; do
  push_layout "$path" "$name" "$name:gzip"
  [ -z "$STARGZ" ] || optimize "$name" "$path"
  [ "${LAZ:-}" = none ] || convert "$name"
done 3< <("$here/images/build.sh" "${names[@]}")
if [ -n "$STARGZ" ]; then stop_pid "$OPTIMIZER_PID"; remove_tree "$SCRATCH/optimizer"; fi
remove_tree "$SCRATCH/convert"
OPTIONS+=(--containerd-new "${CONTAINERD_NEW:-$("$here/peers/containerd.sh")}")
mkdir "$SCRATCH/starts"
# A start that is interrupted leaves daemons, containers and mounts.
at_exit "$BENCH" clean-up "$SCRATCH/starts"
say "Measuring $IMAGES over $SELECTED"
# Beside this shell, which answers signals only while it waits like this.
"$BENCH" measure --scratch "$SCRATCH/starts" --images "$IMAGES" --links "$SELECTED" --out "$CARGO_TARGET_DIR/bench" "${OPTIONS[@]}" 8>&- &
MEASURING=$!
at_exit stop_pid "$MEASURING"
wait "$MEASURING"
