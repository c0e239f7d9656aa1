/*
 * aio_pool.c: a pool of threads that do blocking I/O. Started when there is more to do than there are idle threads.
 *
 * What the owner starts is handed over by the next flush, all at once: one lock, and no more wake-ups than there is work
 * that waits for devices. One thread is woken for all copies into the page cache (AIO_BRIEF), which seldom wait. When one
 * does, because too much is dirty, those behind it would wait with it: so while there are some, the owner looks every
 * millisecond whether they get on, and wakes another thread if not.
 */
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/timerfd.h>
#include <unistd.h>
#include "aio.h"
#include "signals.h"

#define DEFAULT_WORKERS 16

/* How often is looked whether copies get on. */
#define LOOK_NS 1000000

struct aio_pool {
	pthread_mutex_t lock; /* of everything down to `done` */
	pthread_cond_t work;
	struct aio_op *queue;
	struct aio_op **queue_end;
	uint32_t queued;
	uint32_t brief; /* of those queued, AIO_BRIEF */
	uint32_t idle;
	uint64_t taken; /* operations, ever */
	bool stopping;
	struct aio_op *done; /* also looked at without the lock, for being non-empty */

	int event_fd; /* readable while `done` is not empty */
	/* The owner's. */
	struct aio_op *fresh; /* started, not yet handed over */
	struct aio_op **fresh_end;
	uint32_t fresh_count;
	uint32_t fresh_brief;
	int timer_fd;     /* readable when it is time to look, or ... */
	uint64_t look_ns; /* ... 0: nothing to look after */
	uint64_t seen;    /* `taken` at the last look */
	uint32_t started;
	uint32_t max;
	pthread_t threads[];
};

static uint32_t is_brief(const struct aio_op *op)
{
	return op->flags & AIO_BRIEF ? 1 : 0;
}

static struct aio_op *take(struct aio_pool *pool)
{
	struct aio_op *op;

	while (!pool->queue && !pool->stopping) {
		pool->idle++;
		pthread_cond_wait(&pool->work, &pool->lock);
		pool->idle--;
	}
	op = pool->queue;
	if (op) {
		pool->queue = op->next;
		pool->queued--;
		pool->taken++;
		pool->brief -= is_brief(op);
		if (!pool->queue)
			pool->queue_end = &pool->queue;
	}
	return op;
}

/* Under the lock. */
static void give_back(struct aio_pool *pool, struct aio_op *op)
{
	bool is_first = !pool->done;

	/* Before the owner is told: finding nothing, he would look again and again while this thread does not run. */
	op->next = pool->done;
	store_release(&pool->done, op);
	if (is_first)
		eventfd_write(pool->event_fd, 1);
}

static void *worker(void *opaque)
{
	struct aio_pool *pool = opaque;
	struct aio_op *op;

	pthread_setname_np(pthread_self(), "vhostblk-io");
	pthread_mutex_lock(&pool->lock);
	while ((op = take(pool))) {
		pthread_mutex_unlock(&pool->lock);
		aio_run(op);
		pthread_mutex_lock(&pool->lock);
		give_back(pool, op);
	}
	pthread_mutex_unlock(&pool->lock);
	return NULL;
}

int aio_pool_create(uint32_t workers, struct aio_pool **ret)
{
	uint32_t max = workers ? MIN(workers, 1024u) : DEFAULT_WORKERS;
	struct aio_pool *pool = calloc(1, sizeof(*pool) + max * sizeof(pool->threads[0]));

	if (!pool)
		return -ENOMEM;
	pool->max = max;
	pool->queue_end = &pool->queue;
	pool->fresh_end = &pool->fresh;
	pool->event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	pool->timer_fd = pool->event_fd < 0 ? -1 : timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
	if (pool->timer_fd < 0) {
		int error = -errno;

		if (pool->event_fd >= 0)
			close(pool->event_fd);
		free(pool);
		return error;
	}
	pthread_mutex_init(&pool->lock, NULL);
	pthread_cond_init(&pool->work, NULL);
	*ret = pool;
	return 0;
}

void aio_pool_destroy(struct aio_pool *pool)
{
	if (!pool)
		return;
	pthread_mutex_lock(&pool->lock);
	pool->stopping = true;
	pthread_cond_broadcast(&pool->work);
	pthread_mutex_unlock(&pool->lock);
	for (uint32_t i = 0; i < pool->started; i++)
		pthread_join(pool->threads[i], NULL);
	pthread_cond_destroy(&pool->work);
	pthread_mutex_destroy(&pool->lock);
	close(pool->event_fd);
	close(pool->timer_fd);
	free(pool);
}

int aio_pool_fd(const struct aio_pool *pool)
{
	return pool->event_fd;
}

int aio_pool_timer_fd(const struct aio_pool *pool)
{
	return pool->timer_fd;
}

