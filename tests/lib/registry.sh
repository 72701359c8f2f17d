# shellcheck shell=bash
# registry.sh - Debian's docker-registry on loopback, and skopeo to fill it. Sourced, after common.sh.
#
# A registry listens on 127.0.0.1 only, writes below the directory it is given, and ends with the
# script that started it.

# start_registry DIR: serves DIR/data; sets REGISTRY (host:port) and REGISTRY_PID.
start_registry() {
  local dir=$1 try
  mkdir -p "$dir"
  for try in 1 2 3; do
    REGISTRY=127.0.0.1:$(free_port)
    cat >"$dir/registry.yml" <<CONFIG
version: 0.1
log: {level: warn, accesslog: {disabled: true}}
storage:
  filesystem: {rootdirectory: $dir/data, maxthreads: 100}
  cache: {blobdescriptor: inmemory}
http: {addr: "$REGISTRY"}
CONFIG
    docker-registry serve "$dir/registry.yml" >"$dir/registry.log" 2>&1 &
    REGISTRY_PID=$!
    echo "$REGISTRY_PID" >"$dir/registry.pid"
    if wait_for 10 "docker-registry on $REGISTRY" registry_answers; then
      at_exit stop_pid "$REGISTRY_PID"
      return
    fi
    stop_pid "$REGISTRY_PID"
    say "docker-registry did not start on $REGISTRY (try $try):"; tail -n 3 "$dir/registry.log" >&2
  done
  die "docker-registry does not start; its log is above"
}

# It is ours only if our own process is alive: the port may have been taken by another.
registry_answers() {
  kill -0 "$REGISTRY_PID" || return 1
  curl -sf --noproxy '*' "http://$REGISTRY/v2/"
}

# push_layout LAYOUT NAME REPOSITORY:TAG [SKOPEO OPTION...]: sets nothing, prints nothing.
push_layout() {
  local layout=$1 name=$2 to=$3; shift 3
  skopeo --insecure-policy copy -q --preserve-digests --dest-tls-verify=false "$@" "oci:$layout:$name" "docker://$REGISTRY/$to" >&2
}

# layer_bytes REPOSITORY:TAG: the sum of the layers as the registry serves them.
layer_bytes() {
  skopeo inspect --raw --tls-verify=false "docker://$REGISTRY/$1" | jq '[.layers[].size] | add'
}
