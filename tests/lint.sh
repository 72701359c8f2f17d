#!/usr/bin/env bash
# lint.sh - every check that does not run the code. Stops at the first that fails.
#
# "Each crate alone" (a crate that compiles only because another turned a feature on) is checked in
# its own target directory, because alone the features differ and RocksDB would be built again.
# `check` links nothing, so there RocksDB is declared to be installed and is not built at all.
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

mapfile -t scripts < <(git ls-files --cached --others --exclude-standard -- '*.sh' .ci/run)
step 'shell scripts (shellcheck)' shellcheck "${scripts[@]}"
step 'the fences can fail (self-test)' tests/fences.sh --self-test
step 'fences between modules' tests/fences.sh
step 'formatting (cargo fmt)' cargo fmt --all --check
step 'licences (deny.toml)' check_licences
step 'clippy, all targets' cargo clippy -q --workspace --all-targets --locked -- -D warnings
step 'documentation (rustdoc)' env RUSTDOCFLAGS='-D warnings' cargo doc -q --workspace --no-deps --locked --document-private-items
for crate in fetcher snapshotter runtime benches; do
  step "lazarette-$crate alone" env CARGO_TARGET_DIR="$CARGO_TARGET_DIR/alone" ROCKSDB_LIB_DIR=/usr/lib \
    cargo check -q --locked -p "lazarette-$crate" --all-targets
done
say "lint: all clean"
