#!/usr/bin/env bash
# licences.sh - the licence and ban lists of deny.toml, held with cargo's metadata alone: for machines
# without cargo-deny, which takes minutes to build. `make deny` says more (advisories, yanked crates).
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib/common.sh"
cd "$REPO"

# strings SECTION KEY: the quoted strings of an array in deny.toml.
strings() { awk -v s="[$1]" '/^\[/ {on = $0 == s} on' deny.toml | sed -n "/^$2 = \[/,/^\]/p" | sed -nE "$3"; }
allowed=$(strings licenses allow 's/^ *"(.*)",$/\1/p' | jq -R . | jq -s .)
banned=$(strings bans deny 's/.*crate = "([^"]*)".*/\1/p' | jq -R . | jq -s .)
clarified=$(sed -nE 's/^crate = "(.*)"/\1/p' deny.toml | jq -R . | jq -s .)
if [ "$(jq length <<<"$allowed")" -lt 4 ] || [ "$(jq length <<<"$banned")" -lt 2 ]; then
  die "deny.toml is not laid out as licences.sh reads it"
fi

# A licence is allowed if every AND part has an allowed OR part. "A/B" is the old way to write OR.
found=$(cargo metadata --format-version 1 --locked --filter-platform x86_64-unknown-linux-gnu |
  jq -r --argjson allowed "$allowed" --argjson banned "$banned" --argjson clarified "$clarified" '
    def fine: gsub("[()]"; "") | gsub(" ?/ ?"; " OR ") | split(" AND ")
      | all(split(" OR ") | any(. as $l | $allowed | index($l)));
    .packages[] | .name as $name
    | if ($banned | index($name)) then "\($name): banned in deny.toml"
      elif ($clarified | index($name)) then empty
      elif (.license // "" | fine) then empty
      else "\($name) \(.version): licence \(.license // "not named") is not in deny.toml" end')
[ -z "$found" ] || die "dependencies that deny.toml does not let in:
$found"