static bool start_worker(struct aio_pool *pool)
{
	sigset_t previous;
	bool started;

	block_signals(&previous);
	started = !pthread_create(&pool->threads[pool->started], NULL, worker, pool);
	pthread_sigmask(SIG_SETMASK, &previous, NULL);
	if (started)
		pool->started++;
	return started;
}

void aio_pool_start(struct aio_pool *pool, struct aio_op *op)
{
	op->next = NULL;
	*pool->fresh_end = op;
	pool->fresh_end = &op->next;
	pool->fresh_count++;
	pool->fresh_brief += is_brief(op);
}

/* Not a single thread could be had: slow is better than never. */
static void run_all(struct aio_pool *pool)
{
	pthread_mutex_lock(&pool->lock);
	while (pool->queue) {
		struct aio_op *op = take(pool);

		pthread_mutex_unlock(&pool->lock);
		aio_run(op);
		pthread_mutex_lock(&pool->lock);
		give_back(pool, op);
	}
	pthread_mutex_unlock(&pool->lock);
}

/* Have threads for so much work, if there can be so many. */
static void wake(struct aio_pool *pool, uint32_t wanted, uint32_t idle)
{
	for (uint32_t i = 0; i < MIN(wanted, idle); i++)
		pthread_cond_signal(&pool->work);
	while (idle++ < wanted && pool->started < pool->max && start_worker(pool))
		;
	if (!pool->started)
		run_all(pool);
}

static void look_later(struct aio_pool *pool, bool again)
{
	struct itimerspec soon = {.it_value.tv_nsec = again ? LOOK_NS : 0};

	/* Not after the timer, or it would find nothing to do. */
	pool->look_ns = again ? now_ns() + LOOK_NS : 0;
	timerfd_settime(pool->timer_fd, 0, &soon, NULL);
}

static void look(struct aio_pool *pool)
{
	uint32_t brief, idle;
	uint64_t taken;

	pthread_mutex_lock(&pool->lock);
	brief = pool->brief;
	idle = pool->idle;
	taken = pool->taken;
	pthread_mutex_unlock(&pool->lock);
	if (brief && taken == pool->seen)
		wake(pool, 1, idle);
	pool->seen = taken;
	look_later(pool, brief);
}

static void hand_over(struct aio_pool *pool)
{
	uint32_t wanted, idle, brief;
	uint64_t taken;

	pthread_mutex_lock(&pool->lock);
	*pool->queue_end = pool->fresh;
	pool->queue_end = pool->fresh_end;
	pool->queued += pool->fresh_count;
	pool->brief += pool->fresh_brief;
	brief = pool->brief;
	wanted = pool->queued - brief + (brief ? 1 : 0);
	idle = pool->idle;
	taken = pool->taken;
	pthread_mutex_unlock(&pool->lock);
	pool->fresh = NULL;
	pool->fresh_end = &pool->fresh;
	pool->fresh_count = pool->fresh_brief = 0;
	wake(pool, wanted, idle);
	if (brief > 1 && !pool->look_ns) {
		pool->seen = taken;
		look_later(pool, true);
	}
}

void aio_pool_flush(struct aio_pool *pool)
{
	if (pool->fresh_count)
		hand_over(pool);
	if (pool->look_ns && now_ns() >= pool->look_ns)
		look(pool);
}

/* Move what is unwanted from one list to another. */
static void sweep(struct aio_op **list, struct aio_op ***end, uint32_t *count, uint32_t *brief, struct aio_op **swept)
{
	struct aio_op **link = list;

	while (*link) {
		struct aio_op *op = *link;

		if (!op->unwanted) {
			link = &op->next;
			continue;
		}
		*link = op->next;
		*count -= 1;
		*brief -= is_brief(op);
		op->next = *swept;
		*swept = op;
	}
	*end = link;
}

struct aio_op *aio_pool_sweep(struct aio_pool *pool)
{
	struct aio_op *swept = NULL;

	sweep(&pool->fresh, &pool->fresh_end, &pool->fresh_count, &pool->fresh_brief, &swept);
	pthread_mutex_lock(&pool->lock);
	sweep(&pool->queue, &pool->queue_end, &pool->queued, &pool->brief, &swept);
	pthread_mutex_unlock(&pool->lock);
	return swept;
}

bool aio_pool_pending(const struct aio_pool *pool)
{
	return load_acquire(&pool->done);
}

struct aio_op *aio_pool_reap(struct aio_pool *pool)
{
	struct aio_op *done;
	eventfd_t ignored;

	pthread_mutex_lock(&pool->lock);
	done = pool->done;
	store_relaxed(&pool->done, NULL);
	eventfd_read(pool->event_fd, &ignored);
	pthread_mutex_unlock(&pool->lock);
	return done;
}
