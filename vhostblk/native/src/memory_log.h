/*
 * The log of guest memory that a front-end keeps for live migration: a bit for each page that we write. Not to be confused
 * with dirty.h, which is about what was written to disks.
 */
#pragma once
#include <sys/uio.h>
#include "../engine.h"
#include "common.h"
#include "memory.h"

/* Where what is written to a ring is marked. */
struct ring_log {
	struct vb_memory_log *log; /* NULL: nowhere */
	uint64_t gpa;              /* of the used ring */
	uint64_t desc_gpa;         /* packed: of the descriptors, */
	uint64_t event_gpa;        /* and of the device's event structure */
};

/* Mark what is in these pieces of guest memory. `region` is a guess at the number of the region that they are in, and
 * the one that they were in afterwards. Context: any thread. */
void memory_log_mark_pieces(struct vb_memory_log *log, const struct vb_memory *memory, uint32_t *region,
	const struct iovec *pieces, uint32_t count);
