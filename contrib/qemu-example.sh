#!/bin/sh
# Boots a guest with one disk served by vhostblk:
#
#   qemu-example.sh IMAGE [QEMU OPTION...]
#   qemu-example.sh debian.raw -accel kvm -nographic
#
# Environment: QEMU (default qemu-system-x86_64), MEMORY (default 1G), CPUS (default 2).
set -eu

image=${1:?usage: $0 IMAGE [QEMU OPTION...]}
shift
folder=$(mktemp -d)
vhostblk serve "$image" --socket "$folder/disk.sock" --pidfile "$folder/pid" &
daemon=$!
trap 'kill "$daemon" 2>/dev/null; wait "$daemon" || :; rm -rf "$folder"' EXIT INT TERM

# The pid file is written when the socket listens.
until [ -s "$folder/pid" ]; do
	kill -0 "$daemon" || exit 1
	sleep 0.1
done

# vhost-user needs the guest's memory to be shared. With reconnect=1 QEMU goes on when the daemon was restarted.
"${QEMU:-qemu-system-x86_64}" -m "${MEMORY:-1G}" -smp "${CPUS:-2}" \
	-object "memory-backend-memfd,id=memory,size=${MEMORY:-1G},share=on" \
	-machine "pc,memory-backend=memory" \
	-chardev "socket,id=disk,path=$folder/disk.sock,reconnect=1" \
	-device vhost-user-blk-pci,chardev=disk \
	"$@"
