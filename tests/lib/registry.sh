# shellcheck shell=bash
# registry.sh - Debian's docker-registry on loopback, and skopeo to fill it. Sourced, after common.sh.
#
# A registry listens on 127.0.0.1 only, writes below the directory it is given, and ends with the
# script that started it.

# start_registry DIR: serves DIR/data; sets REGISTRY (host:port) and REGISTRY_PID.
start_registry() {
  local dir=$1
  mkdir -p "$dir"
  cat >"$dir/registry.yml" <<CONFIG
version: 0.1
log: {level: info, accesslog: {disabled: true}}
storage:
  filesystem: {rootdirectory: $dir/data, maxthreads: 100}
  cache: {blobdescriptor: inmemory}
http: {addr: "127.0.0.1:0"}
CONFIG
  docker-registry serve "$dir/registry.yml" >"$dir/registry.log" 2>&1 &
  REGISTRY_PID=$!
  at_exit stop_pid "$REGISTRY_PID"
  echo "$REGISTRY_PID" >"$dir/registry.pid"
  wait_for 60 docker-registry listens "$dir/registry.log" || { tail -n 3 "$dir/registry.log" >&2; die "docker-registry does not start"; }
  REGISTRY=$(listens "$dir/registry.log")
}

# listens LOG: where a docker-registry listens that took whatever port was free: nobody can take it in between.
listens() { sed -nE 's/.*"listening on ([0-9.:]+)".*/\1/p' "$1" | grep .; }

# push_layout LAYOUT NAME REPOSITORY:TAG [SKOPEO OPTION...]: sets nothing, prints nothing.
push_layout() {
  local layout=$1 name=$2 to=$3; shift 3
  skopeo --insecure-policy copy -q --preserve-digests --dest-tls-verify=false "$@" "oci:$layout:$name" "docker://$REGISTRY/$to" >&2
}

# layer_bytes REPOSITORY:TAG: the sum of the layers as the registry serves them.
layer_bytes() {
  skopeo inspect --raw --tls-verify=false "docker://$REGISTRY/$1" | jq '[.layers[].size] | add'
}
