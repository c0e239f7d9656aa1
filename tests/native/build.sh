#!/bin/sh
# Compile the harness: build.sh OUTPUT [COMPILER FLAGS...]; CC chooses the compiler.
set -e
here=$(dirname "$0")
output=$1
shift
libs=-luring
case " $* " in *" -DVB_NO_URING "*) libs= ;; esac
exec ${CC:-cc} -std=gnu11 -D_GNU_SOURCE=1 -Wall -Wextra -g -O1 -pthread "$@" \
	-I"$here/../../vhostblk/native" -o "$output" "$here"/*.c "$here"/../../vhostblk/native/src/*.c $libs
