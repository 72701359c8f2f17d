# shellcheck shell=bash
# go.sh - peers that Debian has not, or too old, built once from their Go modules.
# Needs common.sh. Never builds into the clone.

# built_once PROGRAM VERSION: has `build` make $SCRATCH/PROGRAM, in $SCRATCH, where the cache has none of
# that version, and prints the directory it is in. Exits with 3 where there is no Go: Debian 12's is too old.
# Go 1.21 and later fetch the toolchain that a module asks for through the module proxy. Modules that name
# a version need no list of versions, which not every proxy has.
built_once() {
  local program=$1 version=$2 dir=$LAZ_CACHE/peers/$1-$2
  command -v go >/dev/null || { say "$program is built with Go, which is not here: install Go 1.21 or later"; exit 3; }
  mkdir -p "$LAZ_CACHE/peers"
  exec 9>"$LAZ_CACHE/peers/$program.lock"
  flock 9
  if [ ! -x "$dir/$program" ]; then
    make_scratch "$program"
    say "Building $program $version from its Go module (minutes, once)"
    cd "$SCRATCH" || exit
    build
    mkdir -p "$dir"
    mv "$SCRATCH/$program" "$dir/$program"
  fi
  echo "$dir"
}
