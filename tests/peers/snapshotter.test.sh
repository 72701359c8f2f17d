#!/usr/bin/env bash
# snapshotter.test.sh - lazd as the snapshotter of unmodified containerds: Debian 12's 1.6 and
# Debian 13's 1.7 with ctr and ctr-remote, 2.0 of its Go module and sid's 2.1 with their ctr and
# nerdctl, and all of them as kubelet asks. Layers are unpacked by containerd, or brought lazily;
# containers run on both, and go on while lazd is stopped and killed; nothing is left. Needs root.
# Ends with "N passed, M failed".
# Containers in user namespaces see the owners of their image, which is not copied for them.
# Images have one layer and three, all lazy, all unpacked and of both kinds.
#
# The parts of containerd's config that concern lazarette are those in deploy/. Everything listens
# on sockets in a scratch directory or on loopback, and is ended and unmounted at the end.
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
. "$here/../lib/common.sh"
. "$here/../lib/registry.sh"
. "$here/../lib/laz.sh"
. "$here/../lib/checks.sh"
. "$here/../lib/grpc.sh"
. "$here/../lib/lazd.sh"

LOOK='cat /etc/debian_version && sha256sum /bin/bash && echo mine >/etc/mine && cat /etc/mine && ls /usr/bin | wc -l'
# looks WHAT IMAGE: a container of it reads what it should.
looks() {
  local out code=0
  out=$("${CTR[@]}" run --rm --cgroup "$CGROUP/look" --snapshotter lazarette "$2" "test-$$-$RANDOM" sh -c "$LOOK" 2>&1) || code=$?
  equal "$1" "$code $out" "0 $EXPECTED"
}

# gone WHAT IMAGE: when it is removed nothing of it is left.
gone() {
  works "removes $1" "${CTR[@]}" images rm --sync "$2"
  nothing_left "$1"
}

# unpacked IMAGE PULL...: containerd downloads and unpacks into our mounts.
unpacked() {
  local image=$1; shift
  works 'pulls and unpacks' "$@" "$image"
  equal 'nothing is mounted lazily' "$(lazy_mounts)" 0
  looks 'runs what containerd unpacked' "$image"
  gone 'an unpacked image' "$image"
}

# of_others IMAGE PULL...: who names no snapshotter gets what containerd has without us.
of_others() {
  local out code=0 image=$1; shift
  works 'pulls without a word of us' "$@" "$image"
  equal 'we have no snapshot of it' "$(snapshots)" ""
  out=$("${CTR[@]}" run --rm --cgroup "$CGROUP/look" "$image" "test-$$-$RANDOM" sh -c "$LOOK" 2>&1) || code=$?
  equal 'runs on overlayfs' "$code $out" "0 $EXPECTED"
  works 'removes it' "${CTR[@]}" images rm --sync "$image"
}

# file_system_of_images: kubelet measures it, and measures nothing where it is not.
file_system_of_images() {
  if [ "$GENERATION" = 1.6 ]; then ln -s "$DIR/root" "$DIR/c/root/io.containerd.snapshotter.v1.lazarette"; fi
  works 'tells of the file system of images' call "$DIR/c/containerd.sock" runtime.v1.ImageService/ImageFsInfo ""
  local place; place=$(grep -aoE "$DIR/[a-z0-9./]+" "$SCRATCH/answer" || true)
  equal 'which is that of the store' "$(realpath -e "$place" 2>&1)" "$DIR/root"
}

# of_kubelet: the same by way of CRI, whose images have a namespace of their own.
of_kubelet() {
  local plain=("${CTR[@]}")
  file_system_of_images
  CTR+=(--namespace k8s.io)
  lazy 'estargz by CRI' "$ESGZ" cri_pull
  gone_of_cri 'an image of CRI' "$ESGZ"
  of_three_layers
  of_unlisted
  CTR=("${plain[@]}")
}
# CRI names an image by its id too.
gone_of_cri() {
  local name
  for name in $("${CTR[@]}" images ls -q | grep -vx "$2"); do "${CTR[@]}" images rm "$name" >/dev/null; done
  gone "$@"
}

