/* The hot loop: completions in, requests out, one look at the clock for each batch. */
#include <errno.h>
#include <unistd.h>
#include "clock.h"
#include "histogram.h"
#include "worker.h"

#define PATIENCE 16u
#define MAX_PAUSES 64u

static bool is_exclusive(uint32_t op)
{
	return op != VB_LOAD_READ;
}

/* ---------------------------------------------------------------- completions */

static __attribute__((cold)) bool fail(struct worker *worker, const struct load_queue *queue, const struct slot *slot,
	uint32_t failure, uint64_t found)
{
	struct vb_load_error error = {.failure = failure, .queue = queue->index, .found = found};

	if (slot) {
		error.op = slot->op;
		error.offset = slot->offset;
		error.length = slot->length;
	}
	load_fail(worker->load, &error);
	return false;
}

static bool check_read(struct worker *worker, struct load_queue *queue, struct slot *slot)
{
	const struct vb_load_options *options = &worker->load->options;
	struct vb_load_error error = {
		.failure = VB_LOAD_MISMATCH, .op = slot->op, .queue = queue->index, .length = slot->length};
	uint64_t offset = slot->offset;
	uint32_t length;
	void *piece;

	for (uint32_t i = 0; (length = slot_piece(&queue->slots, slot, i, &piece)); i++) {
		if (!model_check(options->model, offset, piece, length, options->known_only, &worker->stats->compared,
			    &error)) {
			load_fail(worker->load, &error);
			return false;
		}
		offset += length;
	}
	return true;
}

static bool settle(struct worker *worker, struct load_queue *queue, struct slot *slot)
{
	struct vb_load_model *model = worker->load->options.model;
	bool good = true;

	if (slot->op == VB_LOAD_FLUSH)
		return true;
	if (slot->op == VB_LOAD_READ)
		good = check_read(worker, queue, slot);
	else if (slot->op == VB_LOAD_WRITE)
		model_written(model, slot->offset, slot->length, slot->generation);
	else if (slot->op == VB_LOAD_WRITE_ZEROES)
		model_zeroed(model, slot->offset, slot->length);
	else
		model_discarded(model, slot->offset, slot->length);
	model_unlock(model, slot->offset, slot->length, is_exclusive(slot->op));
	return good;
}

static inline struct slot *slot_of(struct load_queue *queue, uint32_t head)
{
	uint32_t index = head < ring_size(&queue->ring) ? queue->slots.of_head[head] : NO_SLOT;

	return index == NO_SLOT ? NULL : &queue->slots.slot[index];
}

static bool reap(struct worker *worker, struct load_queue *queue, uint32_t ready, uint64_t now)
{
	struct vb_load_stats *stats = worker->stats;
	uint64_t *histograms = worker->histograms;
	bool has_model = worker->load->options.model;

	/* The device wrote the statuses: bring them here all at once. */
	for (uint32_t i = 0; i < ready; i++) {
		struct slot *slot = slot_of(queue, ring_peek(&queue->ring, (uint16_t)i));

		if (slot)
			__builtin_prefetch(slot->header, 1);
	}
	for (uint32_t i = 0; i < ready; i++) {
		uint32_t head = ring_peek(&queue->ring, (uint16_t)i);
		struct slot *slot = slot_of(queue, head);
		struct vb_load_op_stats *op;
		uint64_t latency;
		uint8_t status;

		if (!slot || !slot->in_flight)
			return fail(worker, queue, NULL, VB_LOAD_USED_ID, head);
		status = load_relaxed(slot_status(slot));
		if (status != VIRTIO_BLK_S_OK)
			return fail(worker, queue, slot,
				status == STATUS_UNWRITTEN ? VB_LOAD_NO_STATUS : VB_LOAD_STATUS, status);
		slot->in_flight = false;
		latency = now - slot->submitted;
		op = &stats->op[slot->op];
		op->requests++;
		op->bytes += slot->length;
		op->latency_ticks += latency;
		if (latency > op->latency_max)
			op->latency_max = latency;
		histograms[slot->op * VB_LOAD_BUCKETS + histogram_bucket(latency)]++;
		queue->idle[queue->idle_tail++ & queue->idle_mask] = slot->index;
		if (has_model && !settle(worker, queue, slot))
			return false;
	}
	ring_take(&queue->ring, (uint16_t)ready);
	return true;
}

/* ---------------------------------------------------------------- requests */

/* With a model: reserve the blocks, looking for others if somebody is there. */
static bool reserve(struct worker *worker, struct load_queue *queue, struct ask *ask)
{
	struct vb_load_model *model = worker->load->options.model;

	for (int tries = 0; tries < 8; tries++) {
		if (ask->op == VB_LOAD_FLUSH || model_lock(model, ask->offset, ask->length, is_exclusive(ask->op)))
			return true;
		if (!worker->load->options.random || !pattern_next(&queue->pattern, ask))
			break;
	}
	worker->starved = true;
	return false;
}

