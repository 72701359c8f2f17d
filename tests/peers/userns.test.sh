#!/usr/bin/env bash
# userns.test.sh - a pod in a user namespace (kubelet's hostUsers: false), as crictl asks for it, with an unmodified
# containerd 2.1 and a runc that can do it: no image is copied for it, its files have the owners that the image says, and
# nothing is left. `ctr` and other containerds are in snapshotter.test.sh. Needs root, and Go. Ends with
# "N passed, M failed".
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
. "$here/../lib/common.sh"
. "$here/../lib/registry.sh"
. "$here/../lib/laz.sh"
. "$here/../lib/checks.sh"
. "$here/../lib/grpc.sh"
. "$here/../lib/lazd.sh"

is_root || { say "SKIPPED (needs root): userns.test.sh"; echo "0 passed, 1 failed"; exit 1; }
PATH=$PATH:/usr/local/go/bin
command -v go >/dev/null || { say "SKIPPED (needs Go 1.21 or later, which Debian 12 has not): userns.test.sh"; echo "0 passed, 0 failed"; exit 0; }

crictl() {
  "$CRICTL" --config "$SCRATCH/crictl.yaml" --timeout 120s --runtime-endpoint "unix://$DIR/c/containerd.sock" \
    --image-endpoint "unix://$DIR/c/containerd.sock" "$@" 2>"$SCRATCH/said" || { tail -n 1 "$SCRATCH/said" >&2; return 1; }
}
end_pods() { [ ! -S "$DIR/c/containerd.sock" ] || crictl rmp --force --all >/dev/null; }
mounted_for_snapshots() { grep -c " $DIR/root/snapshots/" /proc/self/mountinfo || true; }

CRICTL=$("$here/crictl.sh")/crictl
RUNC=$("$here/runc-go.sh")
SID=$("$here/containerd.sh")
make_scratch userns
build_laz
build_lazd
start_registry "$SCRATCH/registry"
read -r _ layout < <("$here/../images/build.sh" debian)
push_layout "$layout" debian debian:gzip
# What keeps the pod's namespaces has to last.
cp -r "$layout" "$SCRATCH/pause"
umoci config --image "$SCRATCH/pause:debian" --tag pause --config.cmd sleep --config.cmd infinity
push_layout "$SCRATCH/pause" pause pause:gzip
use_fresh_store "$SCRATCH/laz"
IMAGE=$REGISTRY/debian:esgz
laz image convert --to estargz "$REGISTRY/debian:gzip" "$IMAGE" >/dev/null 2>&1
EXPECTED=$(laz run "$REGISTRY/debian:gzip" sha256sum /bin/bash)
remove_tree "$SCRATCH/laz"

: >"$SCRATCH/crictl.yaml"
mkdir "$SCRATCH/cni" "$SCRATCH/logs"
cat >"$SCRATCH/cni/10-pods.conflist" <<CNI
{"cniVersion": "1.0.0", "name": "pods", "plugins": [{"type": "ptp", "ipam": {
  "type": "host-local", "dataDir": "$SCRATCH/addresses", "ranges": [[{"subnet": "198.18.77.0/24"}]]}}]}
CNI
# Who runs tests may not be allowed to make a process harder to kill.
MORE="\$a [plugins.'io.containerd.cri.v1.images'.pinned_images]\nsandbox = '$REGISTRY/pause:gzip'\n"
MORE+="[plugins.'io.containerd.cri.v1.runtime']\nrestrict_oom_score_adj = true\nnetns_mounts_under_state_dir = true\n"
MORE+="[plugins.'io.containerd.cri.v1.runtime'.cni]\nbin_dirs = ['/usr/lib/cni']\nconf_dir = '$SCRATCH/cni'"
PATH=$RUNC:$PATH
begin 2.1 3 "$SID" "$MORE"
at_exit end_pods
CTR+=(--namespace k8s.io)

ids='[{"host_id": 100000, "container_id": 0, "length": 65536}]'
security="\"security_context\": {\"namespace_options\": {\"userns_options\": {\"mode\": 0, \"uids\": $ids, \"gids\": $ids}}}"
cat >"$SCRATCH/pod.json" <<POD
{"metadata": {"name": "pod", "namespace": "default", "uid": "1", "attempt": 1}, "log_directory": "$SCRATCH/logs",
  "linux": {"cgroup_parent": "$CGROUP", $security}}
POD
cat >"$SCRATCH/container.json" <<CONTAINER
{"metadata": {"name": "one"}, "image": {"image": "$IMAGE"}, "command": ["sleep", "infinity"], "log_path": "log",
  "linux": {$security}}
CONTAINER

works 'pulls' crictl pull "$IMAGE"
works 'runs a pod' crictl runp "$SCRATCH/pod.json"
POD=$(tail -n 1 "$SCRATCH/out")
works 'makes a container' crictl create "$POD" "$SCRATCH/container.json" "$SCRATCH/pod.json"
CONTAINER=$(tail -n 1 "$SCRATCH/out")
works 'starts it' crictl start "$CONTAINER"
equal 'owners are right, and it can write' "$(crictl exec -s "$CONTAINER" sh -c \
  'cat /proc/self/uid_map && stat -c %u:%g / /bin/bash /etc/shadow && sha256sum /bin/bash && echo mine >/etc/mine && stat -c %u:%g /etc/mine' | tr -s ' ')" \
  " 0 100000 65536
0:0
0:0
0:42
$(tr -s ' ' <<<"$EXPECTED")
0:0"
equal 'its root is another user of the host' "$(stat -c %u "/proc/$(crictl inspect "$CONTAINER" | jq .info.pid)")" 100000
equal 'two images, the pod and the container, and no copy' "$(snapshots | awk '{print $NF}' | sort | uniq -c | xargs)" '2 Active 2 Committed'
equal 'every layer came lazily' "$(remote_snapshots)" 2
works 'stops the pod' crictl stopp "$POD"
works 'removes the pod' crictl rmp "$POD"
settles 'what was mounted for it is gone' 0 mounted_for_snapshots
works 'removes the images' crictl rmi "$IMAGE" "$REGISTRY/pause:gzip"
nothing_left 'a pod in a user namespace'
finish

summary
