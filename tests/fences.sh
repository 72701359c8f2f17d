#!/usr/bin/env bash
# fences.sh - holds the lines between the modules that the compiler does not hold.
#   fences.sh [DIR]        checks the tree at DIR (default: this clone); prints each breach; exit 1 if any
#   fences.sh --self-test  proves that every fence fails on a tree that breaks it, and passes on one that does not
#
# It reads code with strings emptied and comments cut, so a word in a comment is no breach.
# Tests may read what we write with the original libraries: the codec fences end at tests.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib/common.sh"

SYS='(^|/)sys(\.rs|/)'
GRPC='(^|/)grpc(\.rs|/)'
CODEC='^fetcher/src/codec(\.rs|/)'
TESTS='(^|/)tests(\.rs$|/)'
SOURCE='^fetcher/src/source(\.rs|/)'

# crate NAME: a pattern for `NAME::...` and `use NAME`, but not for a module of ours of that name.
crate() { printf '(^|[^A-Za-z0-9_:])(::)?%s::|\\b(use|extern crate) +(::)?%s\\b' "$1" "$1"; }

# each_fence FUNCTION: calls it with NAME, PATTERN of a use, PATHS where it may stand, WHY.
each_fence() {
  "$1" proto "$(crate lazarette_proto)" "^proto/|$GRPC" 'below the wire we speak our own types'
  "$1" tonic "$(crate tonic)" "^proto/|$GRPC" 'below the wire we speak our own errors'
  "$1" prost "$(crate prost)" '^proto/' 'one owner of the wire format'
  "$1" fuser "$(crate fuser)" '^snapshotter/src/fuse(\.rs|/)|^runtime/tests/cli/disk/device\.rs' 'one owner of the FUSE protocol, and a disk of a test'
  "$1" rocksdb "$(crate rocksdb)" '^fetcher/src/db(\.rs|/)' 'one owner of the database'
  "$1" nix "$(crate nix)" "$SYS" 'the kernel is behind sys'
  "$1" rustix "$(crate rustix)" "$SYS" 'the kernel is behind sys'
  "$1" libc-calls '\blibc::[a-z0-9_]+ *\(' "$SYS" 'the kernel is behind sys'
  "$1" unsafe '\bunsafe +(\{|fn|impl|extern|trait)' "$SYS" 'unsafe stands in sys'
  "$1" oci-client "$(crate oci_client)" "$SOURCE" 'network policy ends at source'
  "$1" http-client "$(crate reqwest)|$(crate hyper_rustls)|\bhyper(_util)?::client\b" "$SOURCE|^snapshotter/src/grpc/(relay|channel)\.rs" 'network policy ends at source; a socket of this node is none'
  "$1" libcontainer "$(crate libcontainer)" '^runtime/src/(executor|sys)(\.rs|/)' 'one owner of the embedded runtime'
  "$1" libseccomp "$(crate libseccomp)" '^runtime/src/executor(\.rs|/)' 'one owner of compiled filters'
  "$1" zstd "$(crate zstd)" "$CODEC|$TESTS" 'decoders are bounded in codec'
  "$1" flate2 "$(crate flate2)" "$CODEC|$TESTS" 'decoders are bounded in codec'
  "$1" ring "$(crate ring)" '^fetcher/src/(source|trust)(\.rs|/)' 'one owner of keys'
  "$1" sha2 "$(crate sha2)" "$CODEC|$TESTS|^fetcher/src/types/digest\.rs" 'only the verifier makes verified bytes'
}

# The crates of ours that a crate may depend on.
arrows_of() {
  case $1 in
    proto|fetcher) ;;
    mountd) ;;
    snapshotter) echo fetcher mountd proto ;;
    runtime) echo snapshotter fetcher proto ;;
    benches|*) echo runtime snapshotter fetcher ;;
  esac
}

breaches=0
breach() { printf '%s\n' "$1"; breaches=$((breaches + 1)); }

