# shellcheck shell=bash
# common.sh - what every script here shares: where things are, how they speak, and how they
# clean up. Sourced, never run. Needs `set -euo pipefail` in the script that sources it.
#
# Nothing here writes into the clone: everything made is under $LAZ_CACHE.

# shellcheck disable=SC2034  # used by the scripts that source this file
REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
LAZ_CACHE=${XDG_CACHE_HOME:-$HOME/.cache}/lazarette
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$LAZ_CACHE/target}
# Where rustup and a Go taken by hand put their programs: a login shell knows, make may not.
# Before them, what compiles RocksDB in two minutes instead of twelve.
PATH=$REPO/tests/lib/cxx:$PATH:$HOME/.cargo/bin:/usr/local/go/bin:/usr/local/sbin:/usr/sbin:/sbin
mkdir -p "$LAZ_CACHE"

# say LINE...: one plain line on stderr, so that stdout stays free for results.
say() { printf '%s\n' "$*" >&2; }
die() { printf 'error: %s\n' "$*" >&2; exit 1; }
is_root() { [ "$(id -u)" = 0 ]; }
now_ms() { local t=${EPOCHREALTIME/[.,]/}; echo "${t%???}"; }

# quietly LOG COMMAND...: runs it with all output in LOG, and shows the end of LOG if it fails.
quietly() {
  local log=$1 code=0; shift
  "$@" >>"$log" 2>&1 || code=$?
  [ "$code" = 0 ] && return 0
  say "failed ($code): $*"; say "the last lines of its output:"; tail -n 25 "$log" >&2
  return "$code"
}

# at_exit COMMAND...: runs it when the script ends, however it ends; the last one given runs first.
AT_EXIT=()
at_exit() {
  AT_EXIT=("$(printf '%q ' "$@")" "${AT_EXIT[@]}")
  [ "${#AT_EXIT[@]}" -gt 1 ] || {
    trap run_at_exit EXIT
    trap 'exit 130' INT; trap 'exit 143' TERM; trap 'exit 129' HUP
  }
}
run_at_exit() {
  local code=$? step
  trap '' INT TERM HUP
  for step in "${AT_EXIT[@]}"; do eval "$step" || true; done
  exit "$code"
}

# stop_pid PID: TERM, at most a minute of grace, then KILL. Only ever our own children: a process
# that got the number later is not ours to end.
stop_pid() {
  local pid=$1 tries=0
  [ "$(awk '/^PPid:/ {print $2}' "/proc/$pid/status" 2>/dev/null)" = "$$" ] || return 0
  kill "$pid" 2>/dev/null || return 0
  while kill -0 "$pid" 2>/dev/null; do
    tries=$((tries + 1))
    [ "$tries" -lt 1200 ] || { kill -KILL "$pid" 2>/dev/null || true; break; }
    sleep 0.05
  done
  wait "$pid" 2>/dev/null || true
}

# wait_for SECONDS WHAT COMMAND...: polls COMMAND, with a bound.
wait_for() {
  local until=$((SECONDS + $1)) what=$2; shift 2
  until "$@" >/dev/null 2>&1; do
    [ "$SECONDS" -lt "$until" ] || { say "gave up waiting for $what"; return 1; }
    sleep 0.05
  done
}

# namespace_cgroups: what runc keeps containers below, a cgroup of each hierarchy for each of containerd's namespaces.
namespace_cgroups() {
  find /sys/fs/cgroup -mindepth 1 -maxdepth 2 -type d \( -name default -o -name other -o -name k8s.io \) 2>/dev/null | sort
}

# cgroups_since BEFORE: those that were not among BEFORE.
cgroups_since() { comm -13 <(echo "$1") <(namespace_cgroups); }

# end_cgroups BEFORE: removes those; nothing else does. Fails where one has containers.
end_cgroups() {
  cgroups_since "$1" | xargs -r rmdir 2>/dev/null || true
  [ -z "$(cgroups_since "$1")" ]
}

# What a script's containers are below that says --cgroup "$CGROUP/NAME": other scripts may run beside it, and have
# containers in cgroups of their own. The names of containers have to differ, too: runc keeps them by these.
CGROUP=/test-of-$$
own_cgroups() { find /sys/fs/cgroup -mindepth 1 -maxdepth 2 -type d -name "${CGROUP#/}" 2>/dev/null | sort; }
# end_own_cgroups: removes them; nothing else does. Fails where one has containers.
end_own_cgroups() {
  own_cgroups | xargs -r rmdir 2>/dev/null || true
  [ -z "$(own_cgroups)" ]
}

# unmount_below DIR: unmounts everything mounted at or under DIR, the deepest first.
unmount_below() {
  awk -v d="$1" '$5 == d || index($5, d "/") == 1 {print $5}' /proc/self/mountinfo | sort -r |
    while read -r point; do umount "$point" 2>/dev/null || umount -l "$point" || true; done
}

# remove_tree DIR: unmounts and deletes; never crosses into another file system.
remove_tree() { unmount_below "$1"; rm -rf --one-file-system "$1"; }

# A scratch directory of this run, gone at exit. Prints nothing: sets SCRATCH.
make_scratch() {
  mkdir -p "$LAZ_CACHE/tmp"
  SCRATCH=$(mktemp -d "$LAZ_CACHE/tmp/$1.XXXXXX")
  at_exit remove_tree "$SCRATCH"
}
