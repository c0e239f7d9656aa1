#include <errno.h>
#include <stdlib.h>
#include "slot.h"

#define LINE 64u
#define PAGE 4096u

static uint64_t round_up(uint64_t value, uint64_t unit)
{
	return (value + unit - 1) / unit * unit;
}

static uint32_t meta_stride(const struct vb_load_options *options)
{
	uint64_t table = options->indirect ? sizeof(struct vring_desc) * (options->segments + 2ull) : 0;

	return (uint32_t)(LINE + round_up(table, LINE));
}

static uint32_t piece_stride(const struct vb_load_options *options)
{
	uint64_t sectors = round_up(options->block_max, 512) / 512;
	uint64_t longest = round_up(sectors, options->segments) / options->segments * 512;

	return (uint32_t)(longest < PAGE && PAGE % longest == 0 ? longest : round_up(longest, PAGE));
}

static uint64_t meta_size(const struct vb_load_options *options)
{
	return round_up((uint64_t)meta_stride(options) * options->depth, PAGE);
}

uint64_t vb_load_slots_size(const struct vb_load_options *options)
{
	uint64_t data = (uint64_t)piece_stride(options) * options->segments * options->depth;

	return meta_size(options) + round_up(data, PAGE);
}

uint32_t vb_load_ring_entries(const struct vb_load_options *options)
{
	return options->indirect ? options->depth : options->depth * (options->segments + 2);
}

int slots_init(struct slots *slots, const struct vb_load_options *options, const struct vb_load_ring *memory,
	struct split_ring *ring)
{
	uint32_t size = ring->mask + 1u, per_slot = options->indirect ? 1 : options->segments + 2;
	uint64_t data = memory->slots + meta_size(options);

	*slots = (struct slots){
		.count = options->depth,
		.segments = options->segments,
		.piece = piece_stride(options),
		.meta_stride = meta_stride(options),
		.indirect = options->indirect,
		.memory = memory->slots,
		.gpa = memory->slots_gpa,
		.ring = ring,
	};
	slots->slot = aligned_alloc(LINE, sizeof(*slots->slot) * slots->count);
	slots->of_head = malloc(sizeof(*slots->of_head) * size);
	if (!slots->slot || !slots->of_head) {
		slots_deinit(slots);
		return -ENOMEM;
	}
	memset(slots->of_head, 0xff, sizeof(*slots->of_head) * size);
	for (uint32_t i = 0; i < slots->count; i++) {
		struct slot *slot = &slots->slot[i];

		*slot = (struct slot){
			.head = (uint16_t)(i * per_slot),
			.built_op = VB_LOAD_OPS,
			.header = (void *)(uintptr_t)(memory->slots + (uint64_t)i * slots->meta_stride),
			.data = (uint8_t *)(uintptr_t)(data + (uint64_t)i * slots->piece * slots->segments),
			.index = (uint16_t)i,
		};
		*slot->header = (struct virtio_blk_outhdr){0};
		*slot_status(slot) = STATUS_UNWRITTEN;
		slots->of_head[slot->head] = (uint16_t)i;
	}
	return 0;
}

void slots_deinit(struct slots *slots)
{
	free(slots->slot);
	free(slots->of_head);
	slots->slot = NULL;
	slots->of_head = NULL;
}

static const uint32_t TYPES[VB_LOAD_OPS] = {
	[VB_LOAD_READ] = VIRTIO_BLK_T_IN,
	[VB_LOAD_WRITE] = VIRTIO_BLK_T_OUT,
	[VB_LOAD_FLUSH] = VIRTIO_BLK_T_FLUSH,
	[VB_LOAD_DISCARD] = VIRTIO_BLK_T_DISCARD,
	[VB_LOAD_WRITE_ZEROES] = VIRTIO_BLK_T_WRITE_ZEROES,
};

void slot_build(struct slots *slots, struct slot *slot)
{
	struct vring_desc *ring = &slots->ring->desc[slot->head];
	struct vring_desc *table = slots->indirect ? (void *)((char *)slot->header + LINE) : ring;
	uint16_t base = slots->indirect ? 0 : slot->head, n = 0;
	/* Both are at the same distance. */
	uint64_t delta = slots->gpa - slots->memory, header = (uintptr_t)slot->header + delta;

#define ADD(address, bytes, flag)                                                                                      \
	do {                                                                                                           \
		table[n] =                                                                                             \
			(struct vring_desc){(address), (bytes), VRING_DESC_F_NEXT | (flag), (uint16_t)(base + n + 1)}; \
		n++;                                                                                                   \
	} while (0)

	ADD(header, sizeof(*slot->header), 0);
	if (slot->op == VB_LOAD_READ || slot->op == VB_LOAD_WRITE) {
		void *piece;
		uint32_t length;

		for (uint32_t i = 0; (length = slot_piece(slots, slot, i, &piece)); i++)
			ADD((uintptr_t)piece + delta, length, slot->op == VB_LOAD_READ ? VRING_DESC_F_WRITE : 0);
	} else if (slot->op != VB_LOAD_FLUSH) {
		ADD(header + 16, sizeof(struct virtio_blk_discard_write_zeroes), 0);
	}
	table[n] = (struct vring_desc){header + 32, 1, VRING_DESC_F_WRITE, 0};
	n++;
#undef ADD
	if (slots->indirect)
		*ring = (struct vring_desc){header + LINE, (uint32_t)(n * sizeof(*table)), VRING_DESC_F_INDIRECT, 0};
	slot->header->type = TYPES[slot->op];
	slot->built_op = slot->op;
	slot->built_length = slot->length;
}
