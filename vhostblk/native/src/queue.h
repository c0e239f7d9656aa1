/*
 * A queue of a disk on a thread: pops chains, serves requests from the extent map or hands them to control, completes
 * them, notifies the driver.
 */
#pragma once
#include "../engine.h"
#include "ages.h"
#include "aio.h"
#include "blk.h"
#include "common.h"
#include "disk.h"
#include "stats.h"
#include "thread.h"
#include "virtqueue.h"

/* Pieces that a request has room for without allocating: Linux sends at most 128 + header and status. */
#define REQUEST_PIECES 130

/* Requests of one queue at a time; a longer ring waits. Devices are busy with far fewer, and what a driver can make us
 * hold, here and in control, is bounded by this and the number of queues. */
#define QUEUE_REQUESTS 1024

/* What a queue may do in one turn of its thread before others get theirs: chains, and work, which is counted in
 * descriptors looked at and in pages copied on the spot. The rest has to wait for the next turn. */
#define QUEUE_BATCH 64
#define QUEUE_WORK 1024

/* Copying that many bytes is not noticed by those who share the thread; more is given to the pool. */
#define INLINE_MAX (1u << 20)

/* Chains completed before the driver is shown them: it fills the ring again while we go on. */
#define PUBLISH_BATCH 8

/* Messages that stay free in the ring up while chains are popped, for acknowledgements. */
#define ROOM_RESERVE 256

enum request_state {
	REQUEST_FREE,
	REQUEST_ENGINE, /* being looked at, or in I/O */
	REQUEST_LINE,   /* waits for an fdatasync that another one does */
	REQUEST_FAILED, /* in thread->failed */
	REQUEST_CONTROL /* VB_REQUEST was sent: VB_COMPLETE or VB_RETRY comes */
};

struct request {
	struct queue *queue;
	struct request *next_free;
	uint32_t generation; /* so that a stale cookie finds nothing */
	uint16_t index;      /* in queue->requests */
	uint16_t head;       /* of its chain */
	uint16_t slots;      /* the same */
	uint16_t entry;      /* the same */
	uint8_t state;       /* enum request_state */
	bool missed;
	bool flush_after; /* a write that is durable by an fdatasync behind it */
	uint8_t half;     /* of queue->ages */
	struct memory_use *memory;
	uint64_t started_ns;
	struct blk_request blk;
	struct aio_op op;         /* while an I/O is in flight */
	struct io_track track;    /* the same */
	struct extent_file *file; /* whose number the I/O uses, or NULL */
	struct list in_line;      /* while it waits for an fdatasync (flush.c), or in thread->failed */
	uint64_t ticket;
	void *spilled; /* what did not fit below, or NULL */
	uint32_t spilled_pieces;
	union {
		struct iovec iov[REQUEST_PIECES];
		struct vb_segment segments[REQUEST_PIECES * 2 / 3];
	} room;
};

struct queue {
	struct virtqueue vq;
	struct vb_thread *thread;
	struct attachment *attachment;
	struct vb_queue_config config;
	struct vb_queue_stats *stats;
	struct stats_batch batch; /* completed since the clock was last read */
	struct list awake; /* in thread->awake, or on its own while it rests: its ring is not looked at before a kick */
	uint64_t worked_ns; /* when there last was something in its ring */
	uint32_t key;       /* control's number */
	uint16_t slot;      /* in thread->queues */
	bool enabled;
	bool stopping;
	bool suspending; /* that, and what is in flight may stay so */
	bool logged;     /* what is written to its ring is marked, if there is a log */
	bool broken;
	bool dead;              /* broken so that not even the used ring may be touched */
	bool kicks_off;         /* the driver was told not to kick */
	bool kicked;            /* and the eventfd still says so */
	bool call_may_wait;     /* a write to the call fd: see notifier.h */
	struct vb_message stop; /* the VB_QUEUE_STOP, when stopping */
	uint32_t work;          /* in this turn */
	uint32_t in_flight;     /* requests that are not free */
	struct ages ages;       /* of those */
	uint64_t spilled;       /* pieces of all requests that are allocated */
	struct chain *chain;    /* scratch */
	struct request *free;
	uint32_t fresh; /* requests beyond were never used: their memory was never touched */
	struct request *requests;
};

/* Called for a VB_QUEUE_START, QUEUE_STOP, QUEUE_FD. 0 or -errno. */
int queue_start(struct attachment *attachment, uint32_t key, const struct vb_queue_config *config);
void queue_stop(struct queue *queue, const struct vb_message *command);
int queue_set_fd(struct queue *queue, enum vb_queue_fd which, int fd);
/* The disk has another memory map. */
void queue_move(struct queue *queue);
/* The disk has another log of guest memory, or the queue has another place in it. */
void queue_set_log(struct queue *queue);
/* Some guarded memory was truncated, maybe ours. */
void queue_check_memory(struct queue *queue);

/* Pop and serve. Whether there was anything. */
bool queue_run(struct queue *queue);
/* Show the driver what was completed, notify it if it wants that, finish a stop: the queue may be gone afterwards. */
void queue_publish(struct queue *queue);
/* Look at its ring from now on: it may have something, or something is to be shown to its driver. */
void queue_wake(struct queue *queue);
/* Wait for a kick instead. False: there is something to do, maybe because the driver added it before it knew. */
bool queue_rest(struct queue *queue);
/* The kick fd became readable. */
void queue_kicked(struct queue *queue);

void queue_break(struct queue *queue, enum vb_broken reason);

/* suspend.c: it stops, and what has not begun stays in flight; what has ends as it does otherwise. */
void queue_suspend(struct queue *queue);
/* Let go of it, without an answer. */
void request_suspend(struct request *request);

/* request.c: take what was popped into queue->chain as a request, and serve it. */
void request_accept(struct queue *queue);

/* What control calls a request: generation, slot of the queue, index. */
static inline uint64_t request_cookie(const struct request *request)
{
	return (uint64_t)request->generation << 32 | (uint32_t)request->queue->slot << 16 | request->index;
}

/* By the cookie of a VB_REQUEST that control has, or NULL. */
struct request *request_find(struct vb_thread *thread, uint64_t cookie);
void request_complete(struct request *request, int status, uint64_t written);
/* It is the queue's again, answered or not. */
void request_release(struct request *request);
/* What was written to guest memory for it, in the log. */
void request_mark_written(struct request *request);

/* serve.c: answer it, begin its I/O, or hand it to control. */
void request_serve(struct request *request);
/* Its I/O has ended. */
void request_io_done(struct aio_op *op);
/* Hand over what has failed and is control's to decide about, as far as there is room. Whether there was any. */
bool requests_ask_control(struct vb_thread *thread);
/* Nothing of the engine's touches its range any more. */
void request_untrack(struct request *request);
/* All that the file had when the request joined the line of flushes is durable; or -errno. */
void request_flushed(struct request *request, int error);
