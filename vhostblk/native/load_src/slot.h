/*
 * Requests and their descriptors. Each queue has `depth` slots, laid out once; a slot is a request in flight or waits to
 * be one. Per request only its sector and its status are written, as long as the operation and the length stay.
 *
 *     line 0   header 16 | segment of DISCARD, WRITE_ZEROES 16 | status 1      one cache line goes there and back
 *     line 1…  indirect table
 *     ...      data, in another part of the memory, page-aligned
 */
#pragma once
#include <linux/virtio_blk.h>
#include "../src/common.h"
#include "load.h"
#include "ring.h"

#define SECTOR_BITS 9
#define STATUS_UNWRITTEN 0xffu
#define NO_SLOT 0xffffu

struct slot {
	uint64_t submitted; /* ticks */
	uint64_t offset;    /* bytes */
	uint32_t length;
	uint8_t op; /* enum vb_load_op */
	bool in_flight;
	uint16_t head;
	uint32_t built_op; /* what the descriptors are for */
	uint32_t built_length;
	struct virtio_blk_outhdr *header;
	uint8_t *data;
	uint32_t generation; /* of a write, where there is a model */
	uint16_t index;
} __attribute__((aligned(64)));

_Static_assert(sizeof(struct slot) == 64, "one cache line each");

struct slots {
	struct slot *slot;
	uint16_t *of_head;                /* which slot a head belongs to, or NO_SLOT: as long as the ring */
	struct vring_packed_desc *chains; /* packed: what goes into the ring, `per_slot` for each slot */
	uint16_t *lengths;                /* packed: how many of them */
	uint32_t per_slot;
	uint32_t count;
	uint32_t segments;
	uint32_t piece; /* how far apart the pieces of a slot's data are */
	uint32_t meta_stride;
	bool indirect;
	uint64_t memory; /* here and for the device */
	uint64_t gpa;
	struct ring *ring;
};

int slots_init(struct slots *slots, const struct vb_load_options *options, const struct vb_load_ring *memory,
	struct ring *ring);
void slots_deinit(struct slots *slots);

/* Make the descriptors of a slot those of its op and length. */
void slot_build(struct slots *slots, struct slot *slot);

static inline uint8_t *slot_status(const struct slot *slot)
{
	return (uint8_t *)slot->header + 32;
}

static inline struct virtio_blk_discard_write_zeroes *slot_segment(const struct slot *slot)
{
	return (struct virtio_blk_discard_write_zeroes *)((char *)slot->header + 16);
}

/* The i-th piece of the data: nothing, if there are not that many. They are not contiguous, as a guest's pages are not. */
static inline uint32_t slot_piece(const struct slots *slots, const struct slot *slot, uint32_t i, void **ret)
{
	uint32_t each = ((slot->length >> SECTOR_BITS) + slots->segments - 1) / slots->segments << SECTOR_BITS;
	uint32_t from = i * each;

	*ret = slot->data + (slots->segments - 1 - i) * slots->piece;
	return i >= slots->segments || from >= slot->length ? 0 : MIN(each, slot->length - from);
}
