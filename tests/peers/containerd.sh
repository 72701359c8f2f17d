#!/usr/bin/env bash
# containerd.sh [RELEASE] - unpacks the containerd of Debian's sid, or of the release that is named,
# beside the system and prints the directory its programs are in. Nothing is installed: a private apt root downloads the one package from the
# mirror that this machine uses anyway. Sid's containerd runs on bookworm's C library; its runc does
# not, so the system's is used.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../lib/common.sh"

RELEASE=${1:-sid}
DIR=$LAZ_CACHE/peers/containerd-$RELEASE

# The first Debian mirror in this machine's apt sources, security updates aside.
mirror() {
  { cat /etc/apt/sources.list.d/*.sources /etc/apt/sources.list.d/*.list /etc/apt/sources.list 2>/dev/null || true; } |
    awk '/security/ {next} /^URIs:/ {print $2; exit} /^deb / {for (i = 2; i <= NF; i++) if ($i ~ /^http/) {print $i; exit}}'
}

unpack() {
  local from root=$SCRATCH/apt options
  from=$(mirror)
  [ -n "$from" ] || die "no Debian mirror in the apt sources of this machine"
  mkdir -p "$root"/{lists/partial,cache/archives/partial,download}
  echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $from $RELEASE main" >"$root/sources.list"
  : >"$root/status"
  options=(-o "Dir::Etc::SourceList=$root/sources.list" -o Dir::Etc::SourceParts=/dev/null
    -o "Dir::State::Lists=$root/lists" -o "Dir::State::status=$root/status" -o "Dir::Cache=$root/cache"
    -o APT::Sandbox::User=root)
  quietly "$SCRATCH/log" apt-get "${options[@]}" -q update
  cd "$root/download"
  quietly "$SCRATCH/log" apt-get "${options[@]}" -q download containerd
  rm -rf "$DIR.new"
  dpkg-deb -x containerd_*.deb "$DIR.new"
  rm -rf "$DIR"
  mv "$DIR.new" "$DIR"
}

mkdir -p "$LAZ_CACHE/peers"
exec 9>"$LAZ_CACHE/peers/containerd.lock"
flock 9
[ -x "$DIR/usr/bin/containerd" ] || { make_scratch containerd; say "Fetching containerd of Debian's $RELEASE"; unpack; }
echo "$DIR/usr/bin"
