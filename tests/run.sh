#!/usr/bin/env bash
# run.sh - every test there is, and one count at the end.
#
# Rust tests are counted from cargo's own result lines; a script counts as the tests it reports in a
# line "N passed, N failed", or as one test by its exit code. A build that fails counts as a failure.
# Nothing stops the run: everything is tried, the last line says what came of it, and so does the
# exit code. Tests that need root say "SKIPPED (needs root)"; those lines are repeated at the end.
# Scripts run two at a time: what one says is shown once it has ended.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib/common.sh"
cd "$REPO"

passed=0 failed=0
make_scratch tests

# Adds up "... N passed; M failed" and "N passed, M failed" lines of a log; prints "PASSED FAILED LINES".
count() {
  sed -nE 's/^(test result: .*[^0-9])?([0-9]+) passed[;,] ([0-9]+) failed.*/\2 \3/p' "$1" |
    awk '{p += $1; f += $2; n++} END {print p + 0, f + 0, n + 0}'
}

# run NAME COMMAND...: shows its output, counts it.
run() {
  local name=$1 code=0 started=$SECONDS; shift
  say; say "== $name"
  "$@" 2>&1 | tee "$SCRATCH/$name.log" || code=${PIPESTATUS[0]}
  account "$name" "$code" "$started"
}

# account NAME CODE STARTED: counts what its log says.
account() {
  local name=$1 code=$2 p f n
  read -r p f n < <(count "$SCRATCH/$name.log")
  # A failing command must cost at least one failure, whatever it printed.
  if [ "$code" != 0 ] && [ "$f" = 0 ]; then f=1; fi
  if [ "$code" = 0 ] && [ "$n" = 0 ]; then p=1; fi
  passed=$((passed + p)) failed=$((failed + f))
  say "== $name: $p passed, $f failed, $((SECONDS - $3)) s"
}

# What runs at once: its name and when it began, by the number of its process.
declare -A running=() began=()

# begin NAME COMMAND...: as run, beside what was begun before; waits while two are running.
begin() {
  local name=$1 log=$SCRATCH/$1.log; shift
  [ "${#running[@]}" -lt 2 ] || await
  # In a group of processes of its own, so that ctrl-C is this script's alone, which asks it to end.
  set -m
  "$@" >"$log" 2>&1 </dev/null &
  set +m
  running[$!]=$name began[$!]=$SECONDS
}

# await: waits for one that was begun to end, shows its output, counts it.
await() {
  local pid='' code=0 name
  wait -n -p pid "${!running[@]}" || code=$?
  name=${running[$pid]}
  unset "running[$pid]"
  say; say "== $name"
  cat "$SCRATCH/$name.log"
  account "$name" "$code" "${began[$pid]}"
}

# end_begun: each ends what it has begun itself, once the command that it waits for is over.
end_begun() {
  local pid
  for pid in "${!running[@]}"; do kill -TERM "$pid" 2>/dev/null || true; done
  for pid in "${!running[@]}"; do wait "$pid" || true; done
}
at_exit end_begun

run fences tests/fences.sh
run fences-self-test tests/fences.sh --self-test
run rust cargo test --workspace --all-targets --locked --no-fail-fast
run rust-docs cargo test --workspace --doc --locked --no-fail-fast
if is_root; then
  # The program that the Rust tests just ran; cargo built it with the features of the tests, and
  # would build every dependency that differs a second time.
  export LAZ=$CARGO_TARGET_DIR/debug/laz
  # The longest first, so that none of them is left to run alone at the end.
  scripts=(tests/peers/{snapshotter,rebase}.test.sh tests/e2e.sh tests/peers/{cri-credentials,systemd,leases}.test.sh)
  for script in tests/peers/*.test.sh; do
    [[ " ${scripts[*]} " == *" $script "* ]] || scripts+=("$script")
  done
  for script in "${scripts[@]}"; do name=$(basename "$script" .sh); begin "${name%.test}" "$script"; done
  while [ "${#running[@]}" -gt 0 ]; do await; done
else
  say "SKIPPED (needs root): tests/e2e.sh and tests/peers: run sudo make test"
fi

# What the Rust tests that failed printed is far up by now: once more, where it is looked for.
if [ "$failed" != 0 ]; then
  say; say "what failed, again:"
  sed -n '/^failures:$/,/^test result/p' "$SCRATCH"/*.log | cut -c1-2000 >&2
fi
skipped=$(cat "$SCRATCH"/*.log | grep -c '^SKIPPED' || true)
say
[ "$skipped" = 0 ] || { say "$skipped tests were SKIPPED:"; cat "$SCRATCH"/*.log | grep '^SKIPPED' >&2; }
is_root || say "not root: the end-to-end tests did not run"
echo "$passed passed, $failed failed"
[ "$failed" = 0 ]
