#!/usr/bin/env bash
# cri-credentials.test.sh - kubelet's image service through lazd: an unmodified containerd, a registry
# that wants user and password, and crictl, which hands them over as kubelet does. Docker's config has
# none. Layers come lazily by what came with the pull; wrong ones fail as containerd says; nothing secret
# is written anywhere. Needs root. Ends with "N passed, M failed".
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
. "$here/../lib/common.sh"
. "$here/../lib/registry.sh"
. "$here/../lib/laz.sh"
. "$here/../lib/checks.sh"
. "$here/../lib/lazd.sh"

# refused WHAT COMMAND...: it fails, and says that the registry refused.
refused() {
  local what=$1 code=0; shift
  "$@" >"$SCRATCH/out" 2>&1 || code=$?
  if [ "$code" != 0 ] && grep -qiE 'unauthorized|authorization failed|no basic auth' "$SCRATCH/out"; then ok "$what"
  else bad "$what" "exit $code: $(tail -n 3 "$SCRATCH/out")"; fi
}

# set_password PASSWORD: of the user "tenant". docker-registry takes bcrypt only, and reads the file
# again when it changes.
set_password() {
  # shellcheck disable=SC2016  # it is Perl's
  perl -e 'print "tenant:", crypt($ARGV[0], q($2b$05$) . "lazarettelazarettelaze"), "\n"' "$1" >"$SCRATCH/htpasswd.new"
  mv "$SCRATCH/htpasswd.new" "$SCRATCH/htpasswd"
}

