/* packed_driver.c: the driver's half of a packed ring. VIRTIO 1.2 §2.8. */
#include <stdlib.h>
#include "harness.h"

enum { AVAIL = 1 << VRING_PACKED_DESC_F_AVAIL, USED = 1 << VRING_PACKED_DESC_F_USED };

struct packed_driver {
	struct vring_packed_desc *desc;
	uint32_t *driver_event, *device_event;
	uint16_t size;
	bool event_idx;
	uint32_t next;      /* slots written, free-running */
	uint32_t published; /* what the device can see of it */
	uint32_t used;      /* slots that came back, free-running */
	uint16_t first_flags;
	uint16_t slots[32768]; /* by id */
};

struct packed_driver *packed_driver_new(
	struct vring_packed_desc *desc, uint32_t *driver_event, uint32_t *device_event, uint16_t size, bool event_idx)
{
	struct packed_driver *packed = calloc(1, sizeof(*packed));

	packed->desc = desc;
	packed->driver_event = driver_event;
	packed->device_event = device_event;
	packed->size = size;
	packed->event_idx = event_idx;
	return packed;
}

static bool wrap_of(const struct packed_driver *packed, uint32_t position)
{
	return position / packed->size % 2 == 0;
}

static uint32_t event_of(const struct packed_driver *packed, uint32_t position)
{
	return position % packed->size | (uint32_t)wrap_of(packed, position) << 15;
}

void packed_driver_add(struct packed_driver *packed, const struct vring_desc *chain, uint32_t count, uint16_t id)
{
	packed->slots[id] = (uint16_t)count;
	for (uint32_t i = 0; i < count; i++) {
		struct vring_packed_desc *d = &packed->desc[packed->next % packed->size];
		uint16_t flags = (uint16_t)(chain[i].flags | (wrap_of(packed, packed->next) ? AVAIL : USED));

		CHECK(packed->next - packed->used < packed->size);
		d->addr = chain[i].addr;
		d->len = chain[i].len;
		d->id = id;
		if (packed->next == packed->published)
			packed->first_flags = flags;
		else
			store_relaxed(&d->flags, flags);
		packed->next++;
	}
}

void packed_driver_convert(struct vring_desc *table, uint32_t count)
{
	for (uint32_t i = 0; i < count; i++) {
		struct vring_desc d = table[i];
		/* NEXT means nothing there, and the id neither. */
		struct vring_packed_desc packed = {d.addr, d.len, (uint16_t)(0xdead + i), d.flags};

		memcpy(&table[i], &packed, sizeof(packed));
	}
}

bool packed_driver_has_added(const struct packed_driver *packed)
{
	return packed->next != packed->published;
}

bool packed_driver_publish(struct packed_driver *packed)
{
	uint32_t event, added = packed->next - packed->published;

	if (!added)
		return false;
	store_release(&packed->desc[packed->published % packed->size].flags, packed->first_flags);
	packed->published = packed->next;
	full_fence();
	event = load_relaxed(packed->device_event);
	if (!packed->event_idx || event >> 16 != VRING_PACKED_EVENT_FLAG_DESC)
		return event >> 16 != VRING_PACKED_EVENT_FLAG_DISABLE;
	for (uint32_t i = 1; i <= added; i++)
		if (event_of(packed, packed->next - i) == (event & 0xffff))
			return true;
	return false;
}

static bool is_used(const struct packed_driver *packed)
{
	uint16_t flags = load_acquire(&packed->desc[packed->used % packed->size].flags);
	bool wrap = wrap_of(packed, packed->used);

	return !!(flags & AVAIL) == wrap && !!(flags & USED) == wrap;
}

int packed_driver_reap(struct packed_driver *packed, uint32_t *written)
{
	const struct vring_packed_desc *d = &packed->desc[packed->used % packed->size];
	uint16_t id;

	if (packed->used == packed->published || !is_used(packed))
		return -1;
	id = load_relaxed(&d->id);
	CHECK(id < packed->size && packed->slots[id]);
	if (written)
		*written = load_relaxed(&d->flags) & VRING_DESC_F_WRITE ? load_relaxed(&d->len) : 0;
	packed->used += packed->slots[id];
	packed->slots[id] = 0;
	return id;
}

bool packed_driver_listen(struct packed_driver *packed)
{
	uint32_t event = packed->event_idx ? VRING_PACKED_EVENT_FLAG_DESC << 16 | event_of(packed, packed->used)
					   : (uint32_t)VRING_PACKED_EVENT_FLAG_ENABLE << 16;

	store_relaxed(packed->driver_event, event);
	full_fence();
	return packed->used != packed->published && is_used(packed);
}
