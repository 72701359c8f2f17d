#!/usr/bin/env bash
# e2e.sh - the whole way, with real parts: Debian images, docker-registry on loopback, skopeo and umoci
# as the second opinion, and `laz`. Needs root. Ends with "N passed, M failed".
#
# What it holds: a lazy start fetches less than a quarter of the python image; a full read of a lazy
# tree equals umoci's unpacked tree; plain gzip and zstd images run too; an image fetches nothing of the
# files that another one brought; exit codes and messages are what a user of docker expects; nothing is
# left behind.
# shellcheck disable=SC2016  # what stands in single quotes is for the shell in the container
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
. "$here/lib/common.sh"
. "$here/lib/registry.sh"
. "$here/lib/laz.sh"
. "$here/lib/checks.sh"

FETCHED_PERCENT_MAX=25
# Spans of a plain gzip layer bring more along than the chunks of an eStargz do.
INDEXED_PERCENT_MAX=45
# What python has of debian's files, and what its layers save by that.
SHARED_PERCENT_MIN=80 SAVED_PERCENT_MIN=50
# What a first start fetches of an image that was converted by a profile, to the same without.
PROFILED_PERCENT_MAX=95

# has WHAT TEXT PART: TEXT names PART
has() { if [[ $2 == *"$3"* ]]; then ok "$1"; else bad "$1" "'$3' is not in: $2"; fi; }

# try COMMAND...: sets CODE, OUT and ERR; bounded, so that a hanging start is a failure, not a hang.
try() {
  CODE=0
  "$@" >"$SCRATCH/out" 2>"$SCRATCH/err" </dev/null || CODE=$?
  OUT=$(tr -d '\0' <"$SCRATCH/out"); ERR=$(tr -d '\0' <"$SCRATCH/err")
}
run_laz() { timeout --kill-after=10 600 "$LAZ" --root "$LAZ_ROOT" --state "$LAZ_STATE" "$@"; }

# fresh: the next start finds nothing of the image on this machine.
fresh() { use_fresh_store "$SCRATCH/laz"; }

prepare() {
  local name path
  build_laz
  while read -r name path; do layout[$name]=$path; done < <("$here/images/build.sh" debian python)
  start_registry "$SCRATCH/registry"
  for name in debian python; do push_layout "${layout[$name]}" "$name" "$name:gzip"; done
  push_layout "${layout[python]}" python-zstd python:zstd
  fresh
  for name in debian python; do
    try run_laz image convert --to estargz "$REGISTRY/$name:gzip" "$REGISTRY/$name:esgz"
    equal "laz image convert $name" "$CODE ${ERR:0:300}" "0 ${ERR:0:300}"
  done
}

check_lazy_start() {
  local percent total
  fresh
  try run_laz --output json run --rm --trace-file "$SCRATCH/record.json" "$REGISTRY/python:esgz"
  equal 'eStargz python: exit code' "$CODE" 0
  has 'eStargz python: runs its program' "$OUT" READY
  total=$(layer_bytes python:esgz)
  equal 'the record knows the size of the image' "$(jq .image_bytes "$SCRATCH/record.json")" "$total"
  percent=$(jq -r --argjson total "$total" '.fetched_bytes * 100 / $total | floor' "$SCRATCH/record.json")
  if [ "$percent" -lt "$FETCHED_PERCENT_MAX" ] && [ "$(jq .fetched_bytes "$SCRATCH/record.json")" -gt 100000 ]; then
    ok "eStargz python: fetched $percent % of the image"
  else bad "eStargz python: fetched less than $FETCHED_PERCENT_MAX %" "fetched $percent %"; fi
}

# fetches_little WHAT: the start of python:gzip that is about to happen is lazy.
fetches_little() {
  local percent
  try run_laz run --rm --trace-file "$SCRATCH/record.json" "$REGISTRY/python:gzip"
  equal "$1: exit code" "$CODE" 0
  percent=$(jq -r '.fetched_bytes * 100 / .image_bytes | floor' "$SCRATCH/record.json")
  if [ "$percent" -lt "$INDEXED_PERCENT_MAX" ] && [ "$percent" -gt 0 ]; then ok "$1: fetched $percent % of the image"
  else bad "$1: fetched less than $INDEXED_PERCENT_MAX %" "fetched $percent %"; fi
}

