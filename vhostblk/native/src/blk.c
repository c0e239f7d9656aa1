/*
 * blk.c: virtio-blk requests. VIRTIO 1.2 §5.2.6; vhostblk/virtio/blk_request.py has the same list of rules, in the same
 * order:
 *
 * 1. The status is the last writable byte, wherever it is (§2.7.4.1). None, or not in guest memory: the queue is broken.
 * 2. Any other buffer that is not in guest memory: IOERR, nothing is looked at. The header is the first 16 readable
 *    bytes, in any framing, copied once. Fewer: IOERR.
 * 3. A type that is not implemented: UNSUPP.
 * 4. OUT, DISCARD or WRITE_ZEROES on a read-only device: IOERR (§5.2.6.2).
 * 5. IN, OUT: data not a multiple of 512 bytes, or more than 2147483136 of them: IOERR. Any byte at or beyond the
 *    capacity: IOERR.
 * 6. DISCARD, WRITE_ZEROES: data empty or not a multiple of 16 bytes: IOERR. More segments than offered: UNSUPP. Then,
 *    segment by segment: an unknown flag, or unmap in a DISCARD: UNSUPP (§5.2.6.2); beyond the capacity: IOERR.
 * 7. FLUSH and GET_ID have no rules.
 */
#include <endian.h>
#include <linux/virtio_blk.h>
#include "blk.h"

#define SECTOR 512u
/* The most that one request may move: what fits into an int, as sectors. The kernel and the block layer have the same. */
#define TRANSFER_MAX (INT32_MAX / SECTOR * SECTOR)
#define SEGMENT_SIZE sizeof(struct virtio_blk_discard_write_zeroes)

/* Headers and segments have the same size. */
#define RECORD_SIZE 16u
_Static_assert(sizeof(struct virtio_blk_outhdr) == RECORD_SIZE, "VIRTIO 1.2 §5.2.6");
_Static_assert(SEGMENT_SIZE == RECORD_SIZE, "VIRTIO 1.2 §5.2.6");

/* Copy the first 16 bytes of a vector and cut them off it. The caller knows that there are enough. */
static void take_record(struct iovec **iov, uint32_t *count, void *to)
{
	size_t done = 0;

	if ((*iov)->iov_len == RECORD_SIZE) {
		copy_once(to, (*iov)->iov_base, RECORD_SIZE);
		++*iov;
		--*count;
		return;
	}
	while (done < RECORD_SIZE) {
		struct iovec *piece = *iov;
		size_t n = MIN(RECORD_SIZE - done, piece->iov_len);

		copy_once((char *)to + done, piece->iov_base, n);
		done += n;
		piece->iov_base = (char *)piece->iov_base + n;
		piece->iov_len -= n;
		if (!piece->iov_len) {
			++*iov;
			--*count;
		}
	}
}

static uint8_t *take_last_byte(struct iovec *iov, uint32_t *count)
{
	struct iovec *last = &iov[*count - 1];

	if (!--last->iov_len)
		--*count;
	return (uint8_t *)last->iov_base + last->iov_len;
}

static bool beyond(uint64_t sector, uint64_t length, const struct blk_limits *limits)
{
	uint64_t sectors = limits->capacity / SECTOR;

	return sector > sectors || length > (sectors - sector) * SECTOR;
}

static enum vb_op op_of(uint32_t type)
{
	switch (type) {
	case VIRTIO_BLK_T_IN:
		return VB_OP_READ;
	case VIRTIO_BLK_T_OUT:
		return VB_OP_WRITE;
	case VIRTIO_BLK_T_FLUSH:
		return VB_OP_FLUSH;
	case VIRTIO_BLK_T_DISCARD:
		return VB_OP_DISCARD;
	case VIRTIO_BLK_T_WRITE_ZEROES:
		return VB_OP_WRITE_ZEROES;
	case VIRTIO_BLK_T_GET_ID:
		return VB_OP_GET_ID;
	default:
		return VB_OP_OTHER;
	}
}

