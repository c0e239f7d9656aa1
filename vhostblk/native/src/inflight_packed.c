/*
 * inflight_packed.c: what was in flight when whoever served a packed ring came to its end. vhost-user, "Inflight I/O
 * tracking".
 *
 * Theory of operation. Two transactions may have been cut short. A chain that was being taken is not in flight before
 * old_free_head says so. A batch that was being given back is done once the flags of its first used descriptor, the one at
 * old_used_idx, do not say any more that the slot is available; before that it is as if it had not begun. So one of two
 * free lists counts, and what is not in it is in flight. The ring goes on behind the slots of that.
 *
 * The front-end can write what it likes into the region. So it is read once, into memory of ours, and believed if the free
 * list and the chains in flight have each entry once; loops end with the number of entries.
 */
#include <endian.h>
#include <errno.h>
#include <stdlib.h>
#include "inflight_packed.h"
#include "sigbus.h"

#define VERSION 1
#define DESC_F_AVAIL (1u << VRING_PACKED_DESC_F_AVAIL)
#define DESC_F_USED (1u << VRING_PACKED_DESC_F_USED)

/* What the region says of an entry. */
struct entry {
	uint64_t counter;
	uint16_t index;
	uint16_t num;
	uint8_t inflight;
	bool seen; /* in the free list, or in a chain */
	bool is_free;
};

static uint32_t room(const struct vb_queue_config *config)
{
	return (uint32_t)((config->inflight_size - sizeof(struct inflight_packed_region)) /
			  sizeof(struct inflight_packed_state));
}

static int allocate(struct inflight *f, uint32_t entries, struct entry **ret)
{
	struct entry *table = calloc(entries, sizeof(*table));

	f->batch = malloc(4 * entries * sizeof(*f->batch));
	if (!table || !f->batch) {
		free(table);
		return -ENOMEM;
	}
	f->replays = f->batch + entries;
	f->next = f->replays + entries;
	f->last = f->next + entries;
	*ret = table;
	return 0;
}

static void begin_afresh(struct inflight *f, uint32_t entries, struct inflight_position used)
{
	struct inflight_packed_region *region = f->packed;

	for (uint32_t i = 0; i < entries; i++) {
		f->next[i] = (uint16_t)(i + 1);
		store_release(&region->desc[i].inflight, 0);
		store_release(&region->desc[i].next, (uint16_t)(i + 1));
	}
	store_release(&region->features, 0);
	store_release(&region->desc_num, (uint16_t)entries);
	store_release(&region->free_head, 0);
	store_release(&region->old_free_head, 0);
	inflight_packed_store_used(f, used, used);
	store_release(&region->version, VERSION); /* from here on the rest counts */
}

/* Whether the driver was shown the batch whose first used descriptor is there. */
static bool was_shown(const struct vring_packed_desc *ring, struct inflight_position old)
{
	uint16_t available = old.wrap ? DESC_F_AVAIL : DESC_F_USED;

	return (le16toh(load_acquire(&ring[old.slot].flags)) & (DESC_F_AVAIL | DESC_F_USED)) != available;
}

static void read_entries(struct inflight *f, struct entry *table, uint32_t entries)
{
	for (uint32_t i = 0; i < entries; i++) {
		const struct inflight_packed_state *state = &f->packed->desc[i];

		table[i] = (struct entry){
			.counter = load_relaxed(&state->counter),
			.index = (uint16_t)i,
			.num = load_relaxed(&state->num),
			.inflight = load_relaxed(&state->inflight),
		};
		f->next[i] = load_relaxed(&state->next);
		f->last[i] = load_relaxed(&state->last);
	}
}

/* How many entries are free, or -EBADMSG. */
static int mark_free(const struct inflight *f, struct entry *table, uint32_t entries)
{
	int count = 0;

	for (uint32_t i = f->free_head; i < entries; i = f->next[i]) {
		if (table[i].seen)
			return -EBADMSG;
		table[i].seen = table[i].is_free = true;
		count++;
	}
	return count;
}

/* Mark the entries of a chain that begins at `head`. 0 or -EBADMSG. */
static int mark_chain(const struct inflight *f, struct entry *table, uint32_t entries, uint32_t head)
{
	uint32_t i = head;

	for (uint16_t left = table[head].num; left; left--) {
		if (i >= entries || table[i].seen)
			return -EBADMSG;
		table[i].seen = true;
		if (left == 1)
			return i == f->last[head] ? 0 : -EBADMSG;
		i = f->next[i];
	}
	return -EBADMSG; /* a chain of nothing */
}

/* How many slots the chains in flight have, or -EBADMSG: the entries are not a free list and chains. */
static int mark_all(const struct inflight *f, struct entry *table, uint32_t entries)
{
	int free_entries = mark_free(f, table, entries);
	uint32_t slots = 0;

	if (free_entries < 0)
		return free_entries;
	for (uint32_t i = 0; i < entries; i++) {
		if (table[i].inflight > 1)
			return -EBADMSG;
		if (!table[i].inflight || table[i].is_free)
			continue;
		if (mark_chain(f, table, entries, i))
			return -EBADMSG;
		slots += table[i].num;
	}
	return slots + (uint32_t)free_entries == entries ? (int)slots : -EBADMSG;
}

