#include <errno.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <unistd.h>
#include "clock.h"
#include "worker.h"

#define DEFAULT_BATCH 16u
/* While the model lets nothing through: somebody else's completion will not wake us. */
#define STARVED_MS 1

static int queue_init(struct load_queue *queue, const struct vb_load_options *options, const struct vb_load_ring *ring,
	uint32_t index, uint32_t queues)
{
	uint32_t room = 1;
	int error;

	queue->index = index;
	queue->kick_fd = ring->kick_fd;
	queue->call_fd = ring->call_fd;
	queue->ring.is_packed = options->packed;
	if (options->packed)
		packed_init(&queue->ring.packed, ring->desc, ring->avail, ring->used, ring->size, options->event_idx);
	else if (!split_init(&queue->ring.split, ring->desc, ring->avail, ring->used, ring->size, options->event_idx))
		return -EBUSY;
	error = slots_init(&queue->slots, options, ring, &queue->ring);
	if (error)
		return error;
	while (room < options->depth)
		room *= 2;
	queue->idle = malloc(sizeof(*queue->idle) * room);
	if (!queue->idle)
		return -ENOMEM;
	queue->idle_mask = room - 1;
	for (uint32_t i = 0; i < options->depth; i++)
		queue->idle[queue->idle_tail++] = (uint16_t)i;
	pattern_init(&queue->pattern, options, index, queues);
	return 0;
}

static int watch(int epoll_fd, int fd, uint32_t events)
{
	struct epoll_event event = {.events = events, .data.fd = fd};

	return epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &event) < 0 ? -errno : 0;
}

int worker_create(
	struct vb_load *load, uint32_t index, const struct vb_load_ring *rings, uint32_t count, struct worker **ret)
{
	const struct vb_load_options *options = &load->options;
	struct worker *worker = calloc(1, sizeof(*worker));
	int error = 0;

	if (!worker)
		return -ENOMEM;
	worker->load = load;
	worker->index = index;
	worker->pauses = 1;
	worker->batch = options->batch ? options->batch : DEFAULT_BATCH;
	worker->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	worker->queues = calloc(count / options->threads + 1, sizeof(*worker->queues));
	worker->all_histograms = calloc(VB_LOAD_PHASES * VB_LOAD_OPS * VB_LOAD_BUCKETS, sizeof(uint64_t));
	if (!worker->queues || !worker->all_histograms)
		error = -ENOMEM;
	else if (worker->epoll_fd < 0)
		error = -errno;
	else
		error = watch(worker->epoll_fd, load->wake_fd, EPOLLIN);
	for (uint32_t i = index; i < count && !error; i += options->threads) {
		struct load_queue *queue = &worker->queues[worker->count++];

		error = queue_init(queue, options, &rings[i], i, count);
		/* Edge-triggered: every call is an event although nobody reads the counter, which so tells how many there
		 * were. */
		if (!error)
			error = watch(worker->epoll_fd, queue->call_fd, EPOLLIN | EPOLLET);
	}
	if (error) {
		worker_destroy(worker);
		return error;
	}
	*ret = worker;
	return 0;
}

void worker_destroy(struct worker *worker)
{
	for (uint32_t i = 0; i < worker->count; i++) {
		slots_deinit(&worker->queues[i].slots);
		free(worker->queues[i].idle);
	}
	if (worker->epoll_fd >= 0)
		close(worker->epoll_fd);
	free(worker->queues);
	free(worker->all_histograms);
	free(worker);
}

/* ---------------------------------------------------------------- phases */

static uint64_t take_calls(struct worker *worker)
{
	uint64_t calls = 0, counter;

	for (uint32_t i = 0; i < worker->count; i++)
		if (read(worker->queues[i].call_fd, &counter, sizeof(counter)) == sizeof(counter))
			calls += counter;
	return calls;
}

