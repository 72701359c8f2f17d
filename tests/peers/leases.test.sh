#!/usr/bin/env bash
# leases.test.sh - what a real containerd's garbage collection leaves of lazy snapshots, and what it
# removes: held by a lease, by what lies on them, by a mount, by nobody. Debian's 1.6, 1.7 and sid's, unmodified.
# Needs root. Ends with "N passed, M failed".
#
# No ctr puts a snapshot into a lease, so containerd is asked by gRPC, as its clients do. What is removed is
# gone from containerd, from lazd's own list, from the mounts and from the disk; beside it runs a container of
# another lazy image, of which nothing may go.
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
. "$here/../lib/common.sh"
. "$here/../lib/registry.sh"
. "$here/../lib/laz.sh"
. "$here/../lib/checks.sh"
. "$here/../lib/grpc.sh"
. "$here/../lib/lazd.sh"

SNAPSHOTS=containerd.services.snapshots.v1.Snapshots
LEASES=containerd.services.leases.v1.Leases
LABEL=containerd.io/snapshot

# ask METHOD MESSAGE [HEADER...]: containerd, in CRI's namespace.
ask() { call "$DIR/c/containerd.sock" "$1" "$2" 'containerd-namespace: k8s.io' "${@:3}"; }

# lease ID [OPTION...]: a new one, which holds nothing.
lease() { "${CTR[@]}" leases create --id "$@"; }
drop() { "${CTR[@]}" leases delete --sync "$1"; }
# resource LEASE SNAPSHOT: the message that names both.
resource() { text 1 "$1"; field 2 "$(text 1 "$2")$(text 2 snapshots/lazarette)"; }
hold() { ask "$LEASES/AddResource" "$(resource "$@")"; }
let_go() { ask "$LEASES/DeleteResource" "$(resource "$@")" && collect; }
# prepare LEASE KEY PARENT [LABELS]: a writable snapshot, made as a client does that has a lease.
prepare() { ask "$SNAPSHOTS/Prepare" "$(text 1 lazarette)$(text 2 "$2")$(text 3 "$3")${4:-}" "containerd-lease: $1"; }