# of_three_layers: all of an image's layers lazily, and only those that are not there already.
of_three_layers() {
  local EXPECTED=$EXPECTED_PYTHON image=$REGISTRY/python
  lazy 'three layers of estargz' "$image:esgz" cri_pull
  gone_of_cri 'an image of three layers' "$image:esgz"
  works 'unpacks what becomes the lowest layer' "${CTR[@]}" images pull ${LOCAL:+"$LOCAL"} --plain-http --snapshotter lazarette "$GZIP"
  works 'pulls an image upon it' cri_pull "$image:gzip"
  equal 'the lowest layer is a directory, and two are mounted' "$(lazy_mounts) $(remote_snapshots)" "2 2"
  looks 'runs on layers of both kinds' "$image:gzip"
  gone_of_cri 'an image of both kinds' "$image:gzip"
}

# of_unlisted: a layer with a file in /tmp, which it does not list; in the one below it is everybody's.
of_unlisted() {
  local image=$REGISTRY/debian:unlisted
  works 'pulls an image whose layer does not list a directory' cri_pull "$image"
  equal 'containerd unpacked that layer, and no other' "$(lazy_mounts) $(remote_snapshots) $(snapshots | grep -cw Committed)" "1 1 2"
  equal 'the directory is as in the layer below, with the file' \
    "$("${CTR[@]}" run --rm --cgroup "$CGROUP/look" --snapshotter lazarette "$image" "test-$$-$RANDOM" sh -c 'stat -c %a /tmp; cat /tmp/lone' | paste -sd' ')" '1777 lone'
  gone_of_cri 'an image whose layer does not list a directory' "$image"
}

# lazy NAME IMAGE PULL...: we bring the layers.
lazy() {
  local name=$1 image=$2; shift 2
  works "pulls $name" "$@" "$image"
  local layers; layers=$(skopeo inspect --raw --tls-verify=false "docker://$image" | jq '.layers | length')
  equal "$name: every layer is mounted" "$(lazy_mounts)" "$layers"
  equal "$name: every layer is a remote snapshot" "$(remote_snapshots)" "$layers"
  local blob; blob=$(skopeo inspect --raw --tls-verify=false "docker://$image" | jq -r '.layers[0].digest')
  equal "$name: containerd has no blob of it" "$("${CTR[@]}" content ls -q | grep -cx "$blob" || true)" 0
  looks "$name: runs" "$image"
  looks "$name: runs again, without what the first one wrote" "$image"
}

# restarts IMAGE: the layers stay while lazd is away, and are what a new one serves.
restarts() {
  local before; before=$(mounted)
  stop_pid "$LAZD_PID"
  equal 'a stopped lazd leaves the layers mounted' "$(mounted)" "$before"
  start_lazd snapshotter.sock
  equal 'a restarted lazd mounts nothing anew' "$(mounted)" "$before"
  reconnected
  looks 'runs after a restart of lazd' "$1"
}

# killed IMAGE: the same when it has no say.
killed() {
  local before; before=$(mounted)
  kill_lazd
  start_lazd snapshotter.sock
  equal 'a killed lazd is succeeded' "$(mounted)" "$before"
  reconnected
  looks 'runs after lazd was killed' "$1"
}
kill_lazd() {
  kill -KILL "$LAZD_PID"; wait "$LAZD_PID" 2>/dev/null || true
  rm -f "$DIR/run/snapshotter.sock"
}
# Mountpoints and the file systems on them.
mounted() { awk -v d="$DIR/run/" 'index($5, d) == 1 {print $3, $5}' /proc/self/mountinfo | sort; }

