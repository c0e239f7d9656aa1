/*
 * engine.c: engine threads: the loop, its sleep, and control's handle.
 *
 * A turn takes what there is: commands, finished I/O, new chains; submits once; then shows each driver what was
 * completed and notifies it once. After turns with nothing to do the thread spins for a while (poll_max_ns, adapting as
 * QEMU's iothreads do) and then sleeps in epoll. Everybody who can have work for it must wake it then; each such
 * promise is a store, a full fence and a load on both sides: [S1] for commands, [S2] for room in the ring up, [D] for
 * kicks.
 */
#include <errno.h>
#include <linux/virtio_blk.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/syscall.h>
#include <unistd.h>
#include "memory.h"
#include "queue.h"
#include "sigbus.h"
#include "signals.h"
#include "thread.h"

#define IO_DEPTH 256

/* A ring without kick fd is looked at so often while it is idle (ns): at first, and in the end. vhost-user,
 * VHOST_USER_SET_VRING_KICK: "polling will be used instead of waiting for the kick". */
#define INTERVAL_MIN 50000u
#define INTERVAL_MAX 1000000u

/* Where adaptive polling starts to grow. */
#define POLL_START 4000u

/* While other queues are busy, those that rest wait so long for somebody to see their kick (ns); one that had nothing to
 * do for longer than the other rests. */
#define LISTEN_INTERVAL 20000u
#define REST_AFTER 100000u

/* What struct vb_thread is aligned to. */
#define CACHE_LINE 64

#define EVENTS 64
#define EVENT_WAKE (1ull << 32) /* epoll data: a queue's slot, or one of these */
#define EVENT_IO (2ull << 32)

/* ---------------------------------------------------------------- messages */

static struct vb_message ack_of(const struct vb_message *command, int result, uint64_t aux)
{
	return (struct vb_message){
		.type = VB_ACK,
		.queue = command->queue,
		.cookie = command->cookie,
		.result = result,
		.aux = aux,
	};
}

void thread_ack(struct vb_thread *thread, const struct vb_message *command, int result, uint64_t aux)
{
	struct vb_message ack = ack_of(command, result, aux);

	thread_post(thread, &ack);
}

void thread_owe_ack(struct vb_thread *thread)
{
	thread->owed++;
}

void thread_ack_owed(struct vb_thread *thread, const struct vb_message *command, int result, uint64_t aux)
{
	thread->owed--;
	thread_ack(thread, command, result, aux);
}

/* ---------------------------------------------------------------- a turn */

static bool reap(struct vb_thread *thread)
{
	struct aio_op *op = aio_pending(thread->aio) ? aio_reap(thread->aio) : NULL;
	bool any = op;

	while (op) {
		struct aio_op *next = op->next;

		request_io_done(op);
		op = next;
	}
	return any;
}

void thread_check_faults(struct vb_thread *thread)
{
	thread->faults = sigbus_faults();
	for (uint32_t i = 0; i < thread->slots; i++)
		if (thread->queues[i])
			queue_check_memory(thread->queues[i]);
}

static void handle_event(struct vb_thread *thread, const struct epoll_event *event)
{
	eventfd_t ignored;
	uint64_t what = event->data.u64;

	if (what == EVENT_WAKE)
		eventfd_read(thread->down_fd, &ignored);
	else if (what != EVENT_IO && what < thread->slots && thread->queues[what])
		queue_kicked(thread->queues[what]);
}

/* Of queues that rest while others keep the thread busy. */
static void listen_for_kicks(struct vb_thread *thread)
{
	struct epoll_event events[EVENTS];
	int count = epoll_wait(thread->epoll_fd, events, EVENTS, 0);

	thread->listened_ns = thread->now;
	for (int i = 0; i < count; i++)
		handle_event(thread, &events[i]);
}

/* Whether it keeps its turn although there was nothing to do. The last one does: it is the thread that sleeps then. */
static bool lingers(const struct vb_thread *thread, const struct queue *queue)
{
	return thread->awake.next == thread->awake.prev || thread->now - queue->worked_ns < REST_AFTER;
}

bool thread_turn(struct vb_thread *thread)
{
	bool any;

	thread->now = now_ns();
	thread->shown = false;
	/* First: whoever wrote to the eventfds has said before what there is to do. */
	if (thread->resting && thread->now - thread->listened_ns > LISTEN_INTERVAL)
		listen_for_kicks(thread);
	any = thread_run_commands(thread);
	any |= reap(thread);
	if (load_acquire(&thread->flush_ended))
		flush_look(thread);
	list_for_each (node, following, &thread->awake) {
		struct queue *queue = container_of(node, struct queue, awake);

		if (queue_run(queue))
			any = true;
		else if (!lingers(thread, queue))
			queue_rest(queue);
	}
	any |= requests_ask_control(thread);
	aio_flush(thread->aio);
	if (thread->faults != sigbus_faults())
		thread_check_faults(thread);
	list_for_each (node, following, &thread->awake)
		queue_publish(container_of(node, struct queue, awake));
	message_ring_publish(&thread->up, thread->up_fd);
	return any;
}

