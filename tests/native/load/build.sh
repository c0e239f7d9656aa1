#!/bin/sh
# Compile the tests of the load generator: build.sh OUTPUT [COMPILER FLAGS...]; CC chooses the compiler.
set -e
here=$(dirname "$0")
native=$here/../../../vhostblk/native
output=$1
shift
exec ${CC:-cc} -std=gnu11 -D_GNU_SOURCE=1 -Wall -Wextra -g -O1 -pthread "$@" -I"$native" -o "$output" \
	"$here"/*.c "$native"/load_src/*.c
