# shellcheck shell=bash
# node.sh - a node of its own: Debian's systemd as process 1 of new namespaces, over a root file system that
# has nothing but what Debian installs. Sourced, after common.sh. Only the network is shared.
#
# Nothing in it can write to this machine: /proc/sys and /sys are read-only, every mount is its own, and
# its processes end with their first one. Its cgroups are below one that this makes and removes.

# node_root: prints the directory of a root file system with systemd and runc, kept in the cache.
node_root() {
  # shellcheck source=/dev/null
  local suite; suite=$(. /etc/os-release && echo "${VERSION_CODENAME:?}")
  local dir=$LAZ_CACHE/peers/node-$suite
  exec 9>"$LAZ_CACHE/peers/node.lock"
  flock 9
  if [ ! -d "$dir" ]; then
    say "Making a root file system of $suite with systemd"
    rm -rf "$dir.new"
    # shellcheck disable=SC2016  # mmdebstrap runs it
    quietly "$SCRATCH/mmdebstrap.log" mmdebstrap --variant=minbase --include=systemd-sysv,runc,libseccomp2,libstdc++6 \
      --customize-hook='rm -rf "$1"/var/cache/apt/archives/*.deb "$1"/var/lib/apt/lists/*' "$suite" "$dir.new"
    mv "$dir.new" "$dir"
  fi
  flock -u 9
  echo "$dir"
}

# make_node DIR: a node whose disk is DIR; what is written below /etc and /var stays there from one boot to the next.
make_node() {
  NODE=$1
  local lower; lower=$(node_root)
  mkdir -p "$NODE"/{lower,upper,work,root,containerd,lazarette}
  mount -t overlay -o "lowerdir=$lower,upperdir=$NODE/upper,workdir=$NODE/work" node "$NODE/root"
  mkdir -p "$NODE/root"/{opt/containerd,var/lib/containerd,var/lib/lazarette}
}

# boot_node: sets INIT, its first process, and returns when what is enabled has started.
boot_node() {
  NODE_CGROUP=$(cgroup2)
  [ -n "$NODE_CGROUP" ] || die "a node needs cgroup v2, which is mounted nowhere here"
  NODE_CGROUP+=/lazarette-node-$$
  mkdir -p "$NODE_CGROUP"
  at_exit halt_node
  ( echo "$BASHPID" >"$NODE_CGROUP/cgroup.procs"
    exec unshare --mount --propagation private --pid --fork --kill-child --uts --ipc --cgroup \
      "$BASH" -euc "$NODE_INIT" node "$NODE" ) >"$NODE/console" 2>&1 9>&- &
  NODE_PID=$!
  wait_for 120 'a first process' node_init || { tail "$NODE/console" >&2; return 1; }
  INIT=$(node_init)
  wait_for 120 'the node to start' node_is_up || { in_node systemctl --no-pager list-jobs >&2; return 1; }
}
cgroup2() { awk '{for (i = 7; $i != "-";) i++; if ($(i + 1) == "cgroup2") {print $5; exit}}' /proc/self/mountinfo; }
# The child of unshare, once it is systemd.
node_init() { local init; init=$(pgrep -P "$NODE_PID" -x systemd) && echo "$init"; }
# Also where a unit has failed: a test that needs it will say so.
node_is_up() { in_node systemctl is-system-running 2>/dev/null | grep -qxE 'running|degraded'; }

# What makes the namespaces a node: run as their first process, which then becomes systemd.
# shellcheck disable=SC2016  # it is for the shell that runs it
NODE_INIT='
  node=$1 root=$1/root
  mount -t proc proc "$root/proc"
  mount --bind "$root/proc/sys" "$root/proc/sys"
  mount -o remount,bind,ro "$root/proc/sys"
  mount -t sysfs -o ro sysfs "$root/sys"
  mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup"
  mount -t tmpfs -o mode=755 tmpfs "$root/dev"
  mkdir "$root/dev/pts" "$root/dev/shm"
  for device in null zero full random urandom tty fuse; do cp -a "/dev/$device" "$root/dev/"; done
  mount -t devpts -o newinstance,ptmxmode=666,mode=620,gid=5 devpts "$root/dev/pts"
  ln -s pts/ptmx "$root/dev/ptmx"
  for what in fd:/proc/self/fd stdin:fd/0 stdout:fd/1 stderr:fd/2; do ln -s "${what#*:}" "$root/dev/${what%%:*}"; done
  mount -t tmpfs -o mode=755 tmpfs "$root/run"
  # On the disk of this machine, not on the overlay that the rest is on.
  for dir in containerd lazarette; do mount --bind "$node/$dir" "$root/var/lib/$dir"; done
  while read -r from to; do
    [ -d "$from" ] || : >>"$root$to"
    mount --bind -o ro "$from" "$root$to"
  done <"$node/shared"
  cd "$root"
  mkdir -p .outside
  pivot_root . .outside
  umount -l /.outside
  exec env -i container=lazarette PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin /lib/systemd/systemd
'

# in_node COMMAND...: as if on its command line.
in_node() {
  nsenter --target "$INIT" --mount --uts --ipc --pid --cgroup --root --wd -- \
    env -i HOME=/root PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin "$@"
}

# halt_node: as a power failure does: nobody in it is asked.
halt_node() {
  [ -n "${NODE_PID:-}" ] || return 0
  stop_node_pid "$NODE_PID"
  wait "$NODE_PID" 2>/dev/null || true
  NODE_PID=
  wait_for 120 'its cgroups to be empty' remove_cgroups || true
}
# --kill-child ends the node with this.
stop_node_pid() { kill -KILL "$1" 2>/dev/null || true; }
remove_cgroups() {
  [ ! -d "$NODE_CGROUP" ] || find "$NODE_CGROUP" -depth -type d -exec rmdir {} \; 2>/dev/null
  [ ! -d "$NODE_CGROUP" ]
}