static uint64_t microseconds(const struct timeval *time)
{
	return (uint64_t)time->tv_sec * 1000000u + (uint64_t)time->tv_usec;
}

static void end_phase(struct worker *worker)
{
	struct rusage usage;

	getrusage(RUSAGE_THREAD, &usage);
	worker->stats->cpu_user_us = microseconds(&usage.ru_utime) - worker->user_us;
	worker->stats->cpu_system_us = microseconds(&usage.ru_stime) - worker->system_us;
	worker->stats->calls = take_calls(worker);
	store_release(&worker->stats->end, clock_ticks(worker->load->tsc));
}

static void begin_phase(struct worker *worker, uint32_t phase)
{
	struct rusage usage;

	getrusage(RUSAGE_THREAD, &usage);
	worker->user_us = microseconds(&usage.ru_utime);
	worker->system_us = microseconds(&usage.ru_stime);
	worker->phase = phase;
	worker->stats = &worker->all_stats[phase];
	worker->histograms = &worker->all_histograms[(uint64_t)phase * VB_LOAD_OPS * VB_LOAD_BUCKETS];
	store_release(&worker->stats->begin, clock_ticks(worker->load->tsc));
}

static bool is_finished(const struct worker *worker)
{
	bool more = worker->phase <= VB_LOAD_MEASURE;

	for (uint32_t i = 0; i < worker->count; i++)
		if (ring_in_flight(&worker->queues[i].ring) || (more && worker->queues[i].pattern.left))
			return false;
	return true;
}

/* ---------------------------------------------------------------- waiting */

static int patience_ms(struct worker *worker)
{
	uint64_t now;

	if (!worker->starved)
		return -1;
	worker->starved = false;
	if (!worker->interval)
		return STARVED_MS;
	now = clock_ticks(worker->load->tsc);
	/* A late wake-up is made good by the requests that are due then. */
	return now >= worker->due ? 0 : STARVED_MS;
}

static void sleep_for_calls(struct worker *worker)
{
	struct epoll_event events[16];
	bool ready = false;

	for (uint32_t i = 0; i < worker->count; i++)
		ring_enable_calls(&worker->queues[i].ring);
	/* The device writes used.idx and then looks at our event; we do it the other way round (VIRTIO 1.2 §2.7.7). */
	full_fence();
	for (uint32_t i = 0; i < worker->count; i++)
		ready |= ring_ready(&worker->queues[i].ring) != 0;
	if (!ready) {
		worker->stats->sleeps++;
		epoll_wait(worker->epoll_fd, events, 16, patience_ms(worker));
	}
	/* With EVENT_IDX a call for what is past does not come again. */
	for (uint32_t i = 0; i < worker->count; i++)
		ring_stop_calls(&worker->queues[i].ring);
}

void *worker_main(void *argument)
{
	struct worker *worker = argument;
	struct vb_load *load = worker->load;
	static const uint64_t one = 1;

	take_calls(worker);
	begin_phase(worker, load_relaxed(&load->phase));
	worker->due = clock_ticks(load->tsc);
	for (;;) {
		uint32_t phase = load_relaxed(&load->phase);
		bool busy = false;

		if (phase != worker->phase) {
			end_phase(worker);
			begin_phase(worker, phase);
		}
		if (phase == VB_LOAD_ABANDON)
			break;
		for (uint32_t i = 0; i < worker->count; i++)
			busy |= queue_turn(worker, &worker->queues[i]);
		if (busy)
			continue;
		if (load_relaxed(&load->failed) || is_finished(worker))
			break;
		if (load->options.sleep)
			sleep_for_calls(worker);
		else
			for (uint32_t i = 0; i < worker->pauses; i++)
				cpu_relax();
	}
	end_phase(worker);
	__atomic_fetch_sub(&load->running, 1, __ATOMIC_RELEASE);
	if (write(load->done_fd, &one, sizeof(one)) < 0)
		abort(); /* an eventfd of ours that was written a handful of times */
	return NULL;
}
