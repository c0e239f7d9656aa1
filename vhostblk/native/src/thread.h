/* An engine thread, from inside. */
#pragma once
#include <pthread.h>
#include "../engine.h"
#include "aio.h"
#include "common.h"
#include "disk.h"
#include "message_ring.h"
#include "notifier.h"

/* A thread serves no more queues than that. For each, room for two messages is put aside in the ring up (that it broke,
 * that it has stopped); the other half is what commands and requests have. (The number of a queue has 16 bits in the
 * cookie of a request.) */
#define THREAD_QUEUES (MESSAGE_RING_SIZE / 4)

/* Room a command may need in the ring up: its acknowledgement, or the request it retries, and a queue's breakage. */
#define ROOM_PER_COMMAND 2

struct queue;

struct vb_thread {
	struct message_ring down; /* control -> engine */
	struct message_ring up;   /* engine -> control */
	int down_fd;              /* eventfd: the engine sleeps and should not */
	int up_fd;                /* eventfd: control sleeps and should not */
	/* The engine sleeps because `up` is full. Pair [S2]: it sets this, then looks at up.tail once more; control
	 * stores up.tail, then looks at this. */
	uint32_t starved;
	uint32_t attached; /* disks; written by the engine, for vb_thread_destroy */
	uint32_t stop;
	uint32_t flush_ended; /* set by another engine thread, which then writes to down_fd: see flush.c */

	/* From here on the engine's only. */
	struct aio *aio;
	struct notifier notifier;
	int epoll_fd;
	struct list attachments;
	struct barriers barriers;
	struct queue **queues; /* by slot; holes are NULL */
	uint32_t slots;
	struct list awake;  /* queues whose rings are looked at every turn */
	struct list failed; /* requests that control is to decide about, when there is room in `up` */
	uint32_t resting;   /* queues that are not among them, because they wait for a kick */
	uint32_t pollers;   /* queues without a kick fd */
	uint32_t owed;      /* messages for which room in `up` is put aside */
	uint32_t faults;    /* sigbus_faults() when we last looked */
	uint64_t poll_max_ns;
	uint64_t poll_grow;   /* never 0 */
	uint64_t poll_shrink; /* 0: to nothing */
	uint64_t poll_ns[2];  /* how long to spin at the moment, by what is waited for: see enum awaited */
	bool shown;           /* in this turn a driver was shown completions */
	uint64_t interval_ns; /* how long a ring without kick fd may wait at the moment */
	uint64_t now;         /* when the clock was last read: at least once a turn */
	uint64_t listened_ns; /* when we last looked for kicks of resting queues */
	pthread_t pthread;
	void *memory; /* what was allocated for all of this */
	char name[16];
};

/* Everything but the pthread: a test or a fuzzer can take turns itself. */
int thread_open(const struct vb_thread_options *options, struct vb_thread **ret);
void thread_close(struct vb_thread *thread);
/* Do all there is to do, once, without sleeping. Whether there was anything. */
bool thread_turn(struct vb_thread *thread);
/* Learn from how long it took until there was work again, counted from when there was none. */
void thread_adapt_polling(const struct vb_thread *thread, uint64_t *poll_ns, uint64_t idle_ns);

/* Room in the ring up, beyond what is promised. */
static inline uint32_t thread_room(const struct vb_thread *thread)
{
	uint32_t room = message_ring_room(&thread->up);

	return room > thread->owed ? room - thread->owed : 0;
}

/* Put a message for control: the caller has looked at thread_room, or owes it. */
static inline void thread_post(struct vb_thread *thread, const struct vb_message *message)
{
	message_ring_put(&thread->up, message);
}

/* Answer a command at once. */
void thread_ack(struct vb_thread *thread, const struct vb_message *command, int result, uint64_t aux);
/* Answer it later: room is put aside until thread_ack_owed. */
void thread_owe_ack(struct vb_thread *thread);
void thread_ack_owed(struct vb_thread *thread, const struct vb_message *command, int result, uint64_t aux);

/* Look whether guest memory was truncated; breaks the queues that live in it. */
void thread_check_faults(struct vb_thread *thread);

/* Commands (commands.c). Whether there were any. */
bool thread_run_commands(struct vb_thread *thread);