# outlives IMAGE: a container reads its files, anew each time, while lazd is killed and comes back.
outlives() {
  local expected reader kill sums=$DIR/sums
  works 'runs in the background' "${CTR[@]}" run -d --cgroup "$CGROUP/outlives" --snapshotter lazarette "$1" outlives sleep infinity
  expected=$("${CTR[@]}" task exec --exec-id first outlives sh -c "$SUM")
  equal 'a container reads what is right' "$expected" "$EXPECTED_SUM"
  "${CTR[@]}" task exec --exec-id second outlives sh -c "for i in 1 2 3 4 5 6 7 8; do $SUM || exit; done" >"$sums" 2>&1 &
  reader=$!
  for kill in 1 2 3 4 5 6; do
    sleep "0.$((RANDOM % 10))"
    kill_lazd
    sleep "0.$((RANDOM % 10))"
    start_lazd snapshotter.sock
  done
  wait "$reader" || true
  equal "reads what is right while lazd is killed $kill times" "$(sort "$sums" | uniq -c | sed 's/^ *//')" "8 $expected"
  kill_lazd
  equal 'reads what is right while there is no lazd' "$("${CTR[@]}" task exec --exec-id third outlives sh -c "$SUM" 2>&1)" "$expected"
  start_lazd snapshotter.sock
  reconnected
  "${CTR[@]}" task rm -f outlives >/dev/null 2>&1 || true
  works 'and is removed' "${CTR[@]}" containers rm outlives
}

