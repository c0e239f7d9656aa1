/*
 * A virtio-blk device in a thread, as simple as it can be, for tests of the generator: a disk in memory that sleeps until
 * it is kicked and calls only when it is asked to. It does everything right unless `misdeed` tells it otherwise.
 */
#pragma once
#include <linux/virtio_blk.h>
#include <linux/virtio_ring.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include "load.h"

#define DISK_BYTES (1u << 20)
#define MAX_QUEUES 4
#define RING_ENTRIES 128

enum misdeed {
	NONE,
	FAIL_WRITES,   /* IOERR */
	FORGET_STATUS, /* complete without one */
	FOREIGN_HEAD,  /* complete what was never asked */
	RUN_AHEAD,     /* used.idx counts chains that do not exist */
	LOSE_WRITES,   /* complete writes from the 100th on without doing them */
	ABSENT,        /* there is nobody */
};

struct device {
	struct vb_load_ring rings[MAX_QUEUES];
	uint16_t next[MAX_QUEUES];
	uint32_t count;
	bool event_idx;
	enum misdeed misdeed;
	uint64_t writes;
	uint64_t requests[16]; /* by type */
	uint64_t kicks, calls;
	uint32_t longest_chain;
	uint8_t *disk;
	uint32_t stop;
	int epoll_fd;
	pthread_t thread;
};

/* Rings and slots for these options, and a device that serves them. */
void device_init(struct device *device, const struct vb_load_options *options, uint32_t queues, enum misdeed misdeed);
void device_deinit(struct device *device);
