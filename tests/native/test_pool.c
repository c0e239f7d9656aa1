/* test_pool.c: copies into the page cache that wait for a device, and those behind them. */
#include <poll.h>
#include <pthread.h>
#include <sys/syscall.h>
#include "harness.h"
#include "src/aio.h"

#define COUNT 12

/* Stands in for the one of libc: writes at some offsets wait, as they do while too much of the page cache is dirty. */
static struct {
	bool stands_in;
	pthread_mutex_t lock;
	pthread_cond_t changed;
	bool stuck[COUNT];
	int calls;
} kernel = {.lock = PTHREAD_MUTEX_INITIALIZER, .changed = PTHREAD_COND_INITIALIZER};

ssize_t pwritev(int fd, const struct iovec *iov, int count, off_t offset)
{
	if (!kernel.stands_in)
		return syscall(SYS_pwritev, fd, iov, count, (unsigned long)offset, 0ul);
	pthread_mutex_lock(&kernel.lock);
	kernel.calls++;
	while (kernel.stuck[offset / 4096])
		pthread_cond_wait(&kernel.changed, &kernel.lock);
	pthread_mutex_unlock(&kernel.lock);
	return 4096;
}

static void release_all(void)
{
	pthread_mutex_lock(&kernel.lock);
	memset(kernel.stuck, 0, sizeof(kernel.stuck));
	pthread_cond_broadcast(&kernel.changed);
	pthread_mutex_unlock(&kernel.lock);
}

static struct {
	struct aio *aio;
	struct aio_op ops[COUNT];
	struct iovec iov[COUNT][2];
	bool done[COUNT];
	int count;
} rig;

static void reap_until(int count)
{
	struct pollfd readable = {.fd = aio_fd(rig.aio), .events = POLLIN};
	uint64_t end = now_ns() + DEADLINE;

	while (rig.count < count) {
		CHECK(now_ns() < end);
		/* As an engine thread does that has nothing else to do: nobody submits anything. */
		CHECK_EQUAL(poll(&readable, 1, (int)(DEADLINE / 1000000)), 1);
		for (struct aio_op *op = aio_reap(rig.aio); op; op = op->next) {
			CHECK_EQUAL(op->result, 4096);
			rig.done[op - rig.ops] = true;
			rig.count++;
		}
		aio_flush(rig.aio);
	}
}

static void start_all(void)
{
	static char data[2048];

	memset(rig.done, 0, sizeof(rig.done));
	rig.count = 0;
	for (int i = 0; i < COUNT; i++) {
		/* What has one piece only is written by another call, which the benchmarks measure. */
		rig.iov[i][0] = rig.iov[i][1] = (struct iovec){data, 2048};
		rig.ops[i] = (struct aio_op){.iov = rig.iov[i],
			.pieces = 2,
			.kind = VB_IO_WRITE,
			.flags = AIO_POOL | AIO_BRIEF,
			.buffer = -1,
			.file = -1,
			.fd = 1,
			.offset = 4096u * (uint32_t)i};
		aio_start(rig.aio, &rig.ops[i]);
	}
	aio_flush(rig.aio);
}

TEST(copies_do_not_wait_for_one_that_waits_for_its_device)
{
	CHECK_EQUAL(aio_create(VB_IO_THREADS, 16, 0, &rig.aio), 0);
	kernel.stands_in = true;
	for (int round = 0; round < 3; round++) {
		kernel.stuck[0] = kernel.stuck[1] = kernel.stuck[5] = true;
		start_all();
		reap_until(COUNT - 3);
		CHECK(!rig.done[0] && !rig.done[1] && !rig.done[5]);
		release_all();
		reap_until(COUNT);
	}
	aio_destroy(rig.aio);
}

TEST(when_copies_are_over_nobody_looks_after_them)
{
	struct pollfd readable = {.events = POLLIN};

	CHECK_EQUAL(aio_create(VB_IO_THREADS, 16, 0, &rig.aio), 0);
	readable.fd = aio_fd(rig.aio);
	kernel.stands_in = true;
	start_all();
	reap_until(COUNT);
	/* The last look finds nothing. */
	if (poll(&readable, 1, 20) == 1)
		aio_flush(rig.aio);
	CHECK_EQUAL(poll(&readable, 1, 20), 0);
	CHECK_EQUAL(kernel.calls, COUNT);
	aio_destroy(rig.aio);
}