# start_private_registry DIR: serves DIR/data to who knows the password; sets PRIVATE and PRIVATE_PID.
start_private_registry() {
  local dir=$1
  cat >"$dir/private.yml" <<CONFIG
version: 0.1
log: {level: info, accesslog: {disabled: true}}
storage:
  filesystem: {rootdirectory: $dir/data, maxthreads: 100}
  cache: {blobdescriptor: inmemory}
http: {addr: "127.0.0.1:0"}
auth: {htpasswd: {realm: lazarette, path: $SCRATCH/htpasswd}}
CONFIG
  docker-registry serve "$dir/private.yml" >"$dir/private.log" 2>&1 &
  PRIVATE_PID=$!
  at_exit stop_pid "$PRIVATE_PID"
  wait_for 60 'docker-registry with passwords' private_refuses "$dir/private.log" ||
    { tail -n 3 "$dir/private.log" >&2; die "docker-registry with passwords does not start"; }
}
# private_refuses LOG: it is up when it refuses whom it does not know.
private_refuses() {
  PRIVATE=$(listens "$1") || return 1
  [ "$(curl -s --noproxy '*' -o /dev/null -w '%{http_code}' "http://$PRIVATE/v2/")" = 401 ]
}

# start_cri: lazd with kubelet's image service.
start_cri() {
  # Nothing comes that nobody asked for: what is not on disk has to be fetched with a password.
  printf '[source]\ndocker_config = "/nonexistent"\n[snapshotter]\nfill = false\n[cri]\ncontainerd = "%s"\n' \
    "$DIR/c/containerd.sock" >"$DIR/lazd.toml"
  start_lazd cri.sock --config "$DIR/lazd.toml" --debug
}

# crictl_at SOCKET ARGUMENT...
crictl_at() {
  local socket=$1; shift
  "$CRICTL" --config "$SCRATCH/crictl.yaml" --timeout 120s --runtime-endpoint "unix://$DIR/c/containerd.sock" --image-endpoint "unix://$socket" "$@"
}
crictl() { crictl_at "$DIR/run/cri.sock" "$@"; }
# As containerd itself tells it, without a detour.
direct() { crictl_at "$DIR/c/containerd.sock" "$@"; }

# looks_at IMAGE: a container reads something of it.
looks_at() { "${CTR[@]}" run --rm --cgroup "$CGROUP/look" --snapshotter lazarette "$1" "test-$$-$RANDOM" sha256sum /bin/bash; }
# looks WHAT IMAGE: and what it should.
looks() {
  local out code=0
  out=$(looks_at "$2" 2>&1) || code=$?
  equal "$1" "$code $out" "0 $EXPECTED"
}

# gone IMAGE: kubelet removes it, too.
gone() {
  works "removes $1" crictl rmi "$1"
  wait_for 120 'snapshots to go' no_snapshots || true
  settles 'nothing of it is left mounted' 0 lazy_mounts
}

# written WORD: whether it is in a log or on disk.
written() { grep -rlF -e "$1" "$DIR/lazd.log" "$DIR/root" "$DIR/run" 2>/dev/null | head -n 1; }

# generation NAME CONFIG PROGRAMS
generation() {
  GENERATION=$1
  make_node "$SCRATCH/$1"
  local image=$PRIVATE/debian:esgz old=Secret-Of-$1 new=Rotated-Of-$1 layers=$LAYERS
  set_password "$old"
  start_cri
  start_containerd "$2" "$3"
  CTR+=(--namespace k8s.io)
  reconnected
  refused 'without a password' crictl pull "$image"
  refused 'with a wrong one' crictl pull --creds tenant:Wrong-Of-All "$image"
  equal 'and nothing is mounted' "$(lazy_mounts)" 0
  works 'with the right one' crictl pull --creds "tenant:$old" "$image"
  equal 'every layer is mounted' "$(lazy_mounts)" "$layers"
  equal 'every layer is a remote snapshot' "$(remote_snapshots)" "$layers"
  looks 'it runs' "$image"
  equal 'lists what containerd lists' "$(crictl images -o json)" "$(direct images -o json)"
  equal 'finds what containerd finds' "$(crictl inspecti "$image" | jq -S .status)" "$(direct inspecti "$image" | jq -S .status)"
  works 'tells of its file system' crictl imagefsinfo
  # Another tenant does not know it, and what the first one said stays.
  refused 'with a wrong one again' crictl pull --creds tenant:Wrong-Of-All "$image"
  gone "$image"
  set_password "$new"
  refused 'with the old one after a rotation' crictl pull --creds "tenant:$old" "$image"
  works 'with the new one' crictl pull --creds "tenant:$new" "$image"
  equal 'every layer is mounted after a rotation' "$(lazy_mounts)" "$layers"
  stop_pid "$LAZD_PID"
  refused_connection
  start_cri
  reconnected
  equal 'every layer is mounted after a restart' "$(lazy_mounts)" "$layers"
  # Nothing of them was read before, and passwords do not outlast the process.
  if looks_at "$image" >/dev/null 2>&1; then bad 'what is not here cannot be read after a restart'
  else ok 'what is not here cannot be read after a restart'; fi
  works 'and the log says why' grep -q "denied by $PRIVATE" "$DIR/lazd.log"
  works 'a pull brings the password again' crictl pull --creds "tenant:$new" "$image"
  looks 'and what is mounted can be read' "$image"
  stop_pid "$LAZD_PID"
  start_cri
  reconnected
  looks 'runs after a restart, from what is on disk' "$image"
  gone "$image"
  equal 'the log is of all of ours' "$(grep -c 'a pull came with credentials' "$DIR/lazd.log" | sed 's/^[1-9][0-9]*$/some/')" some
  for word in "$old" "$new" Wrong-Of-All "$(printf 'tenant:%s' "$new" | base64)"; do
    equal 'no password is written anywhere' "$(written "$word")" ''
  done
  finish
}
refused_connection() { if crictl images >"$SCRATCH/out" 2>&1; then bad 'a stopped lazd does not listen'; else ok 'a stopped lazd does not listen'; fi; }

is_root || { say "SKIPPED (needs root): cri-credentials.test.sh"; echo "0 passed, 1 failed"; exit 1; }
command -v go >/dev/null || { say "SKIPPED (needs Go 1.21 or later, which Debian 12 has not): cri-credentials.test.sh"; echo "0 passed, 0 failed"; exit 0; }
CRICTL=$("$here/crictl.sh")/crictl
SID=$("$here/containerd.sh")
TRIXIE=$("$here/containerd.sh" trixie)
make_scratch cri
: >"$SCRATCH/crictl.yaml"
build_laz
build_lazd
start_registry "$SCRATCH/registry"
read -r _ layout < <("$here/../images/build.sh" debian)
push_layout "$layout" debian debian:gzip
use_fresh_store "$SCRATCH/laz"
laz image convert --to estargz "$REGISTRY/debian:gzip" "$REGISTRY/debian:esgz" >/dev/null 2>&1
EXPECTED=$(laz run "$REGISTRY/debian:gzip" sha256sum /bin/bash)
LAYERS=$(skopeo inspect --raw --tls-verify=false "docker://$REGISTRY/debian:esgz" | jq '.layers | length')
remove_tree "$SCRATCH/laz"
stop_pid "$REGISTRY_PID"
set_password none
start_private_registry "$SCRATCH/registry"

generation 1.6 2 /usr/bin
generation 1.7 2 "$TRIXIE"
generation 2.1 3 "$SID"

summary
