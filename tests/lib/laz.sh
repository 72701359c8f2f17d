# shellcheck shell=bash
# laz.sh - builds and runs `laz` for the tests, the demo and the benchmark. Sourced, after common.sh.

# build_laz: sets LAZ to the program; one given by the environment is taken as it is.
build_laz() {
  [ -z "${LAZ:-}" ] || { [ -x "$LAZ" ] || die "LAZ=$LAZ is not a program"; return 0; }
  (cd "$REPO" && cargo build --workspace --locked --bin laz ${QUIET_BUILD:+-q} >&2)
  LAZ=$CARGO_TARGET_DIR/debug/laz
  [ -x "$LAZ" ] || die "cargo built no $LAZ"
}

# build_lazd: sets LAZD, beside LAZ and with its mount server, unless the environment gives one.
build_lazd() {
  LAZD=${LAZD:-$(dirname "$LAZ")/lazd}
  [ -x "$LAZD" ] && [ -x "$(dirname "$LAZD")/laz-mountd" ] && return
  (cd "$REPO" && cargo build --workspace --locked --bin lazd --bin laz-mountd ${QUIET_BUILD:+-q} >&2)
  [ -x "$LAZD" ] || die "cargo built no $LAZD"
}

# use_fresh_store DIR: `laz` in this script keeps everything below DIR, which starts empty.
use_fresh_store() {
  LAZ_ROOT=$1/root LAZ_STATE=$1/state
  remove_tree "$LAZ_ROOT"; remove_tree "$LAZ_STATE"
  mkdir -p "$LAZ_ROOT" "$LAZ_STATE"
}
laz() { "$LAZ" --root "$LAZ_ROOT" --state "$LAZ_STATE" "$@"; }

# end_mount_server STATE: and its guard. lazd started it, and it outlives that.
end_mount_server() {
  local pid
  for pid in /proc/[0-9]*; do
    if tr '\0' '\n' <"$pid/cmdline" | grep -qxF "$1/mountd.sock"; then kill "${pid#/proc/}"; fi
  done 2>/dev/null || true
}

# What a machine carries of containers: mounts, cgroups and processes of ours. Two of these are
# compared to prove that a run leaves nothing behind. What scripts that run beside this one have is left out: it is
# in scratch directories and nodes of their own.
traces_left() {
  local pid
  awk -v all="$LAZ_CACHE/tmp/" -v own="$SCRATCH/" 'index($2, all) == 1 && index($2, own) != 1 || $2 ~ "^/run/laz-test[.]" {next}
    {print "mount", $2, $3}' /proc/mounts
  find /sys/fs/cgroup -mindepth 1 -type d -printf 'cgroup %p\n' 2>/dev/null | grep -i laz | without_other_nodes || true
  for pid in $(pgrep -x 'laz|laz-.*'); do
    is_of_another "$pid" || sed 's/^/process /' "/proc/$pid/comm"
  done 2>/dev/null || true
}
without_other_nodes() { awk -v own="/lazarette-node-$$" '!/\/lazarette-node-/ || index($0 "/", own "/")'; }
# is_of_another PID: it names a scratch directory that is not of this script, or is in a node that is not.
is_of_another() {
  tr '\0' '\n' <"/proc/$1/cmdline" | awk -v all="$LAZ_CACHE/tmp/" -v own="$SCRATCH/" \
    'index($0, all) && !index($0, own) {found = 1} END {exit !found}' ||
    grep -F /lazarette-node- "/proc/$1/cgroup" | grep -qvE "/lazarette-node-$$(/|\$)"
}

# traces_since TRACES: what is there now and was not there then. What ends by itself meanwhile, as the guard of
# a mount server of an earlier test does, is nobody's trace.
traces_since() { comm -13 <(sort <<<"$1") <(traces_left | sort); }

# What a container runs to read every file from 16 KiB on below /usr, past its page cache: so both large files,
# which the kernel reads by pieces, and small ones, which it reads whole.
# shellcheck disable=SC2034,SC2016  # for the tests; the container's shell expands it
SUM='cd /usr && find . -xdev -type f -size +16k | sort >/tmp/read &&
  while read -r file; do dd if="$file" iflag=nocache count=0 2>/dev/null; done </tmp/read && xargs sha256sum </tmp/read | sha256sum'