# first_start TAG: starts it on a node that knows nothing of it; sets FETCHED, in bytes.
first_start() {
  use_fresh_store "$SCRATCH/first"
  try run_laz run --rm --trace-file "$SCRATCH/first.json" "$REGISTRY/$1"
  equal "$1: its first start: exit code" "$CODE" 0
  has "$1: its first start runs its program" "$OUT" READY
  FETCHED=$(jq .fetched_bytes "$SCRATCH/first.json")
}

# Of the image converted by what this node recorded of its starts, others fetch less.
check_profiled() {
  local plain profiled
  try run_laz image convert --to zstd-chunked --profile "$REGISTRY/python:gzip" "$REGISTRY/python:profiled"
  equal 'laz image convert --profile' "$CODE ${ERR:0:300}" "0 ${ERR:0:300}"
  try run_laz image convert --to zstd-chunked "$REGISTRY/python:gzip" "$REGISTRY/python:chunked"
  equal 'laz image convert without it' "$CODE ${ERR:0:300}" "0 ${ERR:0:300}"
  local root=$LAZ_ROOT state=$LAZ_STATE
  first_start python:chunked; plain=$FETCHED
  first_start python:profiled; profiled=$FETCHED
  LAZ_ROOT=$root LAZ_STATE=$state
  if [ "$profiled" -gt 100000 ] && [ $((profiled * 100)) -lt $((plain * PROFILED_PERCENT_MAX)) ]; then
    ok "converted with --profile: a first start fetches $((profiled >> 10)) KiB instead of $((plain >> 10))"
  else bad "converted with --profile: fetches less than $PROFILED_PERCENT_MAX % of what it does without" "$profiled to $plain bytes"; fi
}

# An image nobody rebuilt: indexed by its first pull, lazy after eviction, and on a node that trusts a pushed index.
check_index() {
  fresh
  try run_laz run --rm "$REGISTRY/python:gzip"; equal 'gzip python: runs' "$CODE" 0
  try run_laz store evict --all; equal 'laz store evict --all' "$CODE" 0
  fetches_little 'gzip python after eviction, with a profile'
  has 'it used the profile' "$(jq -c .profile "$SCRATCH/record.json")" '"blocks"'
  check_profiled
  openssl genpkey -algorithm ed25519 -out "$SCRATCH/key.pem" 2>/dev/null
  openssl pkey -in "$SCRATCH/key.pem" -pubout -out "$SCRATCH/key.pub"
  try run_laz image index --push --key "$SCRATCH/key.pem" "$REGISTRY/python:gzip"
  equal 'laz image index --push' "$CODE" 0
  try run_laz image profile push "$REGISTRY/python:gzip"; equal 'laz image profile push' "$CODE" 0
  printf '[trust]\nindex_keys = ["%s"]\n' "$SCRATCH/key.pub" >"$SCRATCH/trust.toml"
  export LAZARETTE_CONFIG=$SCRATCH/trust.toml
  fresh
  fetches_little 'gzip python on a node that trusts the index'
  has 'its first start used the profile that was pushed' "$(jq -c .profile "$SCRATCH/record.json")" '"blocks"'
  check_tree python gzip
  unset LAZARETTE_CONFIG
}

# layers_of IMAGE: the digests of its layers, and their sizes.
layers_of() {
  skopeo inspect --raw --tls-verify=false "docker://$REGISTRY/$1" | jq -r '.layers[] | "\(.digest) \(.size)"' | sort
}
# pull_whole IMAGE: sets FETCHED and COPIED, the bytes that came and those that other layers had.
pull_whole() {
  try run_laz --output json pull --full "$REGISTRY/$1"
  equal "laz pull --full $1" "$CODE ${ERR:0:300}" "0 ${ERR:0:300}"
  read -r FETCHED COPIED < <(jq -r '"\(.fetched_bytes) \(.copied_bytes)"' <<<"$OUT")
}