# chain: the names of the lazy snapshots that are not what is run beside, each after the one it lies on.
chain() {
  local name=
  while name=$(snapshots | awk -v on="$name" -v beside="$BESIDE" '$1 != beside && $3 == "Committed" && $2 == on {print $1}
      $1 != beside && $2 == "Committed" && on == "" {print $1}') && [ -n "$name" ]; do echo "$name"; done
}

# there: lazy layers that are there beside those of the other image, as containerd, lazd, the mounts and
# the store each count them.
there() {
  local committed records
  committed=$(snapshots | grep -cw Committed || true)
  call "$DIR/run/snapshotter.sock" "$SNAPSHOTS/List" "" || true
  records=$(grep -ao 'remote/[0-9a-f]\{64\}' "$SCRATCH/answer" | sort -u | wc -l)
  echo "$((committed - 1)) $((records - 1)) $(($(lazy_mounts) - 1)) $(($(find "$DIR/root/layers" -mindepth 1 -maxdepth 1 | wc -l) - 1))"
}
# are WHAT NUMBER: all four say so.
are() { equal "$1" "$(there)" "$2 $2 $2 $2"; }

pull() { works "pulls $1" cri_pull "$REGISTRY/$1"; }
# CRI names an image by its id too, and once more when such a name goes before the others.
remove() {
  works "removes $1" wait_for 60 "the names of $1 to go" has_no_name "$1"
  works 'containerd collects' collect
}
has_no_name() {
  local name digest names
  digest=$(skopeo inspect --raw --tls-verify=false "docker://$REGISTRY/$1" | sha256sum | cut -d ' ' -f 1)
  mapfile -t names < <("${CTR[@]}" images ls | awk -v digest="sha256:$digest" '$3 == digest {print $1}')
  for name in "${names[@]}"; do "${CTR[@]}" images rm "$name" >/dev/null; done
  [ "${#names[@]}" = 0 ]
}

# mount_of KEY: at $DIR/rootfs, as a container has it.
mount_of() {
  local command
  mkdir -p "$DIR/rootfs"
  command=$("${CTR[@]}" snapshots --snapshotter lazarette mounts "$DIR/rootfs" "$1")
  bash -ec "$command"
}
# reads WHAT: what is mounted there. As SUM does it in a container, but that nothing is written there.
reads() { equal "$1" "$(sum_of "$DIR/rootfs/usr" 2>&1)" "$EXPECTED_SUM"; }
sum_of() {
  cd "$1" && find . -xdev -type f -size +16k | LC_ALL=C sort >"$SCRATCH/read" || return
  while read -r file; do dd if="$file" iflag=nocache count=0 2>/dev/null; done <"$SCRATCH/read"
  xargs sha256sum <"$SCRATCH/read" | sha256sum
}

# by_name: layers that leases name, one after the other let go.
by_name() {
  local names; pull python:esgz
  are 'an image of three layers is there' 3
  mapfile -t names < <(chain)
  works 'a lease' lease low
  works 'takes the lowest layer' hold low "${names[0]}"
  works 'another lease' lease middle
  works 'takes the one on it' hold middle "${names[1]}"
  remove python:esgz
  are 'two of three layers are held by leases' 2
  works 'the one above is let go' drop middle
  are 'one layer is held by a lease' 1
  by_child "${names[0]}"
}

# by_child LAYER: what lies on it keeps it, and what is mounted is right to the end.
by_child() {
  works 'a snapshot is made on it, in its lease' prepare low work "$1"
  works 'and mounted' mount_of work
  reads 'it reads what is right'
  works 'the layer is taken out of the lease' let_go low "$1"
  are 'what lies on it keeps it' 1
  works 'the snapshot is let go while it is mounted' drop low
  equal 'containerd has neither' "$(snapshots | grep -c . || true)" "$OTHERS"
  reads 'what is mounted still reads what is right'
  umount "$DIR/rootfs"
  pull python:esgz
  remove python:esgz
  are 'nothing is held, and nothing is there' 0
}

# by_pull: a layer that was brought while its image is not there yet, by the lease of who pulls.
by_pull() {
  local manifest layer diff_id labels
  manifest=$(skopeo inspect --raw --tls-verify=false "docker://$REGISTRY/debian:esgz")
  layer=$(jq -r '.layers[0].digest' <<<"$manifest")
  diff_id=$(skopeo inspect --config --raw --tls-verify=false "docker://$REGISTRY/debian:esgz" | jq -r '.rootfs.diff_ids[0]')
  labels=$(entry 4 "$LABEL.ref" "$diff_id"; entry 4 "$LABEL/cri.image-ref" "$REGISTRY/debian:esgz"
    entry 4 "$LABEL/cri.layer-digest" "$layer"; entry 4 "$LABEL/cri.image-layers" "$layer")
  works 'a lease of who pulls' lease puller
  prepare puller extract "" "$labels" 2>"$SCRATCH/out" || true
  equal 'the layer is brought' "$CODE" 6
  works 'containerd collects beside a pull' collect
  are 'the lease of a pull holds what came' 1
  works 'the pull is given up' drop puller
  are 'nothing of it is left' 0
}

# by_time: a lease that has run out holds nothing.
by_time() {
  pull debian:esgz
  works 'a lease that runs out soon takes a layer' hold_for_a_while "$(chain)"
  remove debian:esgz
  wait_for 120 'a lease to run out' has_run_out || true
  are 'what it held is gone' 0
}
# A slow machine may need longer than a lease lasts.
hold_for_a_while() {
  local seconds
  for seconds in 2 8 32; do
    lease "short-$seconds" --expires "${seconds}s" && hold "short-$seconds" "$1" && return
  done
}
has_run_out() { collect && [ "$(there)" = '0 0 0 0' ]; }

# check GENERATION CONFIG PROGRAMS
check() {
  begin "$@"
  CTR+=(--namespace k8s.io)
  pull debian:chunked
  BESIDE=$(snapshots | awk '{print $1}')
  works 'a container of another image runs' "${CTR[@]}" run -d --cgroup "$CGROUP/beside" --snapshotter lazarette "$REGISTRY/debian:chunked" "beside-$$" sleep infinity
  OTHERS=$(snapshots | grep -c .)
  by_name
  by_pull
  by_time
  equal 'the other container reads what is right' "$("${CTR[@]}" task exec --exec-id read "beside-$$" sh -c "$SUM" 2>&1)" "$EXPECTED_SUM"
  "${CTR[@]}" task rm -f "beside-$$" >/dev/null 2>&1 || true
  works 'it is removed' "${CTR[@]}" containers rm "beside-$$"
  remove debian:chunked
  nothing_left 'all of it'
  finish
}

is_root || { say "SKIPPED (needs root): leases.test.sh"; echo "0 passed, 1 failed"; exit 1; }
SID=$("$here/containerd.sh")
TRIXIE=$("$here/containerd.sh" trixie)
make_scratch leases
build_laz
build_lazd
start_registry "$SCRATCH/registry"
while read -r -u 3 name layout; do
  push_layout "$layout" "$name" "$name:gzip"
done 3< <("$here/../images/build.sh" debian python)
use_fresh_store "$SCRATCH/laz"
laz image convert --to estargz "$REGISTRY/debian:gzip" "$REGISTRY/debian:esgz" >/dev/null 2>&1
laz image convert --to estargz "$REGISTRY/python:gzip" "$REGISTRY/python:esgz" >/dev/null 2>&1
laz image convert --to zstd-chunked "$REGISTRY/debian:gzip" "$REGISTRY/debian:chunked" >/dev/null 2>&1
EXPECTED_SUM=$(laz run "$REGISTRY/debian:gzip" sh -c "$SUM")
remove_tree "$SCRATCH/laz"
check 1.6 2 /usr/bin
check 1.7 2 "$TRIXIE"
check 2.1 3 "$SID"
summary
