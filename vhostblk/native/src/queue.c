/*
 * queue.c: a virtqueue at work: its fds, its turns, its end.
 *
 * Theory of operation: a queue pops while it is enabled, and not stopping, and not broken. Broken is for what the
 * driver or the front-end did: nothing is popped any more, what was popped is still completed. Where the rings or the
 * memory are gone it is dead: completions are dropped too. Either way control sends a stop, and a stop ends when the
 * last request has come back, from the kernel or from control.
 */
#include <errno.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>
#include "queue.h"
#include "sigbus.h"
#include "stats.h"

/* Pieces of unusually long requests that may be allocated per queue (16 bytes each): what a hostile driver can make us
 * allocate is bounded by this. */
#define SPILLED_MAX (1u << 16)

/* ---------------------------------------------------------------- notifications */

static void signal_driver(struct queue *queue)
{
	notifier_signal(&queue->thread->notifier, queue->config.call_fd, queue->call_may_wait);
}

/*
 * Kick fds are watched edge-triggered, so one that we cannot clear does not keep us awake. Clearing is for the others
 * who look at it: QEMU does when a ring stops. It waits until the queue rests, when the driver has its answer. It must
 * never block, whatever the fd is, hence RWF_NOWAIT; a kernel that cannot do that for eventfds (before 5.8) leaves the
 * counter standing. A kick fd has one queue: were another thread to wait for the same eventfd, it might find it cleared
 * and sleep on.
 */
static void clear_kicks(struct queue *queue)
{
	uint64_t counter;
	struct iovec iov = {&counter, sizeof(counter)};
	ssize_t ignored;

	if (!queue->kicked)
		return;
	queue->kicked = false;
	ignored = preadv2(queue->config.kick_fd, &iov, 1, -1, RWF_NOWAIT);
	(void)ignored;
}

void queue_kicked(struct queue *queue)
{
	queue->kicked = true;
	stat_add(queue->stats->kicks, 1);
	queue_wake(queue);
}

static int watch_kick(struct queue *queue, int fd)
{
	struct epoll_event event = {.events = EPOLLIN | EPOLLET, .data.u64 = queue->slot};

	if (fd >= 0 && epoll_ctl(queue->thread->epoll_fd, EPOLL_CTL_ADD, fd, &event))
		return -errno;
	queue->thread->pollers += fd < 0;
	queue->config.kick_fd = fd;
	return 0;
}

static void unwatch_kick(struct queue *queue)
{
	int fd = queue->config.kick_fd;

	clear_kicks(queue);
	if (fd >= 0)
		epoll_ctl(queue->thread->epoll_fd, EPOLL_CTL_DEL, fd, NULL);
	queue->thread->pollers -= fd < 0;
}

int queue_set_fd(struct queue *queue, enum vb_queue_fd which, int fd)
{
	int old = queue->config.kick_fd;
	int error;

	switch (which) {
	case VB_QUEUE_KICK:
		unwatch_kick(queue);
		error = watch_kick(queue, fd);
		if (error)
			watch_kick(queue, old);
		return error;
	case VB_QUEUE_CALL:
		queue->config.call_fd = fd;
		queue->call_may_wait = notifier_may_wait(fd);
		/* What was signalled through the old one may have been missed. Spurious calls are legal (§2.7.7.1). */
		if (fd >= 0)
			signal_driver(queue);
		return 0;
	case VB_QUEUE_ERR:
		queue->config.err_fd = fd;
		return 0;
	default:
		return -EINVAL;
	}
}

static void disable_kicks(struct queue *queue)
{
	if (queue->kicks_off || queue->dead)
		return;
	virtqueue_disable_kicks(&queue->vq);
	queue->kicks_off = true;
}

static void enable_kicks(struct queue *queue)
{
	if (!queue->kicks_off || queue->dead)
		return;
	virtqueue_enable_kicks(&queue->vq);
	queue->kicks_off = false;
}

void queue_wake(struct queue *queue)
{
	struct vb_thread *thread = queue->thread;

	if (!list_empty(&queue->awake))
		return;
	list_append(&thread->awake, &queue->awake);
	thread->resting--;
	disable_kicks(queue);
	queue->worked_ns = thread->now;
}

/* ---------------------------------------------------------------- start, stop, break */

static size_t request_count(const struct queue *queue)
{
	return MIN(queue->config.size, (uint32_t)QUEUE_REQUESTS);
}

static void queue_free(struct queue *queue)
{
	if (queue->requests)
		munmap(queue->requests, request_count(queue) * sizeof(*queue->requests));
	virtqueue_deinit(&queue->vq);
	free(queue->chain);
	free(queue);
}

/* A hole among the queues of the thread, or a new slot. */
static int take_slot(struct vb_thread *thread)
{
	struct queue **queues;
	uint32_t slot = 0;

	while (slot < thread->slots && thread->queues[slot])
		slot++;
	if (slot < thread->slots)
		return (int)slot;
	if (slot == THREAD_QUEUES)
		return -ENOSPC;
	queues = realloc(thread->queues, (slot + 1) * sizeof(struct queue *));
	if (!queues)
		return -ENOMEM;
	queues[slot] = NULL;
	thread->queues = queues;
	thread->slots++;
	return (int)slot;
}

