#!/usr/bin/env bash
# systemd.test.sh - the units of deploy/ under a real systemd, with containerd beside them, as
# docs/snapshotter.md has a user install them: what is enabled starts at boot; layers stay mounted, and a
# container reads right, while systemd restarts, kills and stops lazd and while the mount server is killed;
# a node that is shut down is down in seconds, and comes back with its images, without a registry,
# after that and after a power failure. Needs root. Ends with "N passed, M failed".
#
# systemd is process 1 of namespaces of its own (tests/lib/node.sh). Nothing of it is left.
# shellcheck disable=SC2016  # what stands in single quotes is for another shell
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
. "$here/../lib/common.sh"
. "$here/../lib/registry.sh"
. "$here/../lib/laz.sh"
. "$here/../lib/checks.sh"
. "$here/../lib/node.sh"

# install_units: as a user does by docs/snapshotter.md.
install_units() {
  local program
  install -m 644 "$REPO"/deploy/lazd.service "$REPO"/deploy/laz-mountd.service "$NODE/root/etc/systemd/system/"
  mkdir -p "$NODE/root/etc/containerd"
  { echo 'version = 3'; cat "$REPO/deploy/containerd-v3.toml"; } >"$NODE/root/etc/containerd/config.toml"
  # That of Debian's package, as containerd is not in a package here.
  sed 's,/usr/bin/containerd,/opt/containerd/containerd,' "$CONTAINERD/../lib/systemd/system/containerd.service" \
    >"$NODE/root/etc/systemd/system/containerd.service"
  {
    for program in lazd laz-mountd; do echo "$(dirname "$LAZD")/$program /usr/local/bin/$program"; done
    echo "$CONTAINERD /opt/containerd"
  } >"$NODE/shared"
}

ctr() { in_node timeout 60 /opt/containerd/ctr "$@"; }
ctr_answers() { ctr version && ctr snapshots --snapshotter lazarette ls; }
state() { in_node systemctl is-active "$1" || true; }
main_pid() { in_node systemctl show --property MainPID --value "$1"; }
mounted() { in_node awk '$5 ~ "^/run/lazarette/" {print $3, $5}' /proc/self/mountinfo | sort; }
# The kernel alone shows a layer that is: one more EROFS on its place, which has a FUSE and one by now.
is_complete() { [ "$(mounted | wc -l)" = 3 ]; }
read_all() { ctr task exec --exec-id "read-$RANDOM$RANDOM" reader sh -c "$SUM" 2>&1 || true; }
restarted() { local now; now=$(main_pid "$1"); [ "$now" != 0 ] && [ "$now" != "$2" ] && [ "$(state "$1")" = active ]; }
# run_reader NAME: a container of the image. Without a share of the processor, as no cgroup of version 2 has that
# controller on a machine that has it in version 1.
# It ends when it is asked to, as what is shut down with a node should: containerd leaves its containers to systemd.
run_reader() {
  ctr run -d --cpu-shares 0 --snapshotter lazarette "$ESGZ" "$1" sh -c 'trap exit TERM; sleep infinity & wait'
}
# is_right WHAT
is_right() { equal "$1" "$(read_all)" "$EXPECTED"; }

starts() {
  boot_node
  for unit in laz-mountd lazd containerd; do equal "$unit starts at boot" "$(state "$unit")" active; done
  equal 'no unit has failed' "$(in_node systemctl --no-legend --plain list-units --failed)" ""
  wait_for 120 'containerd to answer' ctr_answers || true
}

runs_lazily() {
  works 'pulls' ctr images pull --plain-http --snapshotter lazarette "$ESGZ"
  equal 'the layer is mounted' "$(mounted | awk '{print $2}' | sort -u | wc -l)" 1
  works 'runs in the background' run_reader reader
  is_right 'a container reads what is right'
}

# outlives WHAT COMMAND...: lazd is another one after it, and nothing else is.
outlives() {
  local what=$1 before server lazd; shift
  before=$(mounted) server=$(main_pid laz-mountd) lazd=$(main_pid lazd)
  in_node "$@"
  wait_for 120 'another lazd' restarted lazd "$lazd" || true
  equal "$what: there is another lazd" "$(restarted lazd "$lazd" && echo yes)" yes
  equal "$what: the mount server stays" "$(main_pid laz-mountd)" "$server"
  equal "$what: what was mounted stays" "$(comm -23 <(echo "$before") <(mounted))" ""
  is_right "$what: the container reads what is right"
}

stops() {
  local before; before=$(mounted)
  in_node systemctl stop lazd
  equal 'lazd is stopped' "$(state lazd)" inactive
  equal 'what was mounted stays while it is stopped' "$(comm -23 <(echo "$before") <(mounted))" ""
  is_right 'the container reads on without it'
  in_node systemctl start lazd
}

server_dies() {
  local server; server=$(main_pid laz-mountd)
  in_node systemctl kill --kill-who=main --signal KILL laz-mountd
  wait_for 120 'another mount server' restarted laz-mountd "$server" || true
  equal 'there is another mount server' "$(restarted laz-mountd "$server" && echo yes)" yes
  equal 'lazd is still there' "$(state lazd)" active
  is_right 'the container reads what is right after that'
}

