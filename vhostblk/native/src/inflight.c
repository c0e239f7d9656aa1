/*
 * inflight.c: what was in flight when whoever served a split ring came to its end. vhost-user, "Inflight I/O tracking";
 * vhostblk/vhost/inflight_split.py is the readable reference.
 *
 * Theory of operation. A chain is in flight from when it was popped until used.idx has it, so with n in flight
 * used.idx + n chains were popped: what the front-end says of that (SET_VRING_BASE) is a guess, since it did not see
 * them go. The region may say that more are in flight, because those of the last batch are marked as done one by one
 * behind used.idx; the batch is as long as used.idx is ahead of the region's used_idx, and is listed in the region.
 *
 * The front-end can write what it likes into the region. So it is read once, into memory of ours, and believed if it
 * makes sense; loops end with the ring's size.
 */
#include <endian.h>
#include <errno.h>
#include <stdlib.h>
#include "inflight.h"
#include "sigbus.h"

#define VERSION 1

/* What the region says of one chain. */
struct record {
	uint64_t counter;
	uint16_t head;
	uint16_t next;
	uint8_t inflight;
	uint8_t is_last_batch;
};

static int compare_counter(const void *a, const void *b)
{
	const struct record *left = a, *right = b;

	return left->counter < right->counter ? -1 : left->counter > right->counter;
}

static uint32_t room(const struct vb_queue_config *config)
{
	return (uint32_t)((config->inflight_size - sizeof(struct inflight_region)) / sizeof(struct inflight_state));
}

static void read_records(const struct inflight_region *region, struct record *records, uint32_t count)
{
	for (uint32_t i = 0; i < count; i++) {
		records[i] = (struct record){
			.counter = load_relaxed(&region->desc[i].counter),
			.head = (uint16_t)i,
			.next = load_relaxed(&region->desc[i].next),
			.inflight = load_relaxed(&region->desc[i].inflight),
		};
	}
}

/* Chains that used.idx has, whatever else the region says of them. */
static void mark_last_batch(struct record *records, uint32_t size, uint16_t head, uint16_t batch)
{
	for (; batch && head < size; batch--, head = records[head].next)
		records[head].is_last_batch = true;
}

static bool in_flight(const struct record *record)
{
	return record->inflight && !record->is_last_batch;
}

/* How many are in flight, or -EBADMSG. */
static int count_in_flight(const struct record *records, uint32_t size, uint32_t entries)
{
	int count = 0;

	for (uint32_t i = 0; i < entries; i++) {
		if (records[i].inflight > 1 || (in_flight(&records[i]) && i >= size))
			return -EBADMSG;
		count += in_flight(&records[i]);
	}
	return count;
}

/* From an area that was never used, or of a device that was reset, nothing is believed. */
static void begin_afresh(struct inflight *f, uint32_t size, uint16_t used_idx)
{
	struct inflight_region *region = f->region;

	for (uint32_t i = 0; i < size; i++)
		store_release(&region->desc[i].inflight, 0);
	store_release(&region->features, 0);
	store_release(&region->desc_num, (uint16_t)size);
	store_release(&region->used_idx, used_idx);
	store_release(&region->version, VERSION); /* from here on the rest counts */
}

/* Finish what the last batch has begun. */
static void repair(struct inflight *f, const struct record *records, uint32_t size, uint16_t used_idx)
{
	for (uint32_t i = 0; i < size; i++)
		if (records[i].is_last_batch && records[i].inflight)
			store_release(&f->region->desc[i].inflight, 0);
	store_release(&f->region->used_idx, used_idx); /* [I4] */
}

static void keep_replays(struct inflight *f, struct record *records, uint32_t size)
{
	uint16_t count = 0;

	qsort(records, size, sizeof(*records), compare_counter);
	for (uint32_t i = 0; i < size; i++) {
		if (in_flight(&records[i])) {
			f->replays[count++] = records[i].head;
			f->counter = records[i].counter + 1;
		}
	}
	f->replays_end = count;
}

/* Go on where somebody else has stopped. */
static int resume(struct inflight *f, const struct vb_queue_config *config, struct record *records, uint16_t used_idx,
	uint16_t avail_idx, uint16_t *next_avail)
{
	struct inflight_region *region = f->region;
	uint32_t size = config->size, entries = load_relaxed(&region->desc_num);
	uint16_t batch = (uint16_t)(used_idx - load_relaxed(&region->used_idx));
	uint16_t last = load_relaxed(&region->last_batch_head);
	int count;

	if (load_relaxed(&region->features) || entries < size || entries > room(config))
		return -EBADMSG;
	read_records(region, records, entries);
	if (batch <= size)
		mark_last_batch(records, size, last, batch);
	count = count_in_flight(records, size, entries);
	/* Where nothing is in flight used_idx may be of another life of the ring. */
	if (count < 0 || (count && batch > size) || count > (uint16_t)(avail_idx - used_idx))
		return -EBADMSG;
	f->last_batch_head = (uint16_t)(last < size ? last : 0);
	*next_avail = (uint16_t)(used_idx + count);
	repair(f, records, size, used_idx);
	keep_replays(f, records, size);
	return 0;
}

static int begin(struct inflight *f, const struct vb_queue_config *config, uint16_t used_idx, uint16_t avail_idx,
	uint16_t *next_avail)
{
	uint16_t version = load_acquire(&f->region->version);
	struct record *records;
	int error;

	if (!version) {
		begin_afresh(f, config->size, used_idx);
		return 0;
	}
	if (version != VERSION)
		return -EBADMSG;
	records = malloc(room(config) * sizeof(*records));
	error = records ? resume(f, config, records, used_idx, avail_idx, next_avail) : -ENOMEM;
	free(records);
	return error;
}

int inflight_init(struct inflight *f, const struct vb_queue_config *config, uint16_t used_idx, uint16_t avail_idx,
	uint16_t *next_avail)
{
	*f = (struct inflight){.guard = -1};
	if (!config->inflight)
		return 0;
	if (config->inflight % _Alignof(struct inflight_region) ||
		config->inflight_size < sizeof(struct inflight_region) || room(config) < config->size)
		return -EBADMSG;
	f->guard = sigbus_guard_add(config->inflight, config->inflight_size);
	if (f->guard < 0)
		return f->guard;
	f->batch = malloc(2 * config->size * sizeof(*f->batch));
	if (!f->batch)
		return -ENOMEM;
	f->replays = f->batch + config->size;
	f->region = (struct inflight_region *)config->inflight;
	return begin(f, config, used_idx, avail_idx, next_avail);
}

void inflight_deinit(struct inflight *f)
{
	if (f->guard >= 0)
		sigbus_guard_remove(f->guard);
	free(f->batch);
	*f = (struct inflight){.guard = -1};
}

bool inflight_faulted(const struct inflight *f)
{
	return f->guard >= 0 && sigbus_guard_faulted(f->guard);
}
