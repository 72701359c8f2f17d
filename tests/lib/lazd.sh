# shellcheck shell=bash
# lazd.sh - lazd and an unmodified containerd that has it for a snapshotter, below DIR. Sourced, after
# common.sh, laz.sh, checks.sh and grpc.sh. What concerns lazarette in containerd's config is that of deploy/.

# begin GENERATION CONFIG PROGRAMS [SED_SCRIPT]: both, and that it is this one; GENERATION is the beginning of containerd's version.
begin() {
  # shellcheck disable=SC2034  # checks.sh says of what a line is
  GENERATION=$1
  make_node "$SCRATCH/$1"
  start_lazd snapshotter.sock
  start_containerd "${@:2}"
  equal "it is containerd $1" "$("${CTR[@]}" version | sed -nE '/^Server/,$s/^ *Version: *v?([0-9]+\.[0-9]+).*/\1/p')" "$1"
}

# make_node DIR: where all of it lies; sets DIR, and STATE, where containerd has what it runs. A container's root that
# is another user of the host gets there, and not into a home of root's.
make_node() {
  DIR=$1
  mkdir -p "$DIR"
  at_exit end_own_cgroups
  STATE=$(mktemp -d /run/laz-test.XXXXXX)
  chmod 711 "$STATE"
  at_exit remove_tree "$STATE"
  at_exit end_mount_server "$DIR/run"
}

# finish: in reverse order: containerd talks to lazd to its end.
finish() {
  stop_pid "$CONTAINERD_PID"
  stop_pid "$LAZD_PID"
  end_mount_server "$DIR/run"
  wait_for 60 'cgroups to be empty' end_own_cgroups || true
  equal 'no cgroup is left' "$(own_cgroups)" ''
  equal 'nothing is left mounted' "$(grep -cE " ($DIR|$STATE)/" /proc/self/mountinfo || true)" 0
  remove_tree "$STATE"
  remove_tree "$DIR"
}

# start_lazd SOCKET [ARGUMENT...]: until it listens on run/SOCKET; sets LAZD_PID.
start_lazd() {
  local socket=$DIR/run/$1; shift
  "$LAZD" "$@" --root "$DIR/root" --state "$DIR/run" >>"$DIR/lazd.log" 2>&1 &
  LAZD_PID=$!
  at_exit stop_pid "$LAZD_PID"
  wait_for 120 lazd test -S "$socket" || { tail -n 5 "$DIR/lazd.log" >&2; die "lazd does not start"; }
}

# start_containerd VERSION_OF_CONFIG PATH_OF_PROGRAMS [SED_SCRIPT]: sets CONTAINERD_PID and CTR. The script changes the
# config of deploy/.
start_containerd() {
  local dir=$DIR/c; mkdir -p "$dir"
  cat >"$dir/config.toml" <<CONFIG
version = $1
root = "$dir/root"
state = "$STATE/containerd"
disabled_plugins = ["io.containerd.internal.v1.opt"]
[grpc]
address = "$dir/containerd.sock"
[ttrpc]
address = "$dir/containerd.sock.ttrpc"
CONFIG
  sed -e "s,/run/lazarette/snapshotter.sock,$DIR/run/snapshotter.sock," -e "s,/var/lib/lazarette,$DIR/root," -e "${3:-}" \
    "$REPO/deploy/containerd-v$1.toml" >>"$dir/config.toml"
  PATH=$2:$PATH "$2/containerd" --config "$dir/config.toml" >"$dir/log" 2>&1 &
  CONTAINERD_PID=$!
  at_exit stop_pid "$CONTAINERD_PID"
  at_exit end_tasks "$2/ctr" "$dir/containerd.sock"
  wait_for 120 containerd "$2/ctr" --address "$dir/containerd.sock" version || { tail -n 5 "$dir/log" >&2; die "containerd does not start"; }
  # shellcheck disable=SC2034  # for the test
  CTR=("$2/ctr" --address "$dir/containerd.sock")
}

# end_tasks CTR SOCKET: what a failed test left running.
end_tasks() {
  local task
  [ -S "$2" ] || return 0
  for task in $("$1" --address "$2" --timeout 10s tasks ls -q 2>/dev/null); do
    "$1" --address "$2" --timeout 10s tasks rm -f "$task" || true
  done >/dev/null 2>&1
}

# lazy_mounts: how many layers are mounted. A layer may be two file systems on one mountpoint.
lazy_mounts() { awk -v d="$DIR/run/" 'index($5, d) == 1 {print $5}' /proc/self/mountinfo | sort -u | wc -l; }

snapshots() { "${CTR[@]}" snapshots --snapshotter lazarette ls | sed 1d; }
no_snapshots() { [ -z "$(snapshots)" ]; }
remote_snapshots() {
  local key
  for key in $(snapshots | awk '{print $1}'); do
    "${CTR[@]}" snapshots --snapshotter lazarette info "$key" | grep -c '"containerd.io/snapshot/remote"' || true
  done | awk '{n += $1} END {print n + 0}'
}

# Containerd tries a lost connection again after a second or more, and refuses requests till then.
reconnected() { wait_for 120 'containerd to connect again' "${CTR[@]}" snapshots --snapshotter lazarette ls || true; }

# cri_pull IMAGE: what kubelet asks for.
cri_pull() {
  call "$DIR/c/containerd.sock" runtime.v1.ImageService/PullImage "$(field 1 "$(field 1 "$(hex_of "$1")")")"
}

# collect: containerd removes what nothing holds, and is done with it.
collect() {
  "${CTR[@]}" leases create --id collect >/dev/null && "${CTR[@]}" leases delete --sync collect >/dev/null
}

# nothing_left WHAT: neither in containerd, nor in lazd, nor on the disk.
nothing_left() {
  settles "$1 leaves no snapshot" "" snapshots
  settles "$1 leaves nothing mounted" 0 lazy_mounts
  settles "$1 leaves no directory of a snapshot" "" ls "$DIR/root/snapshots"
  settles "$1 leaves no layer in the store" "" ls "$DIR/root/layers"
}
