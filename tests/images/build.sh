#!/usr/bin/env bash
# build.sh - makes the real images the tests, the demo and the benchmark use, from Debian packages.
#   build.sh NAME...     debian: bookworm, minbase; one layer; runs /bin/bash
#                        python: that, python3 with numpy and flask, and /app/app.py, which prints
#                                READY after its imports; three layers
#                        java:   debian, openjdk 17 (headless) and /app/Hello.class, which prints
#                                READY; /app/Other.class is another workload; three layers
#                        nginx:  debian, nginx and a site on port 18080; three layers
#                        ml:     debian, scipy and friends, torch, tensorflow (dead weight), and
#                                /app/app.py, which prints READY after importing torch; five layers,
#                                1 GB. Wants 12 GB of disk and 20 minutes, and pip on this machine.
# Each is an OCI layout directory with two tags: NAME with gzip layers, NAME-zstd with zstd layers. Prints one line per image: NAME PATH.
#
# Layouts are cached outside the clone as NAME-KEY; the key is made of the image's own recipe, the
# recipes of what it builds on and the steps all share, so a changed recipe is a new image and
# leaves the others alone. An image appears in the cache whole or not at all: it is built in a
# scratch directory and renamed. Needs root: a root file system with its owners cannot be made without.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../lib/common.sh"

SUITE=bookworm
IMAGES=$LAZ_CACHE/images

# buildah without a user namespace or a runtime: commands of a layer run in a plain chroot. The vfs
# driver works everywhere but copies every layer; images too large for that say DRIVER=overlay.
in_buildah() {
  env BUILDAH_ISOLATION=chroot TMPDIR="$SCRATCH/tmp" buildah --root "$SCRATCH/storage" --runroot "$SCRATCH/run" \
    --storage-driver "$DRIVER" "$@"
}
quiet_buildah() { quietly "$SCRATCH/log" in_buildah "$@"; }

# load_image NAME: a finished image as a base for the next one, its layers byte for byte the same.
load_image() {
  quietly "$SCRATCH/log" env TMPDIR="$SCRATCH/tmp" skopeo copy "oci:$(path_of "$1"):$1" \
    "containers-storage:[$DRIVER@$SCRATCH/storage+$SCRATCH/run]localhost/$1"
}

