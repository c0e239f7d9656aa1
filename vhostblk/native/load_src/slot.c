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
	struct ring *ring)
{
	uint32_t size = ring_size(ring), per_slot = options->indirect ? 1 : options->segments + 2;
	uint64_t data = memory->slots + meta_size(options);

	*slots = (struct slots){
		.count = options->depth,
		.segments = options->segments,
		.piece = piece_stride(options),
		.meta_stride = meta_stride(options),
		.indirect = options->indirect,
		.per_slot = per_slot,
		.memory = memory->slots,
		.gpa = memory->slots_gpa,
		.ring = ring,
	};
	slots->slot = aligned_alloc(LINE, sizeof(*slots->slot) * slots->count);
	slots->of_head = malloc(sizeof(*slots->of_head) * size);
	slots->chains = calloc((uint64_t)slots->count * per_slot, sizeof(*slots->chains));
	slots->lengths = calloc(slots->count, sizeof(*slots->lengths));
	if (!slots->slot || !slots->of_head || !slots->chains || !slots->lengths) {
		slots_deinit(slots);
		return -ENOMEM;
	}
	if (ring->is_packed) {
		ring->packed.chains = slots->chains;
		ring->packed.lengths = slots->lengths;
		ring->packed.per_chain = per_slot;
		ring->packed.count = slots->count;
	}
	memset(slots->of_head, 0xff, sizeof(*slots->of_head) * size);
	for (uint32_t i = 0; i < slots->count; i++) {
		struct slot *slot = &slots->slot[i];

		*slot = (struct slot){
			.head = (uint16_t)(ring->is_packed ? i : i * per_slot),
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
	free(slots->chains);
	free(slots->lengths);
	slots->slot = NULL;
	slots->chains = NULL;
	slots->lengths = NULL;
	slots->of_head = NULL;
}

static const uint32_t TYPES[VB_LOAD_OPS] = {
	[VB_LOAD_READ] = VIRTIO_BLK_T_IN,
	[VB_LOAD_WRITE] = VIRTIO_BLK_T_OUT,
	[VB_LOAD_FLUSH] = VIRTIO_BLK_T_FLUSH,
	[VB_LOAD_DISCARD] = VIRTIO_BLK_T_DISCARD,
	[VB_LOAD_WRITE_ZEROES] = VIRTIO_BLK_T_WRITE_ZEROES,
};

/* A chain, or table, while it is built in the format of the ring. */
struct builder {
	struct vring_desc *split;
	struct vring_packed_desc *packed; /* instead */
	uint16_t base;                    /* index of the first one, split */
	uint16_t count;
};

static void add(struct builder *builder, uint64_t gpa, uint32_t length, uint16_t flags)
{
	uint16_t n = builder->count++;

	if (builder->packed)
		builder->packed[n] = (struct vring_packed_desc){.addr = gpa, .len = length, .flags = flags};
	else
		builder->split[n] = (struct vring_desc){gpa, length, flags, (uint16_t)(builder->base + n + 1)};
}

static struct builder builder_of(const struct slots *slots, const struct slot *slot)
{
	void *table = (char *)slot->header + LINE;
	struct ring *ring = slots->ring;

	if (ring->is_packed)
		return (struct builder){
			.packed = slots->indirect ? table : &slots->chains[slot->index * slots->per_slot]};
	if (slots->indirect)
		return (struct builder){.split = table};
	return (struct builder){.split = &ring->split.desc[slot->head], .base = slot->head};
}

/* The descriptor in the ring that refers to a table of `count`. */
static void refer(const struct slots *slots, const struct slot *slot, uint64_t gpa, uint32_t count)
{
	uint32_t length = count * (uint32_t)sizeof(struct vring_desc);

	if (slots->ring->is_packed)
		slots->chains[slot->index] =
			(struct vring_packed_desc){.addr = gpa, .len = length, .flags = VRING_DESC_F_INDIRECT};
	else
		slots->ring->split.desc[slot->head] = (struct vring_desc){gpa, length, VRING_DESC_F_INDIRECT, 0};
}

void slot_build(struct slots *slots, struct slot *slot)
{
	struct builder builder = builder_of(slots, slot);
	/* Both are at the same distance. */
	uint64_t delta = slots->gpa - slots->memory, header = (uintptr_t)slot->header + delta;

	add(&builder, header, sizeof(*slot->header), VRING_DESC_F_NEXT);
	if (slot->op == VB_LOAD_READ || slot->op == VB_LOAD_WRITE) {
		uint16_t flags = VRING_DESC_F_NEXT | (slot->op == VB_LOAD_READ ? VRING_DESC_F_WRITE : 0);
		void *piece;
		uint32_t length;

		for (uint32_t i = 0; (length = slot_piece(slots, slot, i, &piece)); i++)
			add(&builder, (uintptr_t)piece + delta, length, flags);
	} else if (slot->op != VB_LOAD_FLUSH) {
		add(&builder, header + 16, sizeof(struct virtio_blk_discard_write_zeroes), VRING_DESC_F_NEXT);
	}
	add(&builder, header + 32, 1, VRING_DESC_F_WRITE);
	slots->lengths[slot->index] = slots->indirect ? 1 : builder.count;
	if (slots->indirect)
		refer(slots, slot, header + LINE, builder.count);
	slot->header->type = TYPES[slot->op];
	slot->built_op = slot->op;
	slot->built_length = slot->length;
}