# Python is made on debian; in another format they have files in common, and no layer.
check_shared_files() {
  local alone own files saved
  try run_laz image convert --to zstd-chunked "$REGISTRY/python:gzip" "$REGISTRY/python:zstdc"
  equal 'laz image convert --to zstd-chunked' "$CODE ${ERR:0:300}" "0 ${ERR:0:300}"
  equal 'debian and python share no layer' "$(comm -12 <(layers_of debian:esgz) <(layers_of python:zstdc))" ''
  fresh
  pull_whole python:zstdc; alone=$FETCHED own=$COPIED
  fresh
  pull_whole debian:esgz
  try run_laz --output json images; files=$(jq '.[0].data_bytes' <<<"$OUT")
  pull_whole python:zstdc; saved=$((alone - FETCHED))
  if [ "$((COPIED - own))" -gt "$((files * SHARED_PERCENT_MIN / 100))" ]; then
    ok "python after debian: $COPIED bytes of files were here, of $files that debian has"
  else bad "python after debian: more than $SHARED_PERCENT_MIN % of debian's $files bytes are not fetched again" "copied $COPIED, alone $own"; fi
  if [ "$((saved * 100))" -gt "$((alone * SAVED_PERCENT_MIN))" ]; then ok "python after debian: fetched $FETCHED bytes, alone $alone"
  else bad "python after debian: fetches $SAVED_PERCENT_MIN % less than alone" "fetched $FETCHED, alone $alone"; fi
  try run_laz store check; equal 'all of it is right' "$CODE" 0
}

check_plain_starts() {
  local tag
  for tag in python:gzip python:zstd debian:gzip debian:esgz; do
    fresh
    try run_laz run --rm "$REGISTRY/$tag" sh -c 'echo hello $((6 * 7)) && test -s /etc/debian_version'
    equal "$tag runs a command" "$CODE $OUT" "0 hello 42"
  done
  equal 'the zstd image is really zstd' "$(skopeo inspect --raw --tls-verify=false "docker://$REGISTRY/python:zstd" |
    jq -r '[.layers[].mediaType | endswith("+zstd")] | all')" true
}

# hold IMAGE: starts a container that waits for its standard input to end; sets HELD (laz) and INIT (its process).
hold() {
  local marker=held-$RANDOM$RANDOM
  mkfifo "$SCRATCH/$marker"
  run_laz run --rm -i "$REGISTRY/$1" sh -c "read -r line; exit 0; : $marker" <"$SCRATCH/$marker" >"$SCRATCH/held.out" 2>&1 &
  HELD=$!
  exec 8>"$SCRATCH/$marker"
  wait_for 120 "the container of $1" in_container "$marker" || { cat "$SCRATCH/held.out" >&2; return 1; }
  INIT=$(in_container "$marker")
}
# The process of that marker which lives in another root: laz itself has the marker on its command line too.
in_container() {
  local pid
  for pid in $(pgrep -f "$1"); do
    [ "$(readlink "/proc/$pid/ns/mnt")" = "$(readlink /proc/self/ns/mnt)" ] ||
      { [ "$(tr '\0' ' ' <"/proc/$pid/cmdline" | cut -d' ' -f1)" = sh ] && echo "$pid" && return; }
  done
  return 1
}
release() { exec 8>&-; wait "$HELD"; }

check_tree() {
  local image=$1 tag=$2
  [ -d "$SCRATCH/unpacked-$image" ] ||
    quietly "$SCRATCH/umoci.log" umoci unpack --image "${layout[$image]}:$image" "$SCRATCH/unpacked-$image"
  "$here/lib/manifest.sh" "$SCRATCH/unpacked-$image/rootfs" >"$SCRATCH/wanted.raw"
  fresh
  hold "$image:$tag" || { bad "$image:$tag stays up for a full read"; return; }
  "$here/lib/manifest.sh" "/proc/$INIT/root" "$INIT" >"$SCRATCH/got.raw" || true
  awk '$5 != "/" {print "." $5}' "/proc/$INIT/mountinfo" >"$SCRATCH/mounted"
  release || bad "$image:$tag ends well after a full read"
  # The same paths out of both: what the runtime puts over an image is not the image's.
  local side
  for side in wanted got; do compared "$SCRATCH/mounted" "$SCRATCH/$side.raw" >"$SCRATCH/$side"; done
  if cmp -s "$SCRATCH/wanted" "$SCRATCH/got" && [ "$(grep -c . "$SCRATCH/got")" -gt 5000 ]; then
    ok "$image:$tag: a full read equals umoci's unpack ($(grep -c . "$SCRATCH/got") facts)"
  else
    bad "$image:$tag: a full read equals umoci's unpack" "differences (wanted <, got >), first 20:"
    diff "$SCRATCH/wanted" "$SCRATCH/got" | head -20 >&2 || true
  fi
}

