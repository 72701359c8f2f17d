#!/bin/sh
# Makes a small image as OCI layout $1 with tag "src", of two layers with everything that
# a layer can hold. Needs root (devices, owners, trusted attributes). $2: a scratch directory.
set -eu
layout=$1
work=$2/bundle
umoci init --layout "$layout"
umoci new --image "$layout:src"
umoci unpack --image "$layout:src" "$work" >/dev/null
root=$work/rootfs
mkdir -p "$root/usr/bin" "$root/usr/lib/deep/er" "$root/etc" "$root/dev" "$root/empty dir" "$root/gone"
seq 1 400000 >"$root/usr/lib/numbers"
head -c 3000001 /dev/urandom >"$root/usr/lib/noise"
: >"$root/usr/lib/empty"
printf x >"$root/usr/lib/deep/er/one"
ln "$root/usr/lib/numbers" "$root/usr/bin/numbers"
ln "$root/usr/lib/numbers" "$root/a-link-that-sorts-first"
ln -s ../usr/lib "$root/etc/lib"
ln -s "$(printf 'long/%.0s' $(seq 1 60))target" "$root/etc/long-target"
long=$(printf 'n%.0s' $(seq 1 200))
printf long >"$root/usr/lib/$long"
printf utf8 >"$root/etc/žluťoučký kůň"
mknod "$root/dev/null" c 1 3
mknod "$root/dev/big" b 259 70000
mkfifo "$root/dev/pipe"
printf s >"$root/usr/bin/setuid"
chown 1000:70000 "$root/usr/bin/setuid"
chmod 6755 "$root/usr/bin/setuid"
chmod 1777 "$root/empty dir"
setfattr -n user.note -v 'with "quotes"' "$root/etc/lib/../../usr/lib/noise"
setfattr -n security.capability -v 0x0100000200040000000000000000000000000000 "$root/usr/lib/empty"
printf gone >"$root/gone/file"
printf old >"$root/etc/replaced"
find "$root" -mindepth 1 -depth -exec touch -h -d '2021-03-04 05:06:07.123456789 UTC' {} +
umoci repack --image "$layout:src" "$work" >/dev/null
rm -rf "$work"
umoci unpack --image "$layout:src" "$work" >/dev/null
rm -rf "$root/gone"
printf new >"$root/etc/replaced"
printf more >"$root/usr/lib/deep/more"
umoci repack --image "$layout:src" "$work" >/dev/null
rm -rf "$work"
