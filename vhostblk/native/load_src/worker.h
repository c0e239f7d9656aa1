/* A thread and its queues. */
#pragma once
#include <pthread.h>
#include "model.h"
#include "pattern.h"
#include "slot.h"

struct load_queue {
	struct ring ring;
	struct slots slots;
	struct pattern pattern;
	uint16_t *idle; /* slots that wait, first in first out: a ring of idle_mask + 1 */
	uint32_t idle_mask;
	uint32_t idle_head;
	uint32_t idle_tail;
	uint32_t index;
	int kick_fd;
	int call_fd;
};

struct worker {
	struct vb_load *load;
	struct vb_load_stats *stats; /* of the phase */
	uint64_t *histograms;        /* of the phase: VB_LOAD_OPS of VB_LOAD_BUCKETS */
	struct load_queue *queues;
	uint32_t count;
	uint32_t phase;
	uint32_t index;
	uint32_t batch;
	uint32_t pauses;    /* between two looks that find nothing */
	bool starved;       /* the model let nothing through though there is room, or the rate did not */
	uint64_t due;       /* when the rate allows the next request, ticks; */
	uint64_t interval;  /* ticks between two requests; 0: no limit */
	uint64_t in_flight; /* for others to read */
	int epoll_fd;
	pthread_t thread;
	bool is_started;
	uint64_t user_us, system_us; /* CPU time when the phase began */
	struct vb_load_stats all_stats[VB_LOAD_PHASES];
	uint64_t *all_histograms;
};

struct vb_load {
	struct vb_load_options options;
	struct worker **workers;
	uint32_t phase;
	uint32_t running;
	uint32_t failed; /* somebody owns `error` */
	int wake_fd;     /* readable from DRAIN on, for those who sleep */
	int done_fd;
	bool tsc;
	struct vb_load_error error;
};

int worker_create(
	struct vb_load *load, uint32_t index, const struct vb_load_ring *rings, uint32_t count, struct worker **ret);
void worker_destroy(struct worker *worker);
void *worker_main(void *worker);

/* Take what a queue has finished and start what it may. True: there was something to do. False also after a failure. */
bool queue_turn(struct worker *worker, struct load_queue *queue);

/* The run is over because of this. The first caller's is kept. */
void load_fail(struct vb_load *load, const struct vb_load_error *error);
