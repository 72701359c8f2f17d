#!/usr/bin/env bash
# deps.sh - the one list of what has to be on the machine, and how it gets there.
#   deps.sh PURPOSE...     build | images | test | bench | lint
# Installs only what is missing, and only as root; otherwise it says what to install. Rust comes
# from rustup (Debian's is too old); rustup then reads rust-toolchain.toml by itself.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

packages_for() {
  case $1 in
    # RocksDB is C++ and its bindings are generated with libclang; libcontainer needs libseccomp.
    build) echo build-essential clang libclang-dev cmake pkg-config protobuf-compiler libseccomp-dev curl ca-certificates git ;;
    images) echo mmdebstrap buildah skopeo umoci docker-registry jq ;;
    test) echo busybox-static fuse3 runc containerd containernetworking-plugins attr tar zstd procps podman openssl e2fsprogs xfsprogs erofs-utils ;;
    bench) echo containerd runc fuse3 jq iproute2 ;;
    lint) echo shellcheck ;;
    *) die "deps.sh knows build, images, test, bench and lint, not '$1'" ;;
  esac
}

missing_packages() {
  local package
  for package in "$@"; do
    dpkg-query -W -f '${db:Status-Status}\n' "$package" 2>/dev/null | grep -qx installed || echo "$package"
  done | sort -u
}

install_packages() {
  local missing; mapfile -t missing < <(missing_packages "$@")
  [ "${#missing[@]}" -gt 0 ] || return 0
  command -v apt-get >/dev/null || die "missing: ${missing[*]}; install them (the names are Debian 12's)"
  is_root || die "missing: ${missing[*]}; run: sudo apt-get install ${missing[*]}"
  say "Installing from Debian: ${missing[*]}"
  local log=$LAZ_CACHE/apt.log; : >"$log"
  export DEBIAN_FRONTEND=noninteractive
  quietly "$log" apt-get -q update
  # No service of a package starts by itself: the tests start their own.
  quietly "$log" env POLICYRCD=101 RUNLEVEL=1 apt-get -q install -y --no-install-recommends "${missing[@]}"
}

install_rust() {
  command -v cargo >/dev/null && return 0
  local how='curl --proto =https --tlsv1.2 -sSf https://sh.rustup.rs | sh -s -- -y --profile minimal --default-toolchain none'
  [ "${LAZ_INSTALL_RUST:-}" = 1 ] || die "cargo is not here. Install Rust with
    $how
  or let make do exactly that: LAZ_INSTALL_RUST=1 make $(basename "${MAKECMDGOALS:-demo}")"
  say "Installing Rust: $how"
  quietly "$LAZ_CACHE/rustup.log" sh -c "$how"
}

wanted=()
for purpose in "$@"; do
  read -ra some <<<"$(packages_for "$purpose")"
  wanted+=("${some[@]}")
done
install_packages "${wanted[@]}"
case " $* " in *" build "*|*" lint "*) install_rust ;; esac
