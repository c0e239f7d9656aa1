/*
 * aio_pool.c: a pool of threads that do blocking I/O. Started when there is more to do than there are idle threads.
 *
 * What the owner starts is handed over by the next flush, all at once: one lock, and no more wake-ups than there is work
 * that waits for devices. One thread is woken for all copies into the page cache (AIO_BRIEF), which seldom wait. When one
 * does, because too much is dirty, those behind it would wait with it: so while there is more to do than there are
 * threads for, the owner looks every millisecond whether they get on, and wakes another thread if not.
 *
 * A file has at most as many threads as the pool has to begin with. Those of files that do not answer are not counted: the
 * pool gets as many more, and nobody waits for somebody else's device.
 */
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/timerfd.h>
#include <unistd.h>
#include "aio_lanes.h"
#include "signals.h"

#define DEFAULT_WORKERS 16
#define MOST_WORKERS 1024u

/* How often is looked whether threads get on. */
#define LOOK_NS 1000000

/* A file that has not ended anything for so long does not answer: much longer than a busy machine makes threads wait. */
#define STUCK_NS 100000000

struct aio_pool {
	pthread_mutex_t lock; /* of everything down to `done` */
	pthread_cond_t work;
	struct aio_lanes lanes;
	uint32_t idle;
	uint64_t taken; /* operations, ever */
	bool stopping;
	struct aio_op *done; /* also looked at without the lock, for being non-empty */

	int event_fd; /* readable while `done` is not empty */
	/* The owner's. */
	struct aio_op *fresh; /* started, not yet handed over */
	struct aio_op **fresh_end;
	int timer_fd;     /* readable when it is time to look, or ... */
	uint64_t look_ns; /* ... 0: nothing to look after */
	uint64_t seen;    /* `taken` at the last look */
	uint32_t started;
	uint32_t workers;   /* as many may be started, and ... */
	uint32_t stuck;     /* ... one for each operation of a file that does not answer ... */
	uint64_t judged_ns; /* ... as was found then */
	pthread_t threads[MOST_WORKERS];
};

/* What a look at the lanes has found. */
struct work {
	uint32_t waiting;
	uint32_t brief;
	uint32_t idle;
	uint64_t taken;
};

/* Under the lock. */
static struct work work_of(const struct aio_pool *pool)
{
	return (struct work){pool->lanes.waiting, pool->lanes.brief, pool->idle, pool->taken};
}

static struct aio_op *take(struct aio_pool *pool)
{
	struct aio_op *op;

	while (!(op = aio_lanes_take(&pool->lanes)) && !pool->stopping) {
		pool->idle++;
		pthread_cond_wait(&pool->work, &pool->lock);
		pool->idle--;
	}
	if (op)
		pool->taken++;
	return op;
}

/* Under the lock. */
static void give_back(struct aio_pool *pool, struct aio_op *op)
{
	bool is_first = !pool->done;

	aio_lanes_end(&pool->lanes, op);
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
	struct aio_pool *pool = calloc(1, sizeof(*pool));

	if (!pool)
		return -ENOMEM;
	pool->workers = workers ? MIN(workers, MOST_WORKERS) : DEFAULT_WORKERS;
	aio_lanes_init(&pool->lanes, pool->workers);
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
}

/* Not a single thread could be had: slow is better than never. */
static void run_all(struct aio_pool *pool)
{
	struct aio_op *op;

	pthread_mutex_lock(&pool->lock);
	while ((op = aio_lanes_take(&pool->lanes))) {
		pthread_mutex_unlock(&pool->lock);
		aio_run(op);
		pthread_mutex_lock(&pool->lock);
		give_back(pool, op);
	}
	pthread_mutex_unlock(&pool->lock);
}

/* Have threads for so much work, if there can be so many; returns how many there are. */
static uint32_t wake(struct aio_pool *pool, uint32_t wanted, uint32_t idle)
{
	uint32_t most = MIN(pool->workers + pool->stuck, MOST_WORKERS);
	uint32_t woken = MIN(wanted, idle);

	for (uint32_t i = 0; i < woken; i++)
		pthread_cond_signal(&pool->work);
	while (woken < wanted && pool->started < most && start_worker(pool))
		woken++;
	if (!pool->started)
		run_all(pool);
	return woken;
}

static void look_later(struct aio_pool *pool, bool again)
{
	struct itimerspec soon = {.it_value.tv_nsec = again ? LOOK_NS : 0};

	/* Not after the timer, or it would find nothing to do. */
	pool->look_ns = again ? now_ns() + LOOK_NS : 0;
	timerfd_settime(pool->timer_fd, 0, &soon, NULL);
}

/* Under the lock. */
static void judge(struct aio_pool *pool)
{
	uint64_t now = now_ns(), age = now - pool->judged_ns;
	uint32_t stuck;

	if (age < STUCK_NS)
		return;
	stuck = aio_lanes_stuck(&pool->lanes);
	/* Where nobody has looked for long, this is only the beginning. */
	pool->stuck = age < 2 * STUCK_NS ? stuck : 0;
	pool->judged_ns = now;
}

static void look(struct aio_pool *pool)
{
	struct work work;

	pthread_mutex_lock(&pool->lock);
	work = work_of(pool);
	judge(pool);
	pthread_mutex_unlock(&pool->lock);
	if (work.waiting)
		wake(pool, work.waiting - work.brief + (work.brief && work.taken == pool->seen ? 1 : 0), work.idle);
	pool->seen = work.taken;
	look_later(pool, work.waiting);
}

static void hand_over(struct aio_pool *pool)
{
	struct work work;
	uint32_t woken;

	pthread_mutex_lock(&pool->lock);
	for (struct aio_op *op = pool->fresh, *next; op; op = next) {
		next = op->next;
		aio_lanes_add(&pool->lanes, op);
	}
	work = work_of(pool);
	pthread_mutex_unlock(&pool->lock);
	pool->fresh = NULL;
	pool->fresh_end = &pool->fresh;
	woken = wake(pool, work.waiting - work.brief + (work.brief ? 1 : 0), work.idle);
	if (work.waiting > woken && !pool->look_ns) {
		pool->seen = work.taken;
		look_later(pool, true);
	}
}

void aio_pool_flush(struct aio_pool *pool)
{
	if (pool->fresh)
		hand_over(pool);
	if (pool->look_ns && now_ns() >= pool->look_ns)
		look(pool);
}

struct aio_op *aio_pool_sweep(struct aio_pool *pool)
{
	struct aio_op *swept = NULL;

	pool->fresh_end = aio_sweep_list(&pool->fresh, &swept);
	pthread_mutex_lock(&pool->lock);
	aio_lanes_sweep(&pool->lanes, &swept);
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