# compared MOUNTED MANIFEST: drops mount points and what is below them, and the mtime of the directories they are in.
compared() {
  awk -F '\t' -v OFS='\t' '
    NR == FNR {skip[$0]; p = $0; sub(/\/[^\/]*$/, "", p); touched[p]; next}
    {for (p = $NF; p ~ /\//; sub(/\/[^\/]*$/, "", p)) if (p in skip) next}
    $1 == "d" && ($NF in touched || $NF == ".") {$4 = "-"}
    {print}' "$1" "$2"
}

check_codes() {
  local image=$REGISTRY/debian:esgz
  try run_laz run --rm "$image" sh -c 'exit 42'; equal 'the exit code of the program' "$CODE" 42
  try run_laz run --rm "$image" /no/such/program; equal 'command not found: 127' "$CODE" 127
  has 'command not found: names it' "$ERR" /no/such/program
  try run_laz run --rm "$image" /etc/passwd; equal 'not executable: 126' "$CODE" 126
  has 'not executable: names it' "$ERR" /etc/passwd
  try run_laz run --rm "$REGISTRY/no/such:image"; equal 'unknown reference: 125' "$CODE" 125
  has 'unknown reference: names it' "$ERR" no/such:image
  try run_laz run --no-such-flag "$image"; equal 'bad flag: 125' "$CODE" 125
  CODE=0
  if hold debian:esgz; then
    kill -KILL "$INIT"; exec 8>&-; wait "$HELD" || CODE=$?
    equal 'killed: 137' "$CODE" 137
  else bad 'killed: 137' 'the container did not start'; fi
}

check_flags() {
  local image=$REGISTRY/debian:esgz
  mkdir -p "$SCRATCH/volume"
  try run_laz run --rm -e GREETING=ahoy -w /var/log -u nobody "$image" sh -c 'echo $GREETING $(pwd) $(id -un)'
  equal '-e, -w and -u' "$CODE $OUT" "0 ahoy /var/log nobody"
  try run_laz run --rm -v "$SCRATCH/volume:/out" "$image" sh -c 'echo written >/out/file'
  equal '-v writes through' "$CODE $(cat "$SCRATCH/volume/file" 2>/dev/null)" "0 written"
  try run_laz run --rm -v "$SCRATCH/volume:/out:ro" "$image" sh -c 'echo again >/out/file'
  equal '-v :ro does not' "$((CODE != 0)) $(cat "$SCRATCH/volume/file")" "1 written"
  try run_laz run --rm --read-only "$image" sh -c 'echo x >/etc/x'; equal '--read-only' "$((CODE != 0))" 1
  try run_laz run --rm --runtime runc "$image" sh -c 'echo by runc'; equal '--runtime runc' "$CODE $OUT" "0 by runc"
}

check_inventory() {
  fresh
  try run_laz pull "$REGISTRY/debian:esgz"; equal 'laz pull' "$CODE" 0
  try run_laz images; has 'laz images lists it' "$OUT" debian
  try run_laz store df; equal 'laz store df' "$CODE" 0
  try run_laz rmi "$REGISTRY/debian:esgz"; equal 'laz rmi' "$CODE" 0
  try run_laz --output json images; equal 'and it is gone' "$CODE $(grep -c debian <<<"$OUT" || true)" "0 0"
}

is_root || { say "SKIPPED (needs root): e2e.sh"; echo "0 passed, 1 failed"; exit 1; }
declare -A layout
make_scratch e2e
prepare
before=$(traces_left)
check_lazy_start
check_plain_starts
for tag in esgz gzip; do check_tree python "$tag"; done
check_index
check_shared_files
fresh
check_codes
check_flags
check_inventory
settles 'nothing is left behind: mounts, cgroups, processes' '' traces_since "$before"
summary
