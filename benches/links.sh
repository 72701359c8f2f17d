# shellcheck shell=bash
# links.sh - the same registry behind links of other speeds. Sourced, after common.sh and registry.sh.
#
# Each link is a network namespace with a registry of its own over the same files, reached through a
# veth pair whose registry end is shaped with tbf. The delay is added by the benchmark's own proxy
# (benches/src/proxy.rs). One run has links at a time (a lock says so), so what a killed run left
# behind is known by its name and taken away first. All of it goes when the script ends.

# shellcheck disable=SC2034  # run.sh goes through them
LINKS=(1g 100m)
declare -A LINK_RATE=([1g]='rate 1gbit burst 512kb latency 100ms' [100m]='rate 100mbit burst 128kb latency 200ms')
declare -A LINK_NET=([1g]=10.77.1 [100m]=10.77.2)

# Waits for another run; its lock goes with it, however it ends.
lock_links() {
  exec 8>"$LAZ_CACHE/bench.lock"
  flock -n 8 || { say "Waiting for another run of the benchmark"; flock 8; }
}

# start_link LINK DATA DIR: serves the registry files in DATA behind LINK; sets LINK_REGISTRY (host:port).
# The shell keeps the lock: programs started here must not.
start_link() {
  local link=$1 data=$2 dir=$3 ns=laz-bench-$1 veth=laz-bench-$1 net=${LINK_NET[$1]} rate
  read -ra rate <<<"${LINK_RATE[$link]}"
  stop_link "$link"
  mkdir -p "$dir"
  at_exit stop_link "$link"
  ip netns add "$ns"
  ip link add "$veth" type veth peer name eth0 netns "$ns"
  ip addr add "$net.1/30" dev "$veth"; ip link set "$veth" up
  ip -n "$ns" addr add "$net.2/30" dev eth0; ip -n "$ns" link set eth0 up; ip -n "$ns" link set lo up
  ip netns exec "$ns" tc qdisc add dev eth0 root tbf "${rate[@]}"
  cat >"$dir/$link.yml" <<CONFIG
version: 0.1
log: {level: warn, accesslog: {disabled: true}}
storage:
  filesystem: {rootdirectory: $data, maxthreads: 100}
  cache: {blobdescriptor: inmemory}
http: {addr: "$net.2:5000"}
CONFIG
  # `ip netns exec` becomes the registry, so its process is our child and is ended by its id.
  ip netns exec "$ns" docker-registry serve "$dir/$link.yml" >"$dir/$link.log" 2>&1 8>&- &
  at_exit stop_pid "$!"
  LINK_REGISTRY=$net.2:5000
  wait_for 10 "docker-registry behind $link" curl -sf --noproxy '*' "http://$LINK_REGISTRY/v2/"
}

# The pair goes with either end, whatever still runs in the namespace keeps no name.
stop_link() {
  ip link del "laz-bench-$1" 2>/dev/null || true
  ip netns del "laz-bench-$1" 2>/dev/null || true
}