# in_user_namespace IMAGE: a container whose ids are others on the host, on the layers that all others have. It
# is right also after lazd was killed, and when it is started again.
in_user_namespace() {
  local upper before; before=$(snapshots | wc -l)
  works 'runs in a user namespace' run_mapped "$1"
  equal 'has one snapshot more, and no copy' "$(snapshots | wc -l) $(snapshots | grep -c remap || true)" "$((before + 1)) 0"
  mapped_inside 'in a user namespace'
  equal 'its root is another user of the host' "$(stat -c %u "/proc/$("${CTR[@]}" task ls | awk '$1 == "mapped" {print $2}')")" 100000
  upper=$("${CTR[@]}" snapshots --snapshotter lazarette mounts /x mapped | grep -o 'upperdir=[^, ]*')
  equal 'so is who has what it wrote' "$(stat -c %u:%g "${upper#*=}/etc/mine")" 100000:100000
  equal 'and nothing else was written' "$(find "${upper#*=}" -type f)" "${upper#*=}/etc/mine"
  kill_lazd
  start_lazd snapshotter.sock
  reconnected
  mapped_inside 'in a user namespace, after lazd was killed'
  "${CTR[@]}" task rm -f mapped >/dev/null 2>&1 || true
  works 'starts it again' "${CTR[@]}" task start -d mapped
  mapped_inside 'in a user namespace, started again'
  "${CTR[@]}" task rm -f mapped >/dev/null 2>&1 || true
  works 'removes it' "${CTR[@]}" containers rm mapped
  settles 'what was mounted for it is gone' 0 mounted_for_snapshots
}
run_mapped() {
  "${CTR[@]}" run -d --cgroup "$CGROUP/mapped" --snapshotter lazarette --uidmap 0:100000:65536 --gidmap 0:100000:65536 --remap-labels "$1" mapped sleep infinity
}
# mapped_inside WHAT: owners are what the image says, and it can write.
mapped_inside() {
  local out
  out=$("${CTR[@]}" task exec --exec-id "look-$RANDOM" mapped sh -c \
    'id -u && stat -c %u:%g / /bin/bash /etc/shadow && sha256sum </bin/bash && echo mine >/etc/mine && stat -c %u:%g /etc/mine' 2>&1) || true
  equal "$1: owners are right" "$out" "0
0:0
0:0
0:42
$(sed -n 's/ .*\/bash$/  -/p' <<<"$EXPECTED")
0:0"
}
mounted_for_snapshots() { grep -c " $DIR/root/snapshots/" /proc/self/mountinfo || true; }

# copied IMAGE: a containerd that was not told that we map owners copies the image, as it does elsewhere; that
# the copy is mapped already is seen.
copied() {
  local programs; programs=$(dirname "${CTR[0]}")
  stop_pid "$CONTAINERD_PID"
  start_containerd 3 "$programs" '/remap-ids/d'
  works 'runs in a user namespace, without a word of us' run_mapped "$1"
  mapped_inside 'on a copy'
  "${CTR[@]}" task rm -f mapped >/dev/null 2>&1 || true
  works 'removes it' "${CTR[@]}" containers rm mapped
  works 'collects its copy' collect
  stop_pid "$CONTAINERD_PID"
  start_containerd 3 "$programs"
}

# held IMAGE: what a container needs outlives the image, and nothing outlives both.
held() {
  local layers; layers=$(lazy_mounts)
  works 'runs in the background' "${CTR[@]}" run -d --cgroup "$CGROUP/held" --snapshotter lazarette "$1" held sleep infinity
  works 'removes its image' "${CTR[@]}" images rm --sync "$1"
  equal 'it is gone' "$("${CTR[@]}" images ls -q | grep -cx "$1" || true)" 0
  equal 'its layers are held' "$(lazy_mounts)" "$layers"
  equal 'a container without its image reads what is right' "$("${CTR[@]}" task exec --exec-id held held sh -c "$SUM" 2>&1)" "$EXPECTED_SUM"
  "${CTR[@]}" task rm -f held >/dev/null 2>&1 || true
  works 'removes the container' "${CTR[@]}" containers rm held
  works 'collects what nothing holds' collect
  nothing_left 'what a container held'
}

# shared IMAGE: what two namespaces have is there once, and stays with the one that keeps it.
shared() {
  local plain=("${CTR[@]}") layers; layers=$(lazy_mounts)
  CTR+=(--namespace other)
  works 'another namespace pulls the same image' "${CTR[@]}" images pull --plain-http --snapshotter lazarette "$1"
  equal 'and has the same layers' "$(lazy_mounts) $(remote_snapshots)" "$layers $layers"
  looks 'runs in another namespace' "$1"
  works 'removes it there' "${CTR[@]}" images rm --sync "$1"
  equal 'has none there any more' "$(snapshots)" ""
  CTR=("${plain[@]}")
  equal 'what another namespace removes is here' "$(lazy_mounts) $(remote_snapshots)" "$layers $layers"
  looks 'runs when another namespace has removed it' "$1"
}

is_root || { say "SKIPPED (needs root): snapshotter.test.sh"; echo "0 passed, 1 failed"; exit 1; }
SID=$("$here/containerd.sh")
TRIXIE=$("$here/containerd.sh" trixie)
make_scratch snapshotter
build_laz
build_lazd
start_registry "$SCRATCH/registry"
while read -r -u 3 name layout; do
  push_layout "$layout" "$name" "$name:gzip"
done 3< <("$here/../images/build.sh" debian python)
# debian with a layer that has a file, and not its directory.
mkdir -p "$SCRATCH/lone/tmp"
printf 'lone\n' >"$SCRATCH/lone/tmp/lone"
tar -C "$SCRATCH/lone" -cf "$SCRATCH/lone.tar" tmp/lone
quietly "$SCRATCH/umoci" skopeo --insecure-policy copy --src-tls-verify=false "docker://$REGISTRY/debian:gzip" "oci:$SCRATCH/unlisted:debian"
quietly "$SCRATCH/umoci" umoci raw add-layer --image "$SCRATCH/unlisted:debian" "$SCRATCH/lone.tar"
push_layout "$SCRATCH/unlisted" debian debian:lone
use_fresh_store "$SCRATCH/laz"
GZIP=$REGISTRY/debian:gzip ESGZ=$REGISTRY/debian:esgz
laz image convert --to estargz "$GZIP" "$ESGZ" >/dev/null 2>&1
laz image convert --to estargz "$REGISTRY/debian:lone" "$REGISTRY/debian:unlisted" >/dev/null 2>&1
laz image convert --to estargz "$REGISTRY/python:gzip" "$REGISTRY/python:esgz" >/dev/null 2>&1
laz image convert --to zstd-chunked "$REGISTRY/python:gzip" "$REGISTRY/python:chunked" >/dev/null 2>&1
EXPECTED_PYTHON=$(laz run "$REGISTRY/python:gzip" sh -c "$LOOK")
EXPECTED=$(laz run "$GZIP" sh -c "$LOOK")
EXPECTED_SUM=$(laz run "$GZIP" sh -c "$SUM")
remove_tree "$SCRATCH/laz"

PATH=$PATH:/usr/local/go/bin
BIN=
if command -v go >/dev/null; then BIN=$("$here/stargz.sh"); fi

# before_transfer GENERATION PROGRAMS: a containerd whose ctr does not say which image a layer is of.
before_transfer() {
  begin "$1" 2 "$2"
  unpacked "$GZIP" "${CTR[@]}" images pull --plain-http --snapshotter lazarette
  of_others "$GZIP" "${CTR[@]}" images pull --plain-http
  if [ -n "$BIN" ]; then
    lazy estargz "$ESGZ" "$BIN/ctr-remote" --address "$DIR/c/containerd.sock" images rpull --plain-http --snapshotter lazarette
    restarts "$ESGZ"
    outlives "$ESGZ"
    in_user_namespace "$ESGZ"
    held "$ESGZ"
  else
    say "SKIPPED (needs Go 1.21 or later, which Debian 12 has not): ctr-remote with containerd $1"
  fi
  of_kubelet
  finish
}

# of_nerdctl LAYERS: what nerdctl's users do; LAYERS of the image come lazily.
of_nerdctl() {
  local nerdctl=("$NERDCTL" --address "$DIR/c/containerd.sock" --namespace nerdctl --data-root "$DIR/nerdctl" --snapshotter lazarette)
  local plain=("${CTR[@]}") out code=0
  if [ -z "$NERDCTL" ]; then say "SKIPPED (needs Go 1.21 or later, which Debian 12 has not): nerdctl with containerd $GENERATION"; return; fi
  CTR+=(--namespace nerdctl)
  out=$("${nerdctl[@]}" run --rm --quiet --net none --cgroup-parent "$CGROUP" "$ESGZ" sh -c "$LOOK" 2>"$SCRATCH/out") || code=$?
  equal 'nerdctl runs an image that is not there' "$code $out" "0 $EXPECTED"
  equal "nerdctl: layers that are remote snapshots" "$(remote_snapshots)" "$1"
  equal "nerdctl: layers that are mounted" "$(lazy_mounts)" "$1"
  works 'nerdctl lists it' "${nerdctl[@]}" images
  gone 'an image of nerdctl' "$ESGZ"
  CTR=("${plain[@]}")
}

# of_two: 2.0 pulls by itself what its ctr and nerdctl ask for, and does not say which image a layer is of.
of_two() {
  begin 2.0 3 "$1"
  unpacked "$GZIP" "${CTR[@]}" images pull --plain-http --snapshotter lazarette
  of_others "$GZIP" "${CTR[@]}" images pull --plain-http
  lazy estargz "$ESGZ" "$BIN/ctr-remote" --address "$DIR/c/containerd.sock" images rpull --plain-http --snapshotter lazarette
  restarts "$ESGZ"
  in_user_namespace "$ESGZ"
  gone 'a lazy image' "$ESGZ"
  of_nerdctl 0
  of_kubelet
  finish
}

before_transfer 1.6 /usr/bin
before_transfer 1.7 "$TRIXIE"
NERDCTL=
if [ -n "$BIN" ]; then
  NERDCTL=$("$here/nerdctl.sh")/nerdctl
  of_two "$("$here/containerd-go.sh" v2.0.14)"
else
  say "SKIPPED (it is built with Go, which is not here): containerd 2.0"
fi

begin 2.1 3 "$SID"
# What its ctr must be told not to ask containerd for.
LOCAL=--local
unpacked "$GZIP" "${CTR[@]}" images pull --local --plain-http --snapshotter lazarette
of_others "$GZIP" "${CTR[@]}" images pull --plain-http
of_others "$GZIP" "${CTR[@]}" images pull --plain-http --snapshotter overlayfs
of_kubelet
of_nerdctl 1
lazy gzip "$GZIP" "${CTR[@]}" images pull --plain-http --snapshotter lazarette
gone 'a lazy image' "$GZIP"
EXPECTED=$EXPECTED_PYTHON lazy zstd:chunked "$REGISTRY/python:chunked" "${CTR[@]}" images pull --plain-http --snapshotter lazarette
gone 'an image of zstd:chunked' "$REGISTRY/python:chunked"
lazy estargz "$ESGZ" "${CTR[@]}" images pull --plain-http --snapshotter lazarette
restarts "$ESGZ"
outlives "$ESGZ"
in_user_namespace "$ESGZ"
copied "$ESGZ"
shared "$ESGZ"
stop_pid "$REGISTRY_PID"
killed "$ESGZ"
held "$ESGZ"
finish

summary
