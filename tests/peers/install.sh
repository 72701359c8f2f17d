#!/usr/bin/env bash
# Installs what the conversion is checked with and is not there yet: skopeo, umoci,
# docker-registry, attr and zstd from Debian, and estargz-verify, which reads a blob with
# stargz-snapshotter's and tar-split's own Go packages. Go programs go to the cache, not into the clone.
# Prints the cache directory on its last line. Run again, it does nothing. Exits with 3 where
# there is no Go: Debian 12 has none that is new enough.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
cache=${XDG_CACHE_HOME:-$HOME/.cache}/lazarette/peers
mkdir -p "$cache"

missing=
for pair in skopeo:skopeo umoci:umoci docker-registry:docker-registry getfattr:attr zstd:zstd; do
    command -v "${pair%%:*}" >/dev/null || missing="$missing ${pair##*:}"
done
if [ -n "$missing" ]; then
    echo "installing from Debian:$missing" >&2
    apt-get update -qq >&2
    # Policy: the packages' services are not started.
    # shellcheck disable=SC2086
    RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive \
        apt-get install -y -qq --no-install-recommends $missing >&2
fi

PATH=$PATH:/usr/local/go/bin
if ! command -v go >/dev/null; then
    echo "estargz-verify needs go 1.24 or newer in PATH or /usr/local/go/bin" >&2
    exit 3
fi
if [ ! -x "$cache/estargz-verify" ] ||
    [ -n "$(find "$here/estargz-verify" -type f -newer "$cache/estargz-verify")" ]; then
    echo "building estargz-verify" >&2
    (cd "$here/estargz-verify" && go build -o "$cache/estargz-verify.new" .)
    mv "$cache/estargz-verify.new" "$cache/estargz-verify"
fi
echo "$cache"