static int compare_counter(const void *a, const void *b)
{
	const struct entry *left = a, *right = b;

	return left->counter < right->counter ? -1 : left->counter > right->counter;
}

static void keep_replays(struct inflight *f, struct entry *table, uint32_t entries)
{
	uint16_t count = 0;

	qsort(table, entries, sizeof(*table), compare_counter);
	for (uint32_t i = 0; i < entries; i++) {
		if (table[i].inflight && !table[i].is_free) {
			f->replays[count++] = table[i].index;
			f->counter = table[i].counter + 1;
		}
	}
	f->replays_end = count;
}

/* Finish, or take back, what the last batch has begun. */
static void repair(struct inflight *f, const struct entry *table, uint32_t entries, struct inflight_position used)
{
	struct inflight_packed_region *region = f->packed;

	store_release(&region->free_head, f->free_head);
	for (uint32_t i = 0; i < entries; i++)
		if (table[i].is_free && table[i].inflight)
			store_release(&region->desc[i].inflight, 0);
	store_release(&region->old_free_head, f->free_head); /* [I7] */
	inflight_packed_store_used(f, used, used);
}

static int resume(struct inflight *f, const struct vb_queue_config *config, const struct vring_packed_desc *ring,
	struct entry *table, uint32_t entries, struct inflight_position *used, struct inflight_position *avail)
{
	const struct inflight_packed_region *region = f->packed;
	uint64_t word = load_relaxed((const uint64_t *)&region->used);
	struct inflight_packed_used fields;
	struct inflight_position old, new;
	uint16_t old_free_head = load_relaxed(&region->old_free_head), free_head = load_relaxed(&region->free_head);
	uint32_t size = config->size;
	bool moved;
	int slots;

	memcpy(&fields, &word, sizeof(fields));
	old = (struct inflight_position){fields.old_used_idx, fields.old_used_wrap_counter & 1};
	new = (struct inflight_position){fields.used_idx, fields.used_wrap_counter & 1};
	moved = old.slot != new.slot || old.wrap != new.wrap;
	if (old.slot >= size || new.slot >= size)
		return -EBADMSG;
	read_entries(f, table, entries);
	moved = moved && was_shown(ring, old);
	*used = moved ? new : old;
	f->free_head = moved ? free_head : old_free_head;
	slots = mark_all(f, table, entries);
	if (slots < 0 || (uint32_t)slots > size)
		return -EBADMSG;
	repair(f, table, entries, *used);
	keep_replays(f, table, entries);
	*avail = *used;
	avail->slot = (uint16_t)((used->slot + (uint32_t)slots) % size);
	if (used->slot + (uint32_t)slots >= size)
		avail->wrap = !avail->wrap;
	return 0;
}

static int begin(struct inflight *f, const struct vb_queue_config *config, const struct vring_packed_desc *ring,
	struct inflight_position *used, struct inflight_position *avail)
{
	uint16_t version = load_acquire(&f->packed->version);
	uint32_t entries = version ? load_relaxed(&f->packed->desc_num) : config->size;
	struct entry *table;
	int error;

	if (version > VERSION || (version && load_relaxed(&f->packed->features)) || entries < config->size ||
		entries > room(config))
		return -EBADMSG;
	error = allocate(f, entries, &table);
	if (error)
		return error;
	if (version)
		error = resume(f, config, ring, table, entries, used, avail);
	else
		begin_afresh(f, entries, *used);
	free(table);
	return error;
}

int inflight_packed_init(struct inflight *f, const struct vb_queue_config *config, const struct vring_packed_desc *ring,
	struct inflight_position *used, struct inflight_position *avail)
{
	*f = (struct inflight){.guard = -1};
	if (!config->inflight)
		return 0;
	if (config->inflight % _Alignof(struct inflight_packed_region) ||
		config->inflight_size < sizeof(struct inflight_packed_region) || room(config) < config->size)
		return -EBADMSG;
	f->guard = sigbus_guard_add(config->inflight, config->inflight_size);
	if (f->guard < 0)
		return f->guard;
	f->packed = (struct inflight_packed_region *)config->inflight;
	return begin(f, config, ring, used, avail);
}

void inflight_packed_read(const struct inflight *f, uint16_t *entry, struct vring_packed_desc *d)
{
	const struct inflight_packed_state *state = &f->packed->desc[*entry];

	d->addr = load_relaxed(&state->addr);
	d->len = load_relaxed(&state->len);
	d->id = load_relaxed(&state->id);
	d->flags = load_relaxed(&state->flags);
	*entry = f->next[*entry];
}
