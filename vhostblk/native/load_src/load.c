#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <unistd.h>
#include "clock.h"
#include "histogram.h"
#include "worker.h"

static bool is_valid(const struct vb_load_options *options, const struct vb_load_ring *rings, uint32_t count)
{
	uint64_t weights = 0;

	for (int i = 0; i < VB_LOAD_OPS; i++)
		weights += options->weights[i];
	for (uint32_t i = 0; i < count; i++)
		if (!rings[i].size || rings[i].size & (rings[i].size - 1) || rings[i].size > 32768 ||
			vb_load_ring_entries(options) > rings[i].size)
			return false;
	return count && options->threads && options->threads <= count && options->depth && options->depth <= 32768 &&
	       weights && weights <= UINT32_MAX && options->segments && options->segments <= 1024 &&
	       options->block_min >= 512 && options->block_min % 512 == 0 && options->block_max >= options->block_min &&
	       options->block_max % options->block_min == 0 && options->size >= options->block_max &&
	       options->size % options->block_min == 0 && options->offset % 512 == 0 &&
	       options->size / options->block_min <= UINT32_MAX &&
	       (!options->skip_unknown || (options->model && options->once));
}

static int start(struct vb_load *load)
{
	sigset_t all, old;
	int error = 0;

	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &old);
	for (uint32_t i = 0; i < load->options.threads && !error; i++) {
		struct worker *worker = load->workers[i];

		__atomic_fetch_add(&load->running, 1, __ATOMIC_RELAXED);
		error = -pthread_create(&worker->thread, NULL, worker_main, worker);
		worker->is_started = !error;
		if (error)
			__atomic_fetch_sub(&load->running, 1, __ATOMIC_RELAXED);
	}
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	return error;
}

int vb_load_create(
	const struct vb_load_options *options, const struct vb_load_ring *rings, uint32_t count, struct vb_load **ret)
{
	struct vb_load *load;
	int error = 0;

	if (!is_valid(options, rings, count))
		return -EINVAL;
	load = calloc(1, sizeof(*load));
	if (!load)
		return -ENOMEM;
	load->options = *options;
	load->tsc = clock_has_tsc();
	load->phase = options->no_ramp ? VB_LOAD_MEASURE : VB_LOAD_RAMP;
	load->workers = calloc(options->threads, sizeof(struct worker *));
	load->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	load->done_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (!load->workers || load->wake_fd < 0 || load->done_fd < 0)
		error = -ENOMEM;
	for (uint32_t i = 0; i < options->threads && !error; i++)
		error = worker_create(load, i, rings, count, &load->workers[i]);
	for (uint32_t i = 0; i < options->threads && !error && options->rate; i++)
		load->workers[i]->interval = (uint64_t)(vb_load_calibrate() * options->threads / (double)options->rate);
	if (!error)
		error = start(load);
	if (error) {
		vb_load_set_phase(load, VB_LOAD_ABANDON);
		vb_load_destroy(load);
		return error;
	}
	*ret = load;
	return 0;
}

void vb_load_destroy(struct vb_load *load)
{
	for (uint32_t i = 0; load->workers && i < load->options.threads; i++) {
		struct worker *worker = load->workers[i];

		if (worker && worker->is_started)
			pthread_join(worker->thread, NULL);
		if (worker)
			worker_destroy(worker);
	}
	if (load->wake_fd >= 0)
		close(load->wake_fd);
	if (load->done_fd >= 0)
		close(load->done_fd);
	free(load->workers);
	free(load);
}

/* Also from the generator's threads. */
void vb_load_set_phase(struct vb_load *load, uint32_t phase)
{
	static const uint64_t one = 1;
	uint32_t now = load_relaxed(&load->phase);

	while (now < phase &&
		!__atomic_compare_exchange_n(&load->phase, &now, phase, false, __ATOMIC_RELEASE, __ATOMIC_RELAXED))
		;
	/* Never read: whoever sleeps from now on wakes at once. */
	if (phase >= VB_LOAD_DRAIN && load->wake_fd >= 0 && write(load->wake_fd, &one, sizeof(one)) < 0)
		return;
}

void load_fail(struct vb_load *load, const struct vb_load_error *error)
{
	uint32_t nobody = 0;

	if (__atomic_compare_exchange_n(&load->failed, &nobody, 1, false, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED))
		load->error = *error;
	vb_load_set_phase(load, VB_LOAD_ABANDON);
}

uint32_t vb_load_phase(const struct vb_load *load)
{
	return load_relaxed(&load->phase);
}

uint32_t vb_load_running(const struct vb_load *load)
{
	return load_acquire(&load->running);
}

int vb_load_fd(const struct vb_load *load)
{
	return load->done_fd;
}

uint64_t vb_load_in_flight(const struct vb_load *load)
{
	uint64_t sum = 0;

	for (uint32_t i = 0; i < load->options.threads; i++)
		sum += load_relaxed(&load->workers[i]->in_flight);
	return sum;
}

const struct vb_load_stats *vb_load_stats(const struct vb_load *load, uint32_t thread, uint32_t phase)
{
	if (thread >= load->options.threads || phase >= VB_LOAD_PHASES)
		return NULL;
	return &load->workers[thread]->all_stats[phase];
}

const uint64_t *vb_load_histogram(const struct vb_load *load, uint32_t thread, uint32_t phase, uint32_t op)
{
	if (thread >= load->options.threads || phase >= VB_LOAD_PHASES || op >= VB_LOAD_OPS)
		return NULL;
	return &load->workers[thread]->all_histograms[(phase * VB_LOAD_OPS + op) * VB_LOAD_BUCKETS];
}

const struct vb_load_error *vb_load_error(const struct vb_load *load)
{
	return &load->error;
}

/* ---------------------------------------------------------------- clock and buckets */

uint64_t vb_load_ticks(void)
{
	return clock_ticks(clock_has_tsc());
}

int vb_load_clock_is_tsc(void)
{
	return clock_has_tsc();
}

double vb_load_calibrate(void)
{
	const struct timespec delay = {.tv_nsec = 20000000};
	uint64_t ns, ticks;

	if (!clock_has_tsc())
		return 1e9;
	ns = now_ns();
	ticks = clock_ticks(true);
	nanosleep(&delay, NULL);
	ns = now_ns() - ns;
	ticks = clock_ticks(true) - ticks;
	return (double)ticks * 1e9 / (double)ns;
}

double vb_load_clock_cost(void)
{
	const int looks = 100;
	bool tsc = clock_has_tsc();
	double least = 1e9;

	for (int run = 0; run < 100; run++) {
		uint64_t begin = clock_ticks(tsc), end = begin;

		for (int i = 0; i < looks; i++)
			end = clock_ticks(tsc);
		least = MIN(least, (double)(end - begin) / looks);
	}
	return least;
}

uint32_t vb_load_bucket(uint64_t ticks)
{
	return histogram_bucket(ticks);
}

uint64_t vb_load_bucket_bound(uint32_t bucket)
{
	return histogram_bound(bucket);
}
