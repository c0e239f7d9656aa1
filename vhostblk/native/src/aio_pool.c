/*
 * aio_pool.c: a pool of threads that do blocking I/O. Started one by one, when there is more to do than idle threads.
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
	uint32_t idle;
	bool stopping;
	struct aio_op *done; /* also looked at without the lock, for being non-empty */

	int event_fd; /* readable while `done` is not empty */
	/* The owner's. */
	uint32_t started;
	uint32_t max;
	pthread_t threads[];
};

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
	bool more;

	op->next = NULL;
	pthread_mutex_lock(&pool->lock);
	*pool->queue_end = op;
	pool->queue_end = &op->next;
	pool->queued++;
	more = pool->queued > pool->idle;
	pthread_cond_signal(&pool->work);
	pthread_mutex_unlock(&pool->lock);
	if (!more || pool->started == pool->max || start_worker(pool) || pool->started)
		return;
	/* Not a single thread could be had: slow is better than never. */
	pthread_mutex_lock(&pool->lock);
	op = take(pool);
	pthread_mutex_unlock(&pool->lock);
	aio_run(op);
	pthread_mutex_lock(&pool->lock);
	give_back(pool, op);
	pthread_mutex_unlock(&pool->lock);
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