# install_in CONTAINER PACKAGE...: from Debian, without what the installation leaves behind.
install_in() {
  local container=$1; shift
  quiet_buildah run "$container" -- sh -ec "export DEBIAN_FRONTEND=noninteractive
    apt-get -q update && apt-get -q install -y --no-install-recommends $*
    apt-get clean; rm -rf /var/lib/apt/lists/* /var/cache/apt/*.bin /var/log/apt /var/log/dpkg.log /tmp/*"
}

# packages_layer BASE NAME PACKAGE...: image NAME is BASE and one layer with the packages.
packages_layer() {
  local base=$1 name=$2; shift 2
  quiet_buildah from --name "$name" --pull-never "localhost/$base"
  install_in "$name" "$@"
  quiet_buildah commit --rm --format oci "$name" "localhost/$name"
}

# --- one recipe per image: new_NAME leaves a container NAME, which becomes the image ---

base_of() { case $1 in debian) ;; *) echo debian ;; esac; }

new_debian() {
  quietly "$SCRATCH/log" mmdebstrap --variant=minbase "$SUITE" "$SCRATCH/debian.tar"
  quiet_buildah from --name debian scratch
  quiet_buildah add debian "$SCRATCH/debian.tar" /
  quiet_buildah config --cmd '["/bin/bash"]' \
    --env PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin debian
}

new_python() {
  packages_layer debian packages python3 python3-numpy python3-flask
  cat >"$SCRATCH/app.py" <<'PY'
import flask
import numpy

print("READY", numpy.__version__, flask.__name__, flush=True)
PY
  quiet_buildah from --name python --pull-never localhost/packages
  quiet_buildah copy python "$SCRATCH/app.py" /app/app.py
  quiet_buildah config --cmd '["python3","/app/app.py"]' python
}

new_java() {
  packages_layer debian packages openjdk-17-jre-headless
  mkdir "$SCRATCH/app"
  cat >"$SCRATCH/app/Hello.java" <<'JAVA'
public class Hello {
    public static void main(String[] args) {
        System.out.println("READY " + System.getProperty("java.version"));
    }
}
JAVA
  cat >"$SCRATCH/app/Other.java" <<'JAVA'
import java.io.ByteArrayInputStream;
import java.security.KeyPairGenerator;
import java.util.logging.Logger;
import javax.xml.parsers.DocumentBuilderFactory;

public class Other {
    public static void main(String[] args) throws Exception {
        var xml = DocumentBuilderFactory.newInstance().newDocumentBuilder().parse(new ByteArrayInputStream("<a/>".getBytes()));
        var key = KeyPairGenerator.getInstance("Ed25519").generateKeyPair().getPublic();
        Logger.getLogger("other").info(xml.getDocumentElement().getTagName());
        System.out.println("READY " + key.getAlgorithm());
    }
}
JAVA
  # The compiler works in a container of its own, which is thrown away.
  quiet_buildah from --name compiler --pull-never localhost/packages
  install_in compiler openjdk-17-jdk-headless
  quiet_buildah copy compiler "$SCRATCH/app" /app
  quiet_buildah run compiler -- sh -ec 'cd /app && javac Hello.java Other.java'
  cp "$(in_buildah mount compiler)"/app/*.class "$SCRATCH/app"
  quiet_buildah rm compiler
  quiet_buildah from --name java --pull-never localhost/packages
  quiet_buildah copy java "$SCRATCH/app/Hello.class" "$SCRATCH/app/Other.class" /app/
  quiet_buildah config --cmd '["java","-cp","/app","Hello"]' java
}

new_nginx() {
  packages_layer debian packages nginx-light
  printf '<h1>READY</h1>\n' >"$SCRATCH/index.html"
  cat >"$SCRATCH/nginx.conf" <<'CONFIG'
worker_processes 1;
daemon off;
error_log stderr;
pid /run/nginx.pid;
events { worker_connections 256; }
http { include mime.types; access_log off; server { listen 18080; root /srv; } }
CONFIG
  quiet_buildah from --name nginx --pull-never localhost/packages
  quiet_buildah copy nginx "$SCRATCH/index.html" /srv/index.html
  quiet_buildah copy nginx "$SCRATCH/nginx.conf" /etc/nginx/nginx.conf
  quiet_buildah config --cmd '["nginx"]' --port 18080 nginx
}

new_ml() {
  quietly "$SCRATCH/log" python3 -m pip install -q --no-compile --only-binary=:all: --python-version 3.11 \
    --target "$SCRATCH/site" tensorflow-cpu==2.20.0
  packages_layer debian science python3 python3-numpy python3-scipy python3-pandas python3-sklearn
  packages_layer science torch python3-torch python3-torchvision
  quiet_buildah from --name tensorflow --pull-never localhost/torch
  quiet_buildah copy tensorflow "$SCRATCH/site" /opt/tf
  quiet_buildah commit --rm --format oci tensorflow localhost/tensorflow
  rm -rf "$SCRATCH/site"
  cat >"$SCRATCH/app.py" <<'PY'
import torch

print("READY", torch.__version__, torch.ones(3).sum().item(), flush=True)
PY
  cat >"$SCRATCH/other.py" <<'PY'
import sys

sys.path.insert(0, "/opt/tf")
import tensorflow as tf

print("READY", tf.__version__, flush=True)
PY
  quiet_buildah from --name ml --pull-never localhost/tensorflow
  quiet_buildah copy ml "$SCRATCH/app.py" "$SCRATCH/other.py" /app/
  quiet_buildah config --cmd '["python3","/app/app.py"]' ml
}

# One image, made in a subshell so that its scratch directory goes as soon as it is done.
build() (
  name=$1
  is_root || die "building image $name needs root: sudo ${BASH_SOURCE[0]} $name"
  # shellcheck disable=SC2034  # the parent shell keeps its own list
  AT_EXIT=(); make_scratch "image-$name"
  mkdir "$SCRATCH/tmp"
  DRIVER=vfs; [ "$name" != ml ] || DRIVER=overlay
  path=$(path_of "$name") started=$SECONDS
  say "Building image $name from Debian packages (once; kept in $path)"
  for base in $(base_of "$name"); do load_image "$base"; done
  "new_$name"
  quiet_buildah commit --rm --format oci "$name" "localhost/$name"
  quiet_buildah push --format oci --compression-format gzip "localhost/$name" "oci:$SCRATCH/layout:$name"
  # The same layers in zstd, as tag NAME-zstd of the same layout.
  quiet_buildah push --format oci --compression-format zstd "localhost/$name" "oci:$SCRATCH/layout:$name-zstd"
  mv -T "$SCRATCH/layout" "$path"
  say "  done in $((SECONDS - started)) s: $(du -sh "$path" | cut -f1)"
)

# recipe_of NAME: the code that makes it and what it builds on, comments aside.
recipe_of() {
  local base
  echo "$SUITE"
  declare -f in_buildah load_image install_in packages_layer build "new_$1"
  for base in $(base_of "$1"); do recipe_of "$base"; done
}
path_of() { echo "$IMAGES/$1-$(recipe_of "$1" | sha256sum | cut -c1-16)"; }

# provide NAME: builds it and its base, unless they are there. One run at a time builds an image; a
# run that needs another image does not wait for it.
provide() (
  path=$(path_of "$1")
  [ ! -e "$path/index.json" ] || return 0
  for base in $(base_of "$1"); do provide "$base"; done
  exec 9>"$path.lock"
  flock -n 9 || { say "Waiting for another run that builds image $1"; flock 9; }
  [ -e "$path/index.json" ] || build "$1"
)

for name in "$@"; do
  case $name in debian|python|java|nginx|ml) ;; *) die "no image '$name': there are debian, python, java, nginx and ml" ;; esac
done
mkdir -p "$IMAGES"
for name in "$@"; do
  provide "$name"
  echo "$name $(path_of "$name")"
done
