#!/usr/bin/env bash
# build.sh - makes the real images the tests, the demo and the benchmark use, from Debian packages.
#   build.sh NAME...     debian: bookworm, minbase; one layer; runs /bin/bash
#                        python: that, python3 with numpy and flask, and /app/app.py, which prints
#                                READY after its imports; three layers
# Each is an OCI layout directory with two tags: NAME with gzip layers, NAME-zstd with zstd layers. Prints one line per image: NAME PATH.
#
# Layouts are cached outside the clone under a key made of this file, so a changed recipe is a new
# image. An image appears in the cache whole or not at all: it is built in a scratch directory and
# renamed. Needs root: a root file system with its owners cannot be made without.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../lib/common.sh"

SUITE=bookworm
KEY=$(sha256sum "${BASH_SOURCE[0]}" | cut -c1-16)
STORE=$LAZ_CACHE/images/$KEY

# buildah without a user namespace or a runtime: commands of a layer run in a plain chroot.
in_buildah() {
  env BUILDAH_ISOLATION=chroot TMPDIR="$SCRATCH/tmp" buildah --root "$SCRATCH/storage" --runroot "$SCRATCH/run" \
    --storage-driver vfs "$@"
}
quiet_buildah() { quietly "$SCRATCH/log" in_buildah "$@"; }

new_debian() {
  quietly "$SCRATCH/log" mmdebstrap --variant=minbase "$SUITE" "$SCRATCH/debian.tar"
  quiet_buildah from --name debian scratch
  quiet_buildah add debian "$SCRATCH/debian.tar" /
  quiet_buildah config --cmd '["/bin/bash"]' \
    --env PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin debian
}

new_python() {
  local install='export DEBIAN_FRONTEND=noninteractive
    apt-get -q update && apt-get -q install -y --no-install-recommends python3 python3-numpy python3-flask
    apt-get clean; rm -rf /var/lib/apt/lists/* /var/cache/apt/*.bin /var/log/apt /var/log/dpkg.log /tmp/*'
  load_image debian
  quiet_buildah from --name packages --pull-never localhost/debian
  quiet_buildah run packages -- sh -ec "$install"
  quiet_buildah commit --format oci packages localhost/packages
  cat >"$SCRATCH/app.py" <<'PY'
import flask
import numpy

print("READY", numpy.__version__, flask.__name__, flush=True)
PY
  quiet_buildah from --name python --pull-never localhost/packages
  quiet_buildah copy python "$SCRATCH/app.py" /app/app.py
  quiet_buildah config --cmd '["python3","/app/app.py"]' python
}

# load_image NAME: a finished image as a base for the next one, its layers byte for byte the same.
load_image() {
  quietly "$SCRATCH/log" env TMPDIR="$SCRATCH/tmp" skopeo copy "oci:$STORE/$1:$1" \
    "containers-storage:[vfs@$SCRATCH/storage+$SCRATCH/run]localhost/$1"
}

# One image, made in a subshell so that its scratch directory goes as soon as it is done.
build() (
  name=$1
  is_root || die "building image $name needs root: sudo ${BASH_SOURCE[0]} $name"
  # shellcheck disable=SC2034  # the parent shell keeps its own list
  AT_EXIT=(); make_scratch "image-$name"
  mkdir "$SCRATCH/tmp"
  started=$SECONDS
  say "Building image $name from Debian packages (once; kept in $STORE)"
  "new_$name"
  quiet_buildah commit --format oci "$name" "localhost/$name"
  quiet_buildah push --format oci --compression-format gzip "localhost/$name" "oci:$SCRATCH/layout:$name"
  # The same layers in zstd, as tag NAME-zstd of the same layout.
  quiet_buildah push --format oci --compression-format zstd "localhost/$name" "oci:$SCRATCH/layout:$name-zstd"
  mkdir -p "$STORE"
  mv -T "$SCRATCH/layout" "$STORE/$name"
  say "  done in $((SECONDS - started)) s: $(du -sh "$STORE/$name" | cut -f1)"
)

for name in "$@"; do
  case $name in debian|python) ;; *) die "no image '$name': there are debian and python" ;; esac
done
mkdir -p "$LAZ_CACHE/images"
exec 9>"$LAZ_CACHE/images/lock"
flock -n 9 || { say "Waiting for another run that builds images"; flock 9; }
for name in "$@"; do
  case $name in python) [ -e "$STORE/python/index.json" ] || [ -e "$STORE/debian/index.json" ] || build debian ;; esac
  [ -e "$STORE/$name/index.json" ] || build "$name"
  echo "$name $STORE/$name"
done
