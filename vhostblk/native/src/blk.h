/* What a chain asks of a block device. Knows no queue, no extent map and no I/O. */
#pragma once
#include "../engine.h"
#include "common.h"
#include "virtqueue.h"

/* The request's data: a slice of the chain's pieces, possibly empty. */
struct blk_request {
	uint32_t type; /* VIRTIO_BLK_T_*, or whatever the driver wrote */
	enum vb_op op;
	int status;      /* -1: to be executed; otherwise it was refused: complete it with this */
	uint64_t offset; /* bytes; IN and OUT */
	uint64_t length; /* bytes of data */
	bool incomplete; /* some of it is not in guest memory, so it was refused */
	uint8_t *status_byte;
	struct iovec *data; /* inside the chain's pieces, which were cut to fit */
	uint32_t pieces;
};

/* What the rules need to know of the disk. */
struct blk_limits {
	uint64_t capacity;
	bool read_only;
	uint32_t max_segments;
};

/* 0, or -VB_BROKEN_NO_STATUS, -VB_BROKEN_ADDRESS. Cuts header and status byte off the chain's pieces. */
int blk_parse(struct chain *chain, const struct blk_limits *limits, struct blk_request *ret);

/* The segments of a DISCARD or WRITE_ZEROES that blk_parse has accepted so far: read once, checked, stored in `ret`,
 * which has room for length / 16. Returns -1 or the status to refuse the request with. */
int blk_read_segments(const struct blk_request *request, const struct blk_limits *limits, struct vb_segment *ret);
