/*
 * aio_pool.c: a pool of threads that do blocking I/O. Started when there is more to do than there are idle threads.
 *
 * What the owner starts is handed over by the next flush, all at once: one lock, and no more wake-ups than there is work
 * that waits for devices.
 */
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <unistd.h>
#include "aio.h"
#include "signals.h"

#define DEFAULT_WORKERS 16

struct aio_pool {
	pthread_mutex_t lock; /* of everything down to `done` */
	pthread_cond_t work;
	struct aio_op *queue;
	struct aio_op **queue_end;
	uint32_t queued;
	uint32_t brief; /* of those queued, AIO_BRIEF */
	uint32_t idle;
	bool stopping;
	struct aio_op *done; /* also looked at without the lock, for being non-empty */

	int event_fd; /* readable while `done` is not empty */
	/* The owner's. */
	struct aio_op *fresh; /* started, not yet handed over */
	struct aio_op **fresh_end;
	uint32_t fresh_count;
	uint32_t fresh_brief;
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
		pool->brief -= is_brief(op);
		if (!pool->queue)
			pool->queue_end = &pool->queue;
	}
	return op;
}

/* Under the lock. */
static void give_back(struct aio_pool *pool, struct aio_op *op)
{
	if (!pool->done)
		eventfd_write(pool->event_fd, 1);
	op->next = pool->done;
	store_release(&pool->done, op);
}

static void *worker(void *opaque)
{
	struct aio_pool *pool = opaque;
	struct aio_op *op;

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
	if (pool->event_fd < 0) {
		int error = -errno;

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
	free(pool);
}

int aio_pool_fd(const struct aio_pool *pool)
{
	return pool->event_fd;
}

static bool start_worker(struct aio_pool *pool)
{
	sigset_t previous;
	bool started;

	block_signals(&previous);
	started = !pthread_create(&pool->threads[pool->started], NULL, worker, pool);
	pthread_sigmask(SIG_SETMASK, &previous, NULL);
	if (started) {
		pthread_setname_np(pool->threads[pool->started], "vhostblk-io");
		pool->started++;
	}
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

void aio_pool_flush(struct aio_pool *pool)
{
	uint32_t wanted, idle;

	if (!pool->fresh_count)
		return;
	pthread_mutex_lock(&pool->lock);
	*pool->queue_end = pool->fresh;
	pool->queue_end = pool->fresh_end;
	pool->queued += pool->fresh_count;
	pool->brief += pool->fresh_brief;
	wanted = pool->queued - pool->brief + (pool->brief ? 1 : 0);
	idle = pool->idle;
	pthread_mutex_unlock(&pool->lock);
	pool->fresh = NULL;
	pool->fresh_end = &pool->fresh;
	pool->fresh_count = pool->fresh_brief = 0;
	for (uint32_t i = 0; i < MIN(wanted, idle); i++)
		pthread_cond_signal(&pool->work);
	while (idle++ < wanted && pool->started < pool->max && start_worker(pool))
		;
	if (!pool->started)
		run_all(pool);
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