# The server that lazd started meanwhile is the unit's again, and so are the mounts.
server_stops() {
  local own
  in_node systemctl stop laz-mountd
  wait_for 120 'a server of lazd' serving || true
  own=$(serving || true)
  equal 'lazd has a mount server of its own' "$([ -n "$own" ] && echo yes)" yes
  in_node systemctl start laz-mountd
  wait_for 120 'the server of the unit' is_of_unit || true
  equal 'the unit has the mount server again' "$(is_of_unit && echo yes)" yes
  equal 'and has not failed' "$(state laz-mountd)" active
  is_right 'the container reads what is right from the server of the unit'
}
# serving: mount servers of the node, as it numbers them.
serving() {
  in_node sh -c 'for p in /proc/[0-9]*; do
    case $(tr "\\0" " " <$p/cmdline) in *laz-mountd\ guard*|*laz-mountd\ list*) ;; */laz-mountd\ *) echo ${p#/proc/} ;; esac
  done 2>/dev/null; :' | grep .
}
is_of_unit() { [ "$(serving)" = "$(main_pid laz-mountd)" ]; }

# As an upgrade by docs/snapshotter.md: whom somebody ran is succeeded by what systemd starts.
server_is_upgraded() {
  local server; server=$(main_pid laz-mountd)
  works 'a server that takes over gives way to that of the unit' in_node timeout 120 laz-mountd --take-over
  wait_for 120 'the next server of the unit' succeeded "$server" || true
  equal 'which is another one' "$(succeeded "$server" && echo yes)" yes
  is_right 'the container reads what is right after that'
}
# succeeded PID: systemd counts the unit as started a moment after the server that was taken over from has gone.
succeeded() { restarted laz-mountd "$1" && is_of_unit; }

# Whatever lasts longer than systemd's patience with units that fail: five times in ten seconds.
fails_for_long() {
  in_node sh -c 'mkdir -p /etc/lazarette && echo "[mounts]" >/etc/lazarette/config.toml && echo "backend = 7" >>/etc/lazarette/config.toml'
  in_node systemctl restart lazd 2>/dev/null || true
  wait_for 120 'many starts' tried_often || true
  in_node rm /etc/lazarette/config.toml
  wait_for 120 'a start that succeeds' is_active lazd || true
  equal 'lazd is there once its config is right' "$(state lazd)" active
  is_right 'the container reads what is right then'
}
tried_often() { [ "$(in_node systemctl show --property NRestarts --value lazd)" -ge 7 ]; }
is_active() { [ "$(state "$1")" = active ]; }

# comes_back HOW: after the node went down in that way, with no registry since.
comes_back() {
  starts
  works "after $1 its image runs" run_reader "reader-$RANDOM"
  works "after $1 the container that was is removed" ctr containers rm reader
  works "after $1 another one of its name is made" run_reader reader
  is_right "after $1 it reads what is right"
}

shuts_down() {
  local began=$SECONDS
  in_node systemctl poweroff 2>/dev/null || true
  wait_for 120 'the node to be down' node_is_down || true
  equal 'is down in less than the 90 s of a unit that hangs' "$([ $((SECONDS - began)) -lt 85 ] && echo yes || echo $((SECONDS - began)))" yes
  halt_node
}
node_is_down() { ! kill -0 "$NODE_PID" 2>/dev/null; }

is_root || { say "SKIPPED (needs root): systemd.test.sh"; echo "0 passed, 1 failed"; exit 1; }
make_scratch systemd
CONTAINERD=$("$here/containerd.sh")
build_laz
build_lazd
start_registry "$SCRATCH/registry"
read -r _ layout < <("$here/../images/build.sh" debian)
push_layout "$layout" debian debian:gzip
use_fresh_store "$SCRATCH/laz"
ESGZ=$REGISTRY/debian:esgz
laz image convert --to estargz "$REGISTRY/debian:gzip" "$ESGZ" >/dev/null 2>&1
EXPECTED=$(laz run "$ESGZ" sh -c "$SUM")
remove_tree "$SCRATCH/laz"

before=$(traces_left)
make_node "$SCRATCH/node"
install_units
works 'the units are enabled' systemctl --root="$NODE/root" enable laz-mountd lazd containerd
starts
runs_lazily
outlives 'lazd restarted' systemctl restart lazd
outlives 'lazd killed' systemctl kill --kill-who=all --signal KILL lazd
stops
server_dies
server_stops
server_is_upgraded
fails_for_long
wait_for 120 'all of the layer' is_complete || true
equal 'the layer is complete' "$(is_complete && echo yes)" yes
stop_pid "$REGISTRY_PID"
shuts_down
comes_back 'a shutdown'
halt_node
comes_back 'a power failure'
halt_node
remove_tree "$NODE"
settles 'nothing is left' '' traces_since "$before"
summary
