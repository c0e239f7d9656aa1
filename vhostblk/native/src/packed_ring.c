/*
 * packed_ring.c: the packed ring, device side. VIRTIO 1.2 §2.8; vhostblk/virtio/packed.py is the readable reference.
 *
 * One ring of descriptors, which both sides write. A position in it is a slot and a wrap counter, so it is a number modulo
 * twice the ring's size. Two are ours: the next chain is at `avail`, the next used descriptor goes to `used`, and
 *
 *     used <= avail <= used + size
 *
 * because what is in flight occupies slots; that is checked whenever a chain is taken. Which slots are the driver's is not
 * said by an index: descriptors say it, with two flags that mean the opposite after each round.
 *
 * Of a batch of used descriptors the first gets its flags last: until then the driver does not look beyond it.
 *
 * Barriers; behind the bar what the driver does on the other side (VIRTIO 1.2 §2.8.21, §2.8.22):
 *   [A] a chain's first flags are loaded before the rest of it           | stored after it
 *   [B] a batch's first flags are stored after the others and the data   | loaded before them
 *   [C] flags stored, full fence, the driver's event structure loaded    | it is stored, fence, flags loaded
 *   [D] the device's event structure stored, full fence, flags loaded    | flags stored, fence, it is loaded
 */
#include <endian.h>
#include "chain.h"
#include "inflight_packed.h"

#define DESC_F_AVAIL (1u << VRING_PACKED_DESC_F_AVAIL)
#define DESC_F_USED (1u << VRING_PACKED_DESC_F_USED)
#define DESC_F_BOTH (DESC_F_AVAIL | DESC_F_USED)

#define POSITION_WRAP (1u << VRING_PACKED_EVENT_F_WRAP_CTR)
#define POSITION_SLOT (POSITION_WRAP - 1u)

int packed_find(struct virtqueue *vq, const struct vb_memory *memory, const struct vb_queue_config *config)
{
	void *desc = memory_ring(memory, config->desc_uva, DESC_SIZE * (uint64_t)config->size);
	void *driver_event = memory_ring(memory, config->avail_uva, sizeof(uint32_t));
	void *device_event = memory_ring(memory, config->used_uva, sizeof(uint32_t));

	/* VIRTIO 1.2 §2.8.11: the driver MUST align the parts to 16, 4 and 4 bytes. */
	if (!desc || !driver_event || !device_event || config->desc_uva % 16 || config->avail_uva % 4 ||
		config->used_uva % 4)
		return -EFAULT;
	/* Where regions are not mapped at page boundaries the copy of an aligned address may not be. */
	if ((uintptr_t)desc % 16 || (uintptr_t)driver_event % 4 || (uintptr_t)device_event % 4)
		return -EFAULT;
	vq->packed.desc = desc;
	vq->packed.driver_event = driver_event;
	vq->packed.device_event = device_event;
	/* What the front-end gives for the log is the address of one part, and does not say which. */
	vq->log.desc_gpa = memory_ring_gpa(memory, config->desc_uva);
	vq->log.event_gpa = memory_ring_gpa(memory, config->used_uva);
	return 0;
}

/* What a position is counted from the beginning of a round with a wrap counter of 1: less than twice the size. */
static uint32_t slots_before(const struct virtqueue *vq, uint32_t position)
{
	return (position & POSITION_SLOT) + (position & POSITION_WRAP ? 0 : vq->size);
}

/* What the flags of a slot say in a round with this wrap counter, when its descriptor is available, or used. */
static uint16_t avail_flags(bool wrap)
{
	return wrap ? DESC_F_AVAIL : DESC_F_USED;
}

static uint16_t used_flags(bool wrap)
{
	return wrap ? DESC_F_BOTH : 0;
}

