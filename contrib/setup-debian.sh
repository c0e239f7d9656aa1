#!/bin/sh
# Installs what building and testing vhostblk needs from Debian's packages, as far as it is missing.
#
#   contrib/setup-debian.sh [build|demo|test]      default: test
#
# Needs to be root (or sudo without a password) only if something is missing. Where nothing can be
# installed it says what is missing and ends with 0: the build then uses what there is, and tests
# skip. A kernel package that cannot be installed is unpacked into build/guest-kernel instead.
set -u
cd "$(dirname "$0")/.." || exit 1

# /usr/sbin: mkfs and depmod are not on a user's PATH.
PATH=$PATH:/usr/sbin:/sbin
export DEBIAN_FRONTEND=noninteractive

build="gcc libc6-dev python3-dev python3-venv pkg-config liburing-dev"
demo="$build qemu-system-x86 busybox-static e2fsprogs kmod linux-image-cloud-amd64"
test="$demo qemu-utils qemu-block-extra cpio strace fio nbdkit nbdkit-plugin-python clang clang-format libclang-rt-14-dev groff-base systemd mount procps util-linux libseccomp2"

say() { echo "set-up: $*" >&2; }

missing() {
	for package in "$@"; do
		status=$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null)
		[ "$status" = installed ] || printf '%s ' "$package"
	done
}

have_guest_kernel() {
	for root in / build/guest-kernel; do
		for image in "$root"/boot/vmlinuz-*; do
			[ -r "$image" ] && [ -f "$root/lib/modules/${image##*/vmlinuz-}/modules.dep" ] && return 0
		done
	done
	return 1
}

# The newest kernel's files, where its package's scripts cannot run (no initramfs tools, read-only /boot ...).
unpack_kernel() {
	package=$(apt-cache depends --important linux-image-cloud-amd64 2>/dev/null |
		sed -n 's/^ *Depends: *\(linux-image-[0-9][^ ]*\)$/\1/p' | head -n 1)
	[ -n "$package" ] || return 1
	rm -rf build/guest-kernel && mkdir -p build/guest-kernel/download || return 1
	(cd build/guest-kernel/download && apt-get -q download "$package") || return 1
	dpkg-deb -x build/guest-kernel/download/*.deb build/guest-kernel || return 1
	rm -r build/guest-kernel/download
	release=${package#linux-image-}
	# modules.dep is made when a kernel is installed
	depmod -b build/guest-kernel "$release"
}

what=${1:-test}
case $what in
build) packages=$build ;;
demo) packages=$demo ;;
test) packages=$test ;;
*) say "usage: $0 [build|demo|test]"; exit 2 ;;
esac

if ! command -v apt-get >/dev/null || ! command -v dpkg-query >/dev/null; then
	say "this is no Debian: install by hand what stands for: $packages"
	exit 0
fi
if [ "$(dpkg --print-architecture)" != amd64 ]; then
	packages=$(echo "$packages" | sed 's/ linux-image-cloud-amd64//')
fi

# shellcheck disable=SC2086  # lists of words
wanted=$(missing $packages)
case " $wanted " in
*" linux-image-cloud-amd64 "*) have_guest_kernel && wanted=$(echo "$wanted" | sed 's/linux-image-cloud-amd64//') ;;
esac
wanted=$(echo "$wanted" | xargs)
[ -n "$wanted" ] || exit 0

if [ "$(id -u)" = 0 ]; then
	as_root=""
elif sudo -n true 2>/dev/null; then
	as_root="sudo -n"
else
	say "not root, so these packages stay missing: $wanted"
	exit 0
fi

say "installing $wanted"
$as_root apt-get -q update >&2 || say "apt-get update failed; trying with the lists there are"
others=$(echo " $wanted " | sed 's/ linux-image-cloud-amd64 / /')
# shellcheck disable=SC2086
if [ -n "$(echo $others)" ] &&
	! $as_root apt-get -q -y --no-install-recommends install $others >&2; then
	say "not all at once; one by one"
	for package in $others; do
		$as_root apt-get -q -y --no-install-recommends install "$package" >&2 ||
			say "cannot install $package"
	done
fi
case " $wanted " in
*" linux-image-cloud-amd64 "*)
	if ! $as_root apt-get -q -y --no-install-recommends install linux-image-cloud-amd64 >&2 ||
		! have_guest_kernel; then
		say "cannot install a kernel for the guests; unpacking it into build/guest-kernel"
		unpack_kernel >&2 || say "cannot do that either: tests with guests will be skipped"
	fi
	;;
esac
exit 0
