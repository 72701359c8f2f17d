# shellcheck shell=bash
# checks.sh - what a test found, line by line, and how much of it was right. Sourced, after common.sh.
# With GENERATION set, lines say of what they are.

passed=0 failed=0
ok() { passed=$((passed + 1)); say "ok      ${GENERATION:+$GENERATION: }$1"; }
bad() { failed=$((failed + 1)); say "FAILED  ${GENERATION:+$GENERATION: }$1"; [ -z "${2:-}" ] || say "        $2"; }
# equal WHAT FOUND EXPECTED
equal() { if [ "$2" = "$3" ]; then ok "$1"; else bad "$1" "found '$2', expected '$3'"; fi; }
# settles WHAT EXPECTED COMMAND...: what COMMAND prints is that, or becomes it.
settles() {
  local what=$1 expected=$2; shift 2
  wait_for 120 "$what" prints "$expected" "$@" || true
  equal "$what" "$("$@")" "$expected"
}
prints() { local expected=$1; shift; [ "$("$@")" = "$expected" ]; }
# works WHAT COMMAND...: and shows the end of what it said if it does not.
works() {
  local what=$1; shift
  if "$@" >"$SCRATCH/out" 2>&1; then ok "$what"; else bad "$what" "$(tail -n 3 "$SCRATCH/out")"; fi
}
# summary: the last line of a test, which fails if anything did.
summary() { echo "$passed passed, $failed failed"; [ "$failed" = 0 ]; }