uint32_t packed_base(const struct virtqueue *vq)
{
	const struct packed_ring *ring = &vq->packed;
	uint32_t avail = ring->avail.slot | (ring->avail.flags == avail_flags(true) ? POSITION_WRAP : 0);
	uint32_t used = ring->used.slot | (ring->used.flags == used_flags(true) ? POSITION_WRAP : 0);

	return avail | used << 16;
}

static inline void advance(const struct virtqueue *vq, struct packed_position *position, uint32_t slots)
{
	uint32_t slot = position->slot + slots;

	if (slot >= vq->size) {
		slot -= vq->size;
		position->flags ^= DESC_F_BOTH;
	}
	position->slot = (uint16_t)slot;
}

static struct inflight_position unpack(uint32_t position)
{
	return (struct inflight_position){position & POSITION_SLOT, position & POSITION_WRAP};
}

static struct inflight_position used_position(const struct virtqueue *vq)
{
	return (struct inflight_position){vq->packed.used.slot, vq->packed.used.flags == used_flags(true)};
}

/* Whoever was killed in the middle of a batch may have written used descriptors behind the first one, which the driver
 * would come to believe in as soon as the first one is there. Make them available ones again. */
static void take_back_used(struct virtqueue *vq)
{
	struct packed_position at = vq->packed.used;

	for (uint32_t left = vq->in_flight; left; left--) {
		uint16_t flags = le16toh(load_relaxed(&vq->packed.desc[at.slot].flags));

		if ((flags & DESC_F_BOTH) == at.flags)
			store_relaxed(&vq->packed.desc[at.slot].flags, htole16(flags ^ DESC_F_USED));
		advance(vq, &at, 1);
	}
}

int packed_init(struct virtqueue *vq, const struct vb_queue_config *config)
{
	struct inflight_position avail = unpack(config->base & UINT16_MAX), used = unpack(config->base >> 16);
	uint32_t rounds = 2u * vq->size;
	int error;

	if (avail.slot >= vq->size || used.slot >= vq->size)
		return -EINVAL;
	error = inflight_packed_init(&vq->inflight, config, vq->packed.desc, &used, &avail);
	if (error)
		return error;
	vq->packed.avail = (struct packed_position){avail.slot, avail_flags(avail.wrap)};
	vq->packed.used = (struct packed_position){used.slot, used_flags(used.wrap)};
	/* What whoever served the ring before has taken, and not given back. */
	vq->in_flight =
		(slots_before(vq, packed_base(vq) & UINT16_MAX) + rounds - slots_before(vq, packed_base(vq) >> 16)) %
		rounds;
	if (vq->in_flight > vq->size)
		return -EINVAL;
	if (vq->inflight.packed)
		take_back_used(vq);
	return 0;
}

/* The buffers of an indirect table. 0 or -enum vb_broken. */
static int walk_table(struct virtqueue *vq, const struct vb_memory *memory, uint16_t flags,
	const struct vring_packed_desc *d, struct chain *chain)
{
	struct table table;
	int result = find_table(vq, memory, flags, le64toh(d->addr), le32toh(d->len), &table);

	/* VIRTIO 1.2 §2.8.7: all of them, whatever the other flags say. */
	for (uint32_t index = 0; !result && index < table.count; index++) {
		struct vring_packed_desc entry;

		chain->descriptors++;
		copy_once(&entry, table.entries + index * sizeof(entry), sizeof(entry));
		result = append_buffer(vq, chain, memory, le64toh(entry.addr), le32toh(entry.len),
			le16toh(entry.flags) & VRING_DESC_F_WRITE);
	}
	return result;
}

/* Take a descriptor that was read. 1: it is the last one, 0: another one follows, or -enum vb_broken. */
static int take(
	struct virtqueue *vq, const struct vb_memory *memory, const struct vring_packed_desc *d, struct chain *chain)
{
	uint16_t flags = le16toh(d->flags);
	int result;

