/* aio_lanes.c: see aio_lanes.h. */
#include "aio_lanes.h"

void aio_lanes_init(struct aio_lanes *lanes, uint32_t most)
{
	lanes->most = most;
	lanes->ready_end = &lanes->ready;
}

static int32_t file_of(const struct aio_op *op)
{
	if (op->kind == AIO_ZEROES)
		return -1;
	return op->kind == VB_IO_READ_MANY || op->kind == VB_IO_WRITE_MANY ? op->parts->fd : op->fd;
}

static uint32_t is_brief(const struct aio_op *op)
{
	return op->flags & AIO_BRIEF ? 1 : 0;
}

/* The lane of a file. Where more files have work than there are lanes, some share one. */
static struct lane *lane_of(struct aio_lanes *lanes, int32_t fd)
{
	struct lane *unused = NULL;

	for (uint32_t i = 0; i < LANES; i++) {
		struct lane *lane = &lanes->lanes[((uint32_t)fd + i) % LANES];

		if (lane->is_used && lane->fd == fd)
			return lane;
		if (!unused && !lane->queued && !lane->running)
			unused = lane;
		if (!lane->is_used)
			break; /* a lane once used remains so, and nobody has been put behind this one */
	}
	if (!unused)
		return &lanes->lanes[(uint32_t)fd % LANES];
	unused->is_used = true;
	unused->fd = fd;
	unused->end = &unused->first;
	return unused;
}

static bool is_ready(const struct aio_lanes *lanes, const struct lane *lane)
{
	return lane->queued && lane->running < lanes->most;
}

/* A lane's part in the sums: taken out before it changes, put back afterwards. */
static void count(struct aio_lanes *lanes, const struct lane *lane, bool in)
{
	uint32_t sign = in ? 1 : -1u;
	uint32_t waiting = is_ready(lanes, lane) ? MIN(lane->queued, lanes->most - lane->running) : 0;

	lanes->waiting += sign * waiting;
	lanes->brief += sign * MIN(lane->brief, waiting);
}

static void append(struct aio_lanes *lanes, struct lane *lane)
{
	lane->next = NULL;
	*lanes->ready_end = lane;
	lanes->ready_end = &lane->next;
}

void aio_lanes_add(struct aio_lanes *lanes, struct aio_op *op)
{
	struct lane *lane = lane_of(lanes, file_of(op));
	bool was_ready = is_ready(lanes, lane);

	count(lanes, lane, false);
	op->lane = (uint8_t)(lane - lanes->lanes);
	op->next = NULL;
	*lane->end = op;
	lane->end = &op->next;
	lane->queued++;
	lane->brief += is_brief(op);
	count(lanes, lane, true);
	if (!was_ready && is_ready(lanes, lane))
		append(lanes, lane);
}

struct aio_op *aio_lanes_take(struct aio_lanes *lanes)
{
	struct lane *lane = lanes->ready;
	struct aio_op *op;

	if (!lane)
		return NULL;
	count(lanes, lane, false);
	op = lane->first;
	lane->first = op->next;
	if (!lane->first)
		lane->end = &lane->first;
	lane->queued--;
	lane->brief -= is_brief(op);
	lane->running++;
	count(lanes, lane, true);
	lanes->ready = lane->next;
	if (!lanes->ready)
		lanes->ready_end = &lanes->ready;
	if (is_ready(lanes, lane))
		append(lanes, lane);
	return op;
}

void aio_lanes_end(struct aio_lanes *lanes, const struct aio_op *op)
{
	struct lane *lane = &lanes->lanes[op->lane];
	bool was_ready = is_ready(lanes, lane);

	count(lanes, lane, false);
	lane->running--;
	lane->ran = 0;
	count(lanes, lane, true);
	if (!was_ready && is_ready(lanes, lane))
		append(lanes, lane);
}

void aio_lanes_sweep(struct aio_lanes *lanes, struct aio_op **swept)
{
	lanes->waiting = lanes->brief = 0;
	lanes->ready = NULL;
	lanes->ready_end = &lanes->ready;
	for (uint32_t i = 0; i < LANES; i++) {
		struct lane *lane = &lanes->lanes[i];

		if (!lane->queued)
			continue;
		lane->end = aio_sweep_list(&lane->first, swept);
		lane->queued = lane->brief = 0;
		for (const struct aio_op *op = lane->first; op; op = op->next) {
			lane->queued++;
			lane->brief += is_brief(op);
		}
		count(lanes, lane, true);
		if (is_ready(lanes, lane))
			append(lanes, lane);
	}
}

uint32_t aio_lanes_stuck(struct aio_lanes *lanes)
{
	uint32_t stuck = 0;

	for (uint32_t i = 0; i < LANES; i++) {
		stuck += lanes->lanes[i].ran;
		lanes->lanes[i].ran = lanes->lanes[i].running;
	}
	return stuck;
}