/* The pool of requests: address space only, until a request is used for the first time. */
static int allocate(struct queue *queue)
{
	void *requests = mmap(NULL, request_count(queue) * sizeof(*queue->requests), PROT_READ | PROT_WRITE,
		MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	if (requests == MAP_FAILED)
		return -ENOMEM;
	queue->requests = requests;
	queue->chain = virtqueue_new_chain(&queue->vq);
	return queue->chain ? 0 : -ENOMEM;
}

static int prepare(struct queue *queue, const struct vb_queue_config *config)
{
	int slot = take_slot(queue->thread);
	int error;

	if (!queue->attachment->memory)
		return -EFAULT;
	if (slot < 0)
		return slot;
	error = virtqueue_init(&queue->vq, queue->attachment->memory->memory, config);
	if (error)
		return error;
	queue->slot = (uint16_t)slot;
	error = allocate(queue);
	return error ? error : watch_kick(queue, config->kick_fd);
}

int queue_start(struct attachment *attachment, uint32_t key, const struct vb_queue_config *config)
{
	struct queue *queue = calloc(1, sizeof(*queue));
	int error;

	if (!queue)
		return -ENOMEM;
	queue->thread = attachment->thread;
	queue->attachment = attachment;
	queue->config = *config;
	queue->stats = config->stats;
	queue->key = key;
	queue->enabled = config->enabled;
	queue->logged = config->logged;
	queue->call_may_wait = notifier_may_wait(config->call_fd);
	queue->kicks_off = true; /* as far as we know */
	error = prepare(queue, config);
	if (error) {
		queue_free(queue);
		return error;
	}
	/* Who had the ring before may not have told the driver of all that it completed; QEMU's tests wait for this. */
	if (config->call_fd >= 0)
		signal_driver(queue);
	queue->thread->queues[queue->slot] = queue;
	queue_set_log(queue);
	list_init(&queue->awake);
	queue->thread->resting++;
	queue_wake(queue);
	queue->thread->owed++; /* VB_QUEUE_BROKEN must always find room */
	attachment->queues++;
	return 0;
}

void queue_stop(struct queue *queue, const struct vb_message *command)
{
	queue->stopping = true;
	queue->stop = *command;
	queue_wake(queue);
	thread_owe_ack(queue->thread);
	if (command->flags & 1 && virtqueue_tracks(&queue->vq))
		queue_suspend(queue);
}

/* What is not in the log will not be in the front-end's copy of the guest: no more. */
static void check_log(struct queue *queue)
{
	if (queue->attachment->log && vb_memory_log_lost(queue->attachment->log))
		queue_break(queue, VB_BROKEN_LOG);
}

static void finish_stop(struct queue *queue)
{
	struct vb_thread *thread = queue->thread;

	/* Leave the ring as whoever starts it next may expect it: asking for kicks. */
	enable_kicks(queue);
	check_log(queue);
	unwatch_kick(queue);
	list_remove(&queue->awake);
	thread->queues[queue->slot] = NULL;
	queue->attachment->queues--;
	thread->owed -= !queue->broken;
	thread_ack_owed(thread, &queue->stop, 0, virtqueue_base(&queue->vq));
	queue_free(queue);
}

static bool has_faulted(const struct queue *queue)
{
	struct memory_use *use = queue->attachment->memory;

	return (use && vb_memory_faulted(use->memory)) || inflight_faulted(&queue->vq.inflight);
}

void queue_break(struct queue *queue, enum vb_broken reason)
{
	struct vb_message message = {.type = VB_QUEUE_BROKEN, .queue = queue->key};

	/* Zeroes where the memory was make no sense, but whatever they look like, this is the reason. */
	if (has_faulted(queue))
		reason = VB_BROKEN_MEMORY_FAULT;
	if (reason == VB_BROKEN_MEMORY_FAULT || reason == VB_BROKEN_RING_ADDRESS)
		queue->dead = true;
	if (queue->broken)
		return;
	queue->broken = true;
	message.cookie = queue->config.index;
	message.disk = queue->attachment->disk->config.id;
	message.result = reason;
	queue->thread->owed--;
	thread_post(queue->thread, &message);
	/* vhost-user, VHOST_USER_SET_VRING_ERR. */
	if (queue->config.err_fd >= 0)
		notifier_signal(
			&queue->thread->notifier, queue->config.err_fd, notifier_may_wait(queue->config.err_fd));
}

void queue_move(struct queue *queue)
{
	struct memory_use *use = queue->attachment->memory;

	if (!use || virtqueue_move(&queue->vq, use->memory, &queue->config))
		queue_break(queue, VB_BROKEN_RING_ADDRESS);
	queue->kicks_off = true; /* as far as we know: it was the old memory that asked for them */
	queue_wake(queue);
}

void queue_set_log(struct queue *queue)
{
	bool was_logged = queue->vq.log.log;

	queue->vq.log.log = queue->logged ? queue->attachment->log : NULL;
	queue->vq.log.gpa = queue->config.log_gpa;
	/* Whoever had the ring before may have been killed between a store and its mark, and the start may have repaired
	 * it: QEMU gives the log when rings are started already. */
	if (!was_logged && queue->vq.log.log && virtqueue_tracks(&queue->vq))
		virtqueue_mark_ring(&queue->vq);
}

void queue_check_memory(struct queue *queue)
{
	if (has_faulted(queue))
		queue_break(queue, VB_BROKEN_MEMORY_FAULT);
}

/* ---------------------------------------------------------------- a turn */

/* What was left in flight is owed, unless it may stay so. */
static bool owes_replays(const struct queue *queue)
{
	return virtqueue_replays(&queue->vq) && !queue->suspending;
}

/* Whether it takes chains at all: its own completions, or commands, change that, and wake it. */
static bool takes_chains(const struct queue *queue)
{
	/* A stop does not end before these are done. */
	bool wanted = queue->stopping ? owes_replays(queue) : queue->enabled;

	return wanted && !queue->broken && queue->in_flight < QUEUE_REQUESTS && queue->spilled < SPILLED_MAX;
}

static bool may_pop(const struct queue *queue)
{
	return takes_chains(queue) && thread_room(queue->thread) > ROOM_RESERVE;
}

static bool is_drained(const struct queue *queue)
{
	return queue->stopping && !queue->in_flight && (queue->broken || !owes_replays(queue));
}

static bool has_news(const struct queue *queue)
{
	return (virtqueue_has_news(&queue->vq) && !queue->dead) || is_drained(queue);
}

bool queue_rest(struct queue *queue)
{
	bool listens = queue->config.kick_fd >= 0;

	/* Without a kick fd the driver's chains are only found by looking, and nothing is promised: what would be asked
	 * for now would be wrong by the time that there is an fd. */
	if (listens) {
		/* Whoever kicked before this is looked for below; whoever kicks later wakes us. */
		clear_kicks(queue);
		enable_kicks(queue);
	}
	if (has_news(queue) || (takes_chains(queue) && virtqueue_pending(&queue->vq))) {
		disable_kicks(queue);
		return false;
	}
	if (listens) {
		list_remove(&queue->awake);
		list_init(&queue->awake);
		queue->thread->resting++;
	}
	return true;
}

/* Show the driver what was completed; whether it is notified, too, is decided at the end of the turn. */
static void show_completions(struct queue *queue)
{
	uint64_t before = queue->thread->now;

	if (!queue->dead)
		virtqueue_publish(&queue->vq);
	queue->attachment->marked = true;
	queue->thread->shown = true;
	queue->thread->now = now_ns();
	stats_batch_finish(&queue->batch, queue->stats, queue->thread->now - before);
}

bool queue_run(struct queue *queue)
{
	int popped = 0;

	while (popped < QUEUE_BATCH && queue->work < QUEUE_WORK && may_pop(queue)) {
		int result = virtqueue_pop(&queue->vq, queue->attachment->memory->memory, queue->chain);

		if (!result)
			break;
		popped++;
		queue->work += queue->chain->descriptors;
		if (result < 0)
			queue_break(queue, (enum vb_broken) - result);
		else
			request_accept(queue);
		if (popped % PUBLISH_BATCH == 0 && queue->batch.ops)
			show_completions(queue);
	}
	if (queue->batch.ops)
		show_completions(queue);
	if (popped)
		queue->worked_ns = queue->thread->now;
	return popped;
}

static void notify_driver(struct queue *queue)
{
	virtqueue_publish(&queue->vq);
	queue->attachment->marked = true;
	queue->thread->shown = true;
	store_relaxed(&queue->stats->last_ns, queue->thread->now);
	if (!virtqueue_should_notify(&queue->vq)) {
		stat_add(queue->stats->calls_suppressed, 1);
	} else if (queue->config.call_fd >= 0) {
		signal_driver(queue);
		stat_add(queue->stats->calls, 1);
	}
}

/* vhost-user, VHOST_USER_SET_LOG_FD. */
static void tell_of_marks(struct queue *queue)
{
	struct attachment *a = queue->attachment;

	if (a->marked && a->log_fd >= 0)
		notifier_signal(&queue->thread->notifier, a->log_fd, notifier_may_wait(a->log_fd));
	a->marked = false;
	check_log(queue);
}

void queue_publish(struct queue *queue)
{
	queue->work = 0;
	if (virtqueue_has_news(&queue->vq) && !queue->dead)
		notify_driver(queue);
	if (queue->attachment->log)
		tell_of_marks(queue);
	store_relaxed(&queue->stats->in_flight, queue->in_flight);
	store_relaxed(&queue->stats->oldest_ns, ages_oldest(&queue->ages));
	if (is_drained(queue))
		finish_stop(queue);
}
