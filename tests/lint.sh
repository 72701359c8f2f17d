#!/usr/bin/env bash
# lint.sh - every check that does not run the code. Stops at the first that fails.
#
# Cargo is always given the whole workspace: a crate alone has other features, and RocksDB would be
# built again for it.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib/common.sh"
cd "$REPO"

step() { say "lint: $1"; shift; "$@"; }

check_licences() {
  if command -v cargo-deny >/dev/null; then
    cargo deny --offline check licenses bans sources 2>/dev/null || cargo deny check licenses bans sources
  else
    say "lint: cargo-deny is not installed, so licences are checked from the metadata alone (make deny does it all)"
    tests/licences.sh
  fi
}

mapfile -t scripts < <(git ls-files --cached --others --exclude-standard -- '*.sh' .ci/run tests/lib/cxx)
step 'shell scripts (shellcheck)' shellcheck "${scripts[@]}"
step 'the fences can fail (self-test)' tests/fences.sh --self-test
step 'fences between modules' tests/fences.sh
step 'formatting (cargo fmt)' cargo fmt --all --check
step 'licences (deny.toml)' check_licences
step 'clippy, all targets' cargo clippy -q --workspace --all-targets --locked -- -D warnings
step 'documentation (rustdoc)' env RUSTDOCFLAGS='-D warnings' cargo doc -q --workspace --no-deps --locked
say "lint: all clean"