static void fill_data(struct worker *worker, struct load_queue *queue, struct slot *slot)
{
	struct vb_load_model *model = worker->load->options.model;
	uint64_t offset = slot->offset;
	uint32_t length;
	void *piece;

	slot->generation = model_next_generation(model);
	for (uint32_t i = 0; (length = slot_piece(&queue->slots, slot, i, &piece)); i++) {
		model_fill(model, offset, slot->generation, piece, length);
		offset += length;
	}
}

/* How many were added; at most `most`. */
static uint32_t fill(struct worker *worker, struct load_queue *queue, uint32_t most, uint64_t now)
{
	const struct vb_load_options *options = &worker->load->options;
	uint32_t added = 0;

	while (added < most) {
		struct slot *slot = &queue->slots.slot[queue->idle[queue->idle_head & queue->idle_mask]];
		struct ask ask;

		if (worker->interval && now < worker->due) {
			worker->starved = true;
			break;
		}
		if (!pattern_next(&queue->pattern, &ask))
			break;
		if (options->model && !reserve(worker, queue, &ask))
			break;
		pattern_take(&queue->pattern, &ask);
		worker->due += worker->interval;
		queue->idle_head++;
		slot->offset = ask.offset;
		slot->op = (uint8_t)ask.op;
		slot->length = ask.length;
		slot->in_flight = true;
		if (slot->built_op != ask.op || slot->built_length != ask.length)
			slot_build(&queue->slots, slot);
		if (ask.op == VB_LOAD_DISCARD || ask.op == VB_LOAD_WRITE_ZEROES) {
			*slot_segment(slot) = (struct virtio_blk_discard_write_zeroes){
				.sector = ask.offset >> SECTOR_BITS,
				.num_sectors = ask.length >> SECTOR_BITS,
				.flags = ask.op == VB_LOAD_WRITE_ZEROES && options->unmap,
			};
			slot->header->sector = 0;
		} else {
			slot->header->sector = ask.offset >> SECTOR_BITS;
		}
		if (options->model && ask.op == VB_LOAD_WRITE)
			fill_data(worker, queue, slot);
		*slot_status(slot) = STATUS_UNWRITTEN;
		ring_add(&queue->ring, slot->head);
		added++;
	}
	return added;
}

static void publish(struct worker *worker, struct load_queue *queue, uint32_t added, uint64_t now)
{
	struct ring *ring = &queue->ring;

	for (uint32_t i = 0; i < added; i++) {
		/* The slots were taken from here, in this order. */
		uint16_t index = queue->idle[(queue->idle_head - added + i) & queue->idle_mask];

		queue->slots.slot[index].submitted = now;
	}
	if (ring_publish(ring)) {
		static const uint64_t one = 1;

		worker->stats->kicks++;
		/* EAGAIN: the counter is full, so the device has not been looking for a while; it is readable. */
		while (write(queue->kick_fd, &one, sizeof(one)) < 0 && errno == EINTR)
			;
	}
}

/*
 * Each look at the used ring takes its cache line away from the device, which wants to write there. If completions of many
 * requests come one by one, look less often, until a sixteenth of what is in flight comes at once: latencies grow by less
 * than that part of them.
 */
static void adapt_pauses(struct worker *worker, uint32_t ready, uint32_t in_flight)
{
	if (ready * PATIENCE < in_flight)
		worker->pauses = MIN(worker->pauses * 2, MAX_PAUSES);
	else if (ready * PATIENCE >= 2 * in_flight)
		worker->pauses = MAX(worker->pauses / 2, 1u);
}

bool queue_turn(struct worker *worker, struct load_queue *queue)
{
	bool tsc = worker->load->tsc, submits = worker->phase <= VB_LOAD_MEASURE;
	uint32_t ready = ring_ready(&queue->ring), idle = queue->idle_tail - queue->idle_head, added = 0;
	uint64_t begin, now;

	if (!ready && (!idle || !submits || !queue->pattern.left))
		return false;
	begin = clock_ticks(tsc);
	if (ready) {
		if (ready > ring_in_flight(&queue->ring))
			return fail(worker, queue, NULL, VB_LOAD_USED_IDX, ready);
		adapt_pauses(worker, ready, ring_in_flight(&queue->ring));
		ready = MIN(ready, worker->batch);
		if (!reap(worker, queue, ready, begin))
			return false;
		idle += ready;
		worker->stats->batches++;
	}
	if (submits)
		added = fill(worker, queue, MIN(idle, worker->batch), begin);
	now = clock_ticks(tsc);
	if (added)
		publish(worker, queue, added, now);
	if (!ready && !added)
		return false;
	worker->stats->busy_ticks += clock_ticks(tsc) - begin;
	store_relaxed(&worker->in_flight, worker->in_flight + added - ready);
	return true;
}