rust_files() {
  if git -C "$1" rev-parse --git-dir >/dev/null 2>&1; then
    git -C "$1" ls-files --cached --others --exclude-standard -- '*.rs'
  else
    (cd "$1" && find . -name '*.rs' -printf '%P\n')
  fi | LC_ALL=C sort
}

check_shape() {
  local tree=$1 file first
  while read -r file; do
    [ -e "$tree/$file" ] || continue
    [ "${file##*/}" != mod.rs ] || breach "$file: foo.rs stands beside foo/, there is no mod.rs"
    read -r first <"$tree/$file" || true
    [[ $first == '//!'* ]] || breach "$file:1: a file starts with //! and says what it is"
  done < <(rust_files "$tree")
}

# strip TREE DEST: the code alone, so that fences are one grep each.
strip() {
  local file
  while read -r file; do
    [ -e "$1/$file" ] || continue
    mkdir -p "$2/$(dirname "$file")"
    sed -E 's/"([^"\\]|\\.)*"/""/g; s@//.*@@' "$1/$file" >"$2/$file"
  done < <(rust_files "$1")
}

check_fence() {
  local name=$1 pattern=$2 allowed=$3 why=$4 path line
  while IFS=: read -r path line _; do
    [[ $path =~ $allowed ]] || breach "$path:$line: $name is not used here: $why"
  done < <(cd "$STRIPPED" && grep -rnE --include='*.rs' -- "$pattern" . | sed 's@^\./@@')
}

check_arrows() {
  local tree=$1 manifest crate to
  for manifest in "$tree"/*/Cargo.toml "$tree"/*/*/Cargo.toml; do
    [ -e "$manifest" ] || continue
    crate=$(basename "$(dirname "$manifest")")
    [ "$crate" != fuzz ] || continue
    while read -r to; do
      [[ " $crate $(arrows_of "$crate") " == *" $to "* ]] ||
        breach "$crate/Cargo.toml: $crate does not depend on $to: runtime -> snapshotter -> fetcher, nothing on benches"
    done < <(sed -nE 's/^lazarette-([a-z]+)[. =].*/\1/p' "$manifest")
  done
}

# The mount server outlives everything: it stays as small as this list.
MOUNTD_DEPENDENCIES=' crc32fast libc nix parking_lot rustix thiserror '

check_mountd() {
  local manifest=$1/snapshotter/mountd/Cargo.toml to
  [ -e "$manifest" ] || return 0
  while read -r to; do
    [[ $MOUNTD_DEPENDENCIES == *" $to "* ]] ||
      breach "snapshotter/mountd/Cargo.toml: the mount server does not depend on $to: it stays small"
  done < <(sed -nE '/^\[dependencies\]/,/^\[[a-z-]*\]$/ s/^([a-z0-9_-]+)[. =].*/\1/p' "$manifest")
}

# check TREE: prints the breaches, returns 1 if there are any.
check() {
  breaches=0
  STRIPPED=$(mktemp -d "$SCRATCH/code.XXXX")
  strip "$1" "$STRIPPED"
  [ -n "$(ls -A "$STRIPPED")" ] || die "no Rust files under $1"
  check_shape "$1"
  check_arrows "$1"
  check_mountd "$1"
  each_fence check_fence
  [ "$breaches" = 0 ]
}

# --- the proof that each of them can fail ---
failed=0 passed=0
expect() { # OUTCOME WHAT: OUTCOME is "clean", or a word the breach must name
  local out; out=$(check "$TREE") && out="$out clean"
  if [[ $out == *"$1"* ]]; then passed=$((passed + 1)); else failed=$((failed + 1)); say "FAILED: $2: wanted '$1', got: $out"; fi
}

