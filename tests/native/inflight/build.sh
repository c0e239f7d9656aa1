#!/bin/sh
# Compile the virtqueue that ends before any store, as a shared object: build.sh OUTPUT [COMPILER FLAGS...]
set -e
here=$(dirname "$0")
src=$here/../../../vhostblk/native/src
output=$1
shift
compile() {
	${CC:-cc} -std=gnu11 -D_GNU_SOURCE=1 -Wall -Wextra -g -O1 -fPIC -fsanitize=undefined \
		-fsanitize-undefined-trap-on-error -I"$src/.." "$@"
}
rings=
for name in virtqueue split_ring packed_ring inflight inflight_packed; do
	if [ -e "$src/$name.c" ]; then rings="$rings $src/$name.c"; fi
done
# What the guard of memory stores is nobody else's, and under a lock.
compile "$@" -c -o "$output.memory.o" "$src/memory.c"
compile "$@" -c -o "$output.memory_log.o" "$src/memory_log.c"
compile "$@" -c -o "$output.sigbus.o" "$src/sigbus.c"
compile "$@" -DVB_STORE_HOOK -shared -o "$output" "$here"/model.c $rings "$output.memory.o" "$output.memory_log.o" \
	"$output.sigbus.o"