/* ---------------------------------------------------------------- sleep */

/* Promise the drivers to wake up by a kick. False: one of them has added something before it knew. */
static bool ask_for_kicks(struct vb_thread *thread)
{
	list_for_each (node, following, &thread->awake)
		if (!queue_rest(container_of(node, struct queue, awake)))
			return false;
	return true;
}

/* The ring up is too full for commands or chains: have control wake us when it has taken something. Until then kicks
 * mean nothing. */
static bool starves(struct vb_thread *thread)
{
	if (thread_room(thread) > ROOM_RESERVE)
		return false;
	store_relaxed(&thread->starved, 1);
	full_fence(); /* [S2] */
	return thread_room(thread) <= ROOM_RESERVE;
}

static bool may_sleep(struct vb_thread *thread)
{
	if ((!starves(thread) && !ask_for_kicks(thread)) || aio_pending(thread->aio))
		return false;
	if (message_ring_fall_asleep(&thread->down))
		return true;
	/* There are commands. If there is no room to answer them, control has to make room first, and wakes us [S2]. */
	if (thread_room(thread) >= ROOM_PER_COMMAND)
		return false;
	store_relaxed(&thread->down.asleep, 1);
	return true;
}

static int wait_for_events(struct vb_thread *thread, struct epoll_event *events)
{
	uint64_t interval = thread->interval_ns;
	struct timespec timeout = {.tv_nsec = (long)interval};
	int count;

	if (!thread->pollers)
		return epoll_wait(thread->epoll_fd, events, EVENTS, -1);
	thread->interval_ns = MIN(interval * 2, INTERVAL_MAX);
	/* Linux 5.11, and container profiles that know it. */
	count = (int)syscall(SYS_epoll_pwait2, thread->epoll_fd, events, EVENTS, &timeout, NULL, 0);
	return count < 0 && errno != EINTR ? epoll_wait(thread->epoll_fd, events, EVENTS, 1) : count;
}

static void sleep_until_event(struct vb_thread *thread)
{
	struct epoll_event events[EVENTS];
	bool sleeps = may_sleep(thread);
	int count = sleeps ? wait_for_events(thread, events) : 0;

	message_ring_wake_up(&thread->down);
	store_relaxed(&thread->starved, 0);
	/* Not otherwise: what keeps it awake may last, and those who rest would not be heard. */
	if (sleeps)
		thread->listened_ns = now_ns();
	for (int i = 0; i < count; i++)
		handle_event(thread, &events[i]);
}

/* Spin longer if that would have caught it, less or not at all if it was far too long: as QEMU's iothreads, which
 * forget all that they have learnt after one long wait, unless they are told otherwise (poll-shrink). */
void thread_adapt_polling(const struct vb_thread *thread, uint64_t *poll_ns, uint64_t idle_ns)
{
	uint64_t most = thread->poll_max_ns;

	if (idle_ns > most)
		*poll_ns = thread->poll_shrink ? *poll_ns / thread->poll_shrink : 0;
	else if (idle_ns > *poll_ns && *poll_ns > most / thread->poll_grow)
		*poll_ns = most;
	else if (idle_ns > *poll_ns)
		*poll_ns = MIN(*poll_ns ? *poll_ns * thread->poll_grow : POLL_START, most);
}

/* What comes next, after a turn that had something to do. A driver that was shown completions fills its ring again within
 * microseconds, devices take their time: one must not spoil what was learnt from the other. */
enum awaited { AWAIT_DEVICE, AWAIT_DRIVER };

static void *thread_main(void *opaque)
{
	struct vb_thread *thread = opaque;
	enum awaited awaited = AWAIT_DRIVER;
	uint64_t idle_since = 0;

	/* By the thread itself: another's name is a file in /proc, which a sandbox does not allow to open. */
	pthread_setname_np(pthread_self(), thread->name);
	while (!load_acquire(&thread->stop)) {
		if (thread_turn(thread)) {
			if (idle_since)
				thread_adapt_polling(thread, &thread->poll_ns[awaited], thread->now - idle_since);
			awaited = thread->shown ? AWAIT_DRIVER : AWAIT_DEVICE;
			idle_since = 0;
			thread->interval_ns = INTERVAL_MIN;
			continue;
		}
		if (!idle_since)
			idle_since = thread->now;
		if (thread->now - idle_since < thread->poll_ns[awaited])
			cpu_relax();
		else
			sleep_until_event(thread);
	}
	return NULL;
}

/* ---------------------------------------------------------------- control's handle */

static int watch(struct vb_thread *thread, int fd, uint64_t what)
{
	struct epoll_event event = {.events = EPOLLIN, .data.u64 = what};

	return epoll_ctl(thread->epoll_fd, EPOLL_CTL_ADD, fd, &event) ? -errno : 0;
}