new_tree() {
  TREE=$(mktemp -d "$SCRATCH/tree.XXXX")
  mkdir -p "$TREE"/{fetcher/src,snapshotter/src}
  printf '[dependencies]\nserde = "1"\n' >"$TREE/fetcher/Cargo.toml"
  printf '[dependencies]\nlazarette-fetcher.workspace = true\n' >"$TREE/snapshotter/Cargo.toml"
  printf '//! A file.\nuse crate::zstd::Frame; // rocksdb::DB\nconst A: &str = "unsafe { fuser::x }";\n' >"$TREE/fetcher/src/lib.rs"
}

prove_fence() {
  local name=$1 pattern=$2 allowed=$3 use
  case $name in
    unsafe) use='unsafe { f() }' ;;
    libc-calls) use='let p = libc::getpid();' ;;
    http-client) use='use hyper_util::client::legacy::Client;' ;;
    oci-client) use='use oci_client::Client;' ;;
    proto) use='use lazarette_proto::x;' ;;
    *) use="let a = $name::x();" ;;
  esac
  [[ $use =~ $pattern ]] || { failed=$((failed + 1)); say "FAILED: $name: its pattern does not match '$use'"; }
  new_tree; printf '//! A file.\n%s\n' "$use" >"$TREE/fetcher/src/elsewhere.rs"
  expect "elsewhere.rs:2: $name " "$name outside its fence"
  new_tree
  local home
  for home in proto/src/a.rs fetcher/src/sys.rs fetcher/src/grpc.rs fetcher/src/source/a.rs fetcher/src/db/a.rs fetcher/src/codec.rs \
    snapshotter/src/fuse/a.rs runtime/src/executor/a.rs; do
    [[ $home =~ $allowed ]] || continue
    mkdir -p "$TREE/$(dirname "$home")"; printf '//! A file.\n%s\n' "$use" >"$TREE/$home"
    expect clean "$name inside its fence, in $home"
    return
  done
  failed=$((failed + 1)); say "FAILED: $name has no home to stand in"
}

self_test() {
  new_tree; expect clean 'a tree without a breach'
  new_tree; mkdir "$TREE/fetcher/src/a"; echo '//! A.' >"$TREE/fetcher/src/a/mod.rs"; expect mod.rs 'a mod.rs'
  new_tree; echo 'fn a() {}' >"$TREE/fetcher/src/a.rs"; expect 'starts with //!' 'a file without a header'
  new_tree; : >"$TREE/fetcher/src/a.rs"; expect 'starts with //!' 'an empty file'
  new_tree; echo 'lazarette-snapshotter.workspace = true' >>"$TREE/fetcher/Cargo.toml"; expect 'not depend on snapshotter' 'an arrow upward'
  new_tree; echo 'lazarette-benches = { path = "../benches" }' >>"$TREE/snapshotter/Cargo.toml"; expect 'not depend on benches' 'an arrow to benches'
  new_tree; mkdir -p "$TREE/snapshotter/mountd"; printf '[dependencies]\nnix.workspace = true\n[dev-dependencies]\ntempfile.workspace = true\n' >"$TREE/snapshotter/mountd/Cargo.toml"; expect clean 'a small mount server'
  sed -i '1a tokio.workspace = true' "$TREE/snapshotter/mountd/Cargo.toml"; expect 'not depend on tokio' 'a mount server with a runtime'
  new_tree; mkdir -p "$TREE/snapshotter/mountd"; printf '[dependencies]\nlazarette-fetcher.workspace = true\n' >"$TREE/snapshotter/mountd/Cargo.toml"; expect 'mountd does not depend on fetcher' 'an arrow from the mount server'
  new_tree; printf '//! T.\nuse zstd::Decoder;\n' >"$TREE/fetcher/src/tests.rs"; expect clean 'a codec in a test'
  each_fence prove_fence
  say "fences self-test: $passed passed, $failed failed"
  [ "$failed" = 0 ]
}

make_scratch fences
case ${1:-} in
  --self-test) self_test ;;
  *) check "${1:-$REPO}" || die "the fences above are broken: move the code to where it belongs, or change the fence and say why" ;;
esac