	chain->descriptors++;
	chain->slots++;
	chain->head = le16toh(d->id); /* §2.8.6: the last one's counts */
	if (flags & VRING_DESC_F_INDIRECT) {
		/* §2.8.19: not in a chain. */
		result = chain->slots > 1 ? -VB_BROKEN_INDIRECT : walk_table(vq, memory, flags, d, chain);
		return result ? result : 1;
	}
	result = append_buffer(vq, chain, memory, le64toh(d->addr), le32toh(d->len), flags & VRING_DESC_F_WRITE);
	return result ? result : !(flags & VRING_DESC_F_NEXT);
}

/* Take the chain that begins at `slot`, which is available, its flags read. Each descriptor is read once. */
static int walk(
	struct virtqueue *vq, const struct vb_memory *memory, uint32_t slot, uint16_t flags, struct chain *chain)
{
	uint32_t room = vq->size - vq->in_flight;

	if (!room)
		return -VB_BROKEN_AVAIL_IDX;
	/* VIRTIO 1.2 §2.8.17: a chain is no longer than the room that the ring has for it. */
	while (room--) {
		struct vring_packed_desc d;
		int result;

		copy_once(&d, &vq->packed.desc[slot], sizeof(d));
		if (!chain->slots)
			d.flags = htole16(flags);
		inflight_packed_copy(&vq->inflight, &d);
		result = take(vq, memory, &d, chain);
		if (result)
			return result;
		if (++slot == vq->size)
			slot = 0;
	}
	return -VB_BROKEN_CHAIN_LOOP;
}

static inline bool is_available(const struct virtqueue *vq, uint16_t flags)
{
	return (flags & DESC_F_BOTH) == vq->packed.avail.flags;
}

/* A chain that was popped by whoever had the ring before; what it had in the ring may be overwritten. */
static int pop_replay(struct virtqueue *vq, const struct vb_memory *memory, struct chain *chain)
{
	struct inflight *f = &vq->inflight;
	uint16_t first = f->replays[f->replayed], entry = first;
	bool is_last;
	int result;

	*chain = (struct chain){.capacity = chain->capacity, .entry = first};
	do {
		struct vring_packed_desc d;

		is_last = entry == f->last[first];
		inflight_packed_read(f, &entry, &d);
		result = take(vq, memory, &d, chain);
	} while (!result && !is_last);
	if (result >= 0 && (!result || !is_last))
		return -VB_BROKEN_CHAIN_LOOP; /* somebody has changed it */
	f->replayed += result > 0;
	return result;
}

int packed_pop(struct virtqueue *vq, const struct vb_memory *memory, struct chain *chain)
{
	struct packed_position *avail = &vq->packed.avail;
	uint16_t flags = le16toh(load_acquire(&vq->packed.desc[avail->slot].flags)); /* [A] */
	int result;

	if (inflight_replays(&vq->inflight))
		return pop_replay(vq, memory, chain);
	if (!is_available(vq, flags))
		return 0;
	inflight_packed_restart(&vq->inflight);
	*chain = (struct chain){.capacity = chain->capacity};
	result = walk(vq, memory, avail->slot, flags, chain);
	if (result < 0)
		return result;
	chain->entry = inflight_packed_begin(&vq->inflight, chain->slots); /* it is ours from here on */
	advance(vq, avail, chain->slots);
	vq->in_flight += chain->slots;
	return 1;
}

bool packed_pending(const struct virtqueue *vq)
{
	return inflight_replays(&vq->inflight) ||
	       is_available(vq, le16toh(load_relaxed(&vq->packed.desc[vq->packed.avail.slot].flags)));
}

void packed_push(struct virtqueue *vq, uint16_t id, uint16_t slots, uint16_t entry, uint32_t written)
{
	struct packed_ring *ring = &vq->packed;
	struct vring_packed_desc *d = &ring->desc[ring->used.slot];
	/* VIRTIO 1.2 §2.8.4: a length counts only together with WRITE. */
	uint16_t flags = ring->used.flags | (written ? VRING_DESC_F_WRITE : 0);

	store_relaxed(&d->id, htole16(id));
	store_relaxed(&d->len, htole32(written));
	if (ring->unpublished) {
		store_relaxed(&d->flags, htole16(flags));
	} else {
		ring->first_slot = ring->used.slot;
		ring->first_flags = flags;
	}
	inflight_packed_push(&vq->inflight, entry);
	advance(vq, &ring->used, slots);
	ring->unpublished += slots;
	vq->used_idx++;
}