static int open_fds(struct vb_thread *thread)
{
	thread->down_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (thread->down_fd >= 0)
		thread->up_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (thread->up_fd >= 0)
		thread->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	return thread->epoll_fd < 0 ? -errno : watch(thread, thread->down_fd, EVENT_WAKE);
}

int thread_open(const struct vb_thread_options *options, struct vb_thread **ret)
{
	/* Most of it is message rings, whose pages an idle thread never touches: no memset. */
	void *memory = calloc(1, sizeof(struct vb_thread) + CACHE_LINE);
	struct vb_thread *thread = (void *)(((uintptr_t)memory + CACHE_LINE - 1) & ~(uintptr_t)(CACHE_LINE - 1));
	int error;

	if (!memory)
		return -ENOMEM;
	thread->memory = memory;
	thread->down_fd = thread->up_fd = thread->epoll_fd = -1;
	notifier_init(&thread->notifier);
	thread->up.asleep = 1; /* control waits for the eventfd from the beginning */
	thread->poll_max_ns = options->poll_max_ns;
	thread->poll_grow = options->poll_grow ? options->poll_grow : 2;
	thread->poll_shrink = options->poll_shrink;
	thread->interval_ns = INTERVAL_MIN;
	thread->faults = sigbus_faults();
	strncpy(thread->name, options->name ? options->name : "vhostblk", sizeof(thread->name) - 1);
	list_init(&thread->attachments);
	list_init(&thread->awake);
	list_init(&thread->failed);
	error = barriers_init(&thread->barriers, MESSAGE_RING_SIZE);
	if (!error)
		error = open_fds(thread);
	if (!error)
		error = aio_create(options->io_kind, IO_DEPTH, options->workers, &thread->aio);
	if (!error)
		error = watch(thread, aio_fd(thread->aio), EVENT_IO);
	if (error) {
		thread_close(thread);
		return error;
	}
	*ret = thread;
	return 0;
}

void thread_close(struct vb_thread *thread)
{
	int fds[] = {thread->down_fd, thread->up_fd, thread->epoll_fd};

	if (thread->aio)
		aio_destroy(thread->aio);
	notifier_deinit(&thread->notifier);
	for (size_t i = 0; i < sizeof(fds) / sizeof(fds[0]); i++)
		if (fds[i] >= 0)
			close(fds[i]);
	barriers_deinit(&thread->barriers);
	free(thread->queues);
	free(thread->memory);
}

int vb_thread_create(const struct vb_thread_options *options, struct vb_thread **ret)
{
	struct vb_thread *thread;
	sigset_t previous;
	int error = thread_open(options, &thread);

	if (error)
		return error;
	block_signals(&previous);
	error = pthread_create(&thread->pthread, NULL, thread_main, thread);
	pthread_sigmask(SIG_SETMASK, &previous, NULL);
	if (error) {
		thread_close(thread);
		return -error;
	}
	*ret = thread;
	return 0;
}

int vb_thread_destroy(struct vb_thread *thread)
{
	if (load_acquire(&thread->attached))
		return -EBUSY;
	store_release(&thread->stop, 1);
	eventfd_write(thread->down_fd, 1);
	pthread_join(thread->pthread, NULL);
	thread_close(thread);
	return 0;
}

int vb_thread_fd(const struct vb_thread *thread)
{
	return thread->up_fd;
}

int vb_thread_send(struct vb_thread *thread, const struct vb_message *messages, uint32_t count)
{
	uint32_t taken = MIN(count, message_ring_room(&thread->down));

	for (uint32_t i = 0; i < taken; i++)
		message_ring_put(&thread->down, &messages[i]);
	message_ring_publish(&thread->down, thread->down_fd);
	return (int)taken;
}

static void touch_data(struct vb_message *message)
{
	if (message->type == VB_REQUEST && message->aux == VIRTIO_BLK_T_OUT &&
		memory_touch(message->pointer, message->count, message->length))
		message->flags |= VB_REQUEST_FAULTED;
}

int vb_thread_receive(struct vb_thread *thread, struct vb_message *messages, uint32_t max, uint32_t *alike)
{
	uint32_t count = message_ring_take(&thread->up, messages, max);
	eventfd_t ignored;

	if (!count && max) {
		eventfd_read(thread->up_fd, &ignored);
		if (message_ring_fall_asleep(&thread->up))
			return 0;
		count = message_ring_take(&thread->up, messages, max);
		/* More may come without the eventfd: it must stay readable until we have said that there is nothing. */
		eventfd_write(thread->up_fd, 1);
	}
	full_fence(); /* [S2] */
	if (load_relaxed(&thread->starved))
		eventfd_write(thread->down_fd, 1);
	*alike = count > 0;
	for (uint32_t i = 0; i < count; i++) {
		touch_data(&messages[i]);
		*alike &= messages[i].type == VB_REQUEST && messages[i].disk == messages[0].disk;
	}
	return (int)count;
}

int vb_thread_io_kind(const struct vb_thread *thread)
{
	return (int)aio_kind(thread->aio);
}
