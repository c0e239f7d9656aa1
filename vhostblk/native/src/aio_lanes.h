/*
 * Operations that wait for a thread, in a lane for each file: a file whose device hangs has some threads, never all.
 * Lanes are served in turn, the operations of a lane in order. Knows nothing of threads; the caller has a lock.
 */
#pragma once
#include "aio.h"

#define LANES 256

struct lane {
	bool is_used;     /* ever */
	int32_t fd;       /* whose operations they are; -1: no file's */
	uint32_t running; /* taken, and not ended */
	uint32_t ran;     /* of those running, at the last aio_lanes_stuck; 0: one has ended since */
	uint32_t queued;
	uint32_t brief; /* of those queued, AIO_BRIEF */
	struct aio_op *first;
	struct aio_op **end;
	struct lane *next; /* of those that are ready: something is queued, and not too much is running */
};

struct aio_lanes {
	uint32_t most; /* operations of a lane that may run at once */
	/* What could be taken now, of all lanes together: */
	uint32_t waiting; /* operations */
	uint32_t brief;   /* of these, AIO_BRIEF */
	struct lane *ready;
	struct lane **ready_end;
	struct lane lanes[LANES];
};

void aio_lanes_init(struct aio_lanes *lanes, uint32_t most);
void aio_lanes_add(struct aio_lanes *lanes, struct aio_op *op);
/* The next one; NULL: there is none that may run. */
struct aio_op *aio_lanes_take(struct aio_lanes *lanes);
/* One that was taken is over. */
void aio_lanes_end(struct aio_lanes *lanes, const struct aio_op *op);
/* Move what is unwanted, and not taken, to a list. */
void aio_lanes_sweep(struct aio_lanes *lanes, struct aio_op **swept);
/* How many operations have run since the last call, in lanes where none has ended. */
uint32_t aio_lanes_stuck(struct aio_lanes *lanes);