/* The slots that used descriptors are in, and those between them. */
__attribute__((noinline)) static void mark_published(const struct virtqueue *vq)
{
	const struct packed_ring *ring = &vq->packed;
	uint32_t before_end = MIN(ring->unpublished, vq->size - (uint32_t)ring->first_slot);

	vb_memory_log_mark(vq->log.log, vq->log.desc_gpa + ring->first_slot * DESC_SIZE, before_end * DESC_SIZE);
	vb_memory_log_mark(vq->log.log, vq->log.desc_gpa, (ring->unpublished - before_end) * DESC_SIZE);
}

__attribute__((noinline)) static void mark_event(const struct virtqueue *vq)
{
	vb_memory_log_mark(vq->log.log, vq->log.event_gpa, sizeof(*vq->packed.device_event));
}

void packed_publish(struct virtqueue *vq)
{
	struct packed_ring *ring = &vq->packed;

	/* Here the driver learns that chains are done. */
	if (vq->published == vq->used_idx)
		return;
	inflight_packed_prepare(&vq->inflight, used_position(vq));
	store_release(&ring->desc[ring->first_slot].flags, htole16(ring->first_flags)); /* [B] */
	inflight_packed_publish(&vq->inflight, used_position(vq));
	if (vq->log.log)
		mark_published(vq);
	vq->published = vq->used_idx;
	vq->in_flight -= ring->unpublished;
	ring->unnotified += ring->unpublished;
	ring->unpublished = 0;
}

bool packed_should_notify(struct virtqueue *vq)
{
	uint32_t used = slots_before(vq, packed_base(vq) >> 16), passed = vq->packed.unnotified, rounds = 2u * vq->size;
	bool first = !vq->notified_valid;
	uint32_t event, flags;

	if (!passed)
		return false;
	vq->notified = vq->published;
	vq->notified_valid = true;
	vq->packed.unnotified = 0;
	full_fence(); /* [C] */
	if (first)
		return true;
	/* VIRTIO 1.2 §2.8.14: position, then flags. In one load they belong together. */
	event = le32toh(load_relaxed(vq->packed.driver_event));
	flags = event >> 16 & 3;
	if (!vq->event_idx || flags != VRING_PACKED_EVENT_FLAG_DESC)
		return flags != VRING_PACKED_EVENT_FLAG_DISABLE;
	if ((event & POSITION_SLOT) >= vq->size)
		return true; /* nonsense; a call too many is legal */
	/* §2.8.10: whether the position is among those that were passed. */
	return (used + rounds - 1 - slots_before(vq, event & UINT16_MAX)) % rounds < passed;
}

void packed_enable_kicks(struct virtqueue *vq)
{
	uint32_t event = VRING_PACKED_EVENT_FLAG_ENABLE << 16;

	if (vq->event_idx)
		event = VRING_PACKED_EVENT_FLAG_DESC << 16 | (packed_base(vq) & UINT16_MAX);
	store_relaxed(vq->packed.device_event, htole32(event));
	full_fence(); /* [D] */
	if (vq->log.log)
		mark_event(vq);
}

void packed_disable_kicks(struct virtqueue *vq)
{
	store_relaxed(vq->packed.device_event, htole32(VRING_PACKED_EVENT_FLAG_DISABLE << 16));
	if (vq->log.log)
		mark_event(vq);
}

void packed_mark_ring(const struct virtqueue *vq)
{
	vb_memory_log_mark(vq->log.log, vq->log.desc_gpa, vq->size * (uint64_t)DESC_SIZE);
	mark_event(vq);
}