static int check_transfer(const struct blk_request *r, uint64_t sector, const struct blk_limits *limits)
{
	return r->length % SECTOR || r->length > TRANSFER_MAX || beyond(sector, r->length, limits) ? VIRTIO_BLK_S_IOERR
												   : -1;
}

static int check_segments(const struct blk_request *r, const struct blk_limits *limits)
{
	if (!r->length || r->length % SEGMENT_SIZE)
		return VIRTIO_BLK_S_IOERR;
	return r->length / SEGMENT_SIZE > limits->max_segments ? VIRTIO_BLK_S_UNSUPP : -1;
}

static int check(const struct blk_request *r, uint64_t sector, const struct blk_limits *limits)
{
	bool modifies = r->op == VB_OP_WRITE || r->op == VB_OP_DISCARD || r->op == VB_OP_WRITE_ZEROES;

	if (modifies && limits->read_only)
		return VIRTIO_BLK_S_IOERR;
	switch (r->op) {
	case VB_OP_READ:
	case VB_OP_WRITE:
		return check_transfer(r, sector, limits);
	case VB_OP_DISCARD:
	case VB_OP_WRITE_ZEROES:
		return check_segments(r, limits);
	case VB_OP_FLUSH:
	case VB_OP_GET_ID:
		return -1;
	default:
		return VIRTIO_BLK_S_UNSUPP;
	}
}

int blk_parse(struct chain *chain, const struct blk_limits *limits, struct blk_request *ret)
{
	struct iovec *readable = chain->iov, *writable = chain->iov + chain->readable;
	struct virtio_blk_outhdr header;

	/* Without a header it is of no type: 0 would be a read. */
	*ret = (struct blk_request){.type = UINT32_MAX, .op = VB_OP_OTHER, .status = VIRTIO_BLK_S_IOERR};
	if (!chain->writable_bytes)
		return chain->incomplete ? -VB_BROKEN_ADDRESS : -VB_BROKEN_NO_STATUS;
	ret->status_byte = take_last_byte(writable, &chain->writable);
	ret->incomplete = chain->incomplete;
	if (chain->incomplete || chain->readable_bytes < sizeof(header))
		return 0;
	take_record(&readable, &chain->readable, &header);
	ret->type = le32toh(header.type);
	ret->op = op_of(ret->type);
	if (ret->op == VB_OP_READ || ret->op == VB_OP_GET_ID) {
		ret->data = writable;
		ret->pieces = chain->writable;
		ret->length = chain->writable_bytes - 1;
	} else if (ret->op != VB_OP_FLUSH && ret->op != VB_OP_OTHER) {
		ret->data = readable;
		ret->pieces = chain->readable;
		ret->length = chain->readable_bytes - sizeof(header);
	}
	ret->status = check(ret, le64toh(header.sector), limits);
	if (ret->status < 0 && (ret->op == VB_OP_READ || ret->op == VB_OP_WRITE))
		ret->offset = le64toh(header.sector) * SECTOR;
	return 0;
}

int blk_read_segments(const struct blk_request *request, const struct blk_limits *limits, struct vb_segment *ret)
{
	uint32_t allowed = request->op == VB_OP_WRITE_ZEROES ? VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP : 0;
	struct iovec *data = request->data;
	uint32_t pieces = request->pieces;

	for (uint64_t i = 0; i < request->length / SEGMENT_SIZE; i++) {
		struct virtio_blk_discard_write_zeroes segment;
		uint64_t sector, length;

		take_record(&data, &pieces, &segment);
		sector = le64toh(segment.sector);
		length = (uint64_t)le32toh(segment.num_sectors) * SECTOR;
		if (le32toh(segment.flags) & ~allowed)
			return VIRTIO_BLK_S_UNSUPP;
		if (beyond(sector, length, limits))
			return VIRTIO_BLK_S_IOERR;
		ret[i] = (struct vb_segment){sector * SECTOR, length, le32toh(segment.flags)};
	}
	return -1;
}
