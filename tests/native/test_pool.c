/* test_pool.c: who waits for a device, and those behind: copies into the page cache, and the operations of other files. */
#include <poll.h>
#include <pthread.h>
#include <sys/syscall.h>
#include "harness.h"
#include "src/aio_lanes.h"

#define COUNT 12

#define FILES 8

/* Stands in for the one of libc: writes at some offsets wait, as they do while too much of the page cache is dirty, and all
 * of some files, as they do on a server that is gone. */
static struct {
	bool stands_in;
	pthread_mutex_t lock;
	pthread_cond_t changed;
	bool stuck[COUNT];
	bool gone[FILES];
	int waiting[FILES];
	int calls;
} kernel = {.lock = PTHREAD_MUTEX_INITIALIZER, .changed = PTHREAD_COND_INITIALIZER};

ssize_t pwritev(int fd, const struct iovec *iov, int count, off_t offset)
{
	if (!kernel.stands_in)
		return syscall(SYS_pwritev, fd, iov, count, (unsigned long)offset, 0ul);
	pthread_mutex_lock(&kernel.lock);
	kernel.calls++;
	kernel.waiting[fd]++;
	pthread_cond_broadcast(&kernel.changed);
	while (kernel.stuck[offset / 4096] || kernel.gone[fd])
		pthread_cond_wait(&kernel.changed, &kernel.lock);
	kernel.waiting[fd]--;
	pthread_mutex_unlock(&kernel.lock);
	return 4096;
}

static void release_all(void)
{
	pthread_mutex_lock(&kernel.lock);
	memset(kernel.stuck, 0, sizeof(kernel.stuck));
	memset(kernel.gone, 0, sizeof(kernel.gone));
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

#define EACH 40

static struct {
	struct aio *aio;
	struct aio_op ops[FILES][EACH];
	struct iovec iov[FILES][EACH][2];
	int done[FILES];
} crowd;

static void write_to(int file, uint8_t flags)
{
	static char data[2048];

	crowd.done[file] = 0;
	for (int i = 0; i < EACH; i++) {
		crowd.iov[file][i][0] = crowd.iov[file][i][1] = (struct iovec){data, 2048};
		crowd.ops[file][i] = (struct aio_op){.iov = crowd.iov[file][i],
			.pieces = 2,
			.kind = VB_IO_WRITE,
			.flags = AIO_POOL | flags,
			.buffer = -1,
			.file = -1,
			.fd = file};
		aio_start(crowd.aio, &crowd.ops[file][i]);
	}
	aio_flush(crowd.aio);
}

static void reap_file(int file)
{
	struct pollfd readable = {.fd = aio_fd(crowd.aio), .events = POLLIN};
	uint64_t end = now_ns() + DEADLINE;

	while (crowd.done[file] < EACH) {
		CHECK(now_ns() < end);
		CHECK_EQUAL(poll(&readable, 1, (int)(DEADLINE / 1000000)), 1);
		for (struct aio_op *op = aio_reap(crowd.aio); op; op = op->next) {
			CHECK_EQUAL(op->result, 4096);
			crowd.done[op->fd]++;
		}
		aio_flush(crowd.aio);
	}
}

/* All files but the last hang, with more requests than the pool begins with threads; the last is served, whatever else is. */
static void hang_all_but_one(uint8_t flags)
{
	CHECK_EQUAL(aio_create(VB_IO_THREADS, 16, 0, &crowd.aio), 0);
	kernel.stands_in = true;
	for (int round = 0; round < 2; round++) {
		for (int file = 0; file < FILES - 1; file++) {
			kernel.gone[file] = true;
			write_to(file, flags);
		}
		for (int times = 0; times < 5; times++) {
			write_to(FILES - 1, flags);
			reap_file(FILES - 1);
		}
		pthread_mutex_lock(&kernel.lock);
		for (int file = 0; file < FILES - 1; file++) {
			CHECK_EQUAL(crowd.done[file], 0);
			CHECK(kernel.waiting[file] <= 16);
		}
		pthread_mutex_unlock(&kernel.lock);
		release_all();
		for (int file = 0; file < FILES - 1; file++)
			reap_file(file);
	}
	aio_destroy(crowd.aio);
}

TEST(files_that_hang_do_not_have_the_threads_of_others)
{
	hang_all_but_one(0);
}

TEST(copies_to_files_that_hang_do_not_have_the_threads_of_others)
{
	hang_all_but_one(AIO_BRIEF);
}

TEST(file_that_hangs_has_as_many_threads_as_it_may_have_and_not_one_more)
{
	uint64_t end = now_ns() + DEADLINE;

	CHECK_EQUAL(aio_create(VB_IO_THREADS, 16, 3, &crowd.aio), 0);
	kernel.stands_in = true;
	kernel.gone[0] = true;
	write_to(0, 0);
	write_to(1, 0);
	reap_file(1);
	pthread_mutex_lock(&kernel.lock);
	while (kernel.waiting[0] < 3)
		pthread_cond_wait(&kernel.changed, &kernel.lock);
	pthread_mutex_unlock(&kernel.lock);
	CHECK(now_ns() < end);
	write_to(1, 0);
	reap_file(1);
	CHECK_EQUAL(kernel.waiting[0], 3);
	release_all();
	reap_file(0);
	aio_destroy(crowd.aio);
}

static void *disturb(void *opaque)
{
	uint32_t state = 7;

	for (bool *over = opaque; !load_acquire(over);) {
		struct timespec moment = {.tv_nsec = 1 + state % 2000000};

		nanosleep(&moment, NULL);
		state = state * 1103515245u + 12345u;
		pthread_mutex_lock(&kernel.lock);
		kernel.gone[state >> 16 & (FILES - 1)] ^= true;
		pthread_cond_broadcast(&kernel.changed);
		pthread_mutex_unlock(&kernel.lock);
	}
	release_all();
	return NULL;
}

/* Files come and go, and operations are given up, at random moments: each comes back once, done or not. */
TEST(operations_come_back_once_whatever_hangs_and_whatever_is_given_up)
{
	struct pollfd readable = {.events = POLLIN};
	static bool in_flight[FILES * EACH];
	struct aio_op *ops = &crowd.ops[0][0];
	uint64_t end = now_ns() + DEADLINE / 10;
	uint32_t count = 0, given_up = 0;
	bool over = false;
	pthread_t other;

	CHECK_EQUAL(aio_create(VB_IO_THREADS, 16, 4, &crowd.aio), 0);
	readable.fd = aio_fd(crowd.aio);
	kernel.stands_in = true;
	CHECK_EQUAL(pthread_create(&other, NULL, disturb, &over), 0);
	while (now_ns() < end || count) {
		uint32_t which = random_below(FILES * EACH);

		if (!in_flight[which] && now_ns() < end) {
			static char data[2048];
			struct iovec *iov = &crowd.iov[0][0][0] + 2 * which;

			iov[0] = iov[1] = (struct iovec){data, 2048};
			ops[which] = (struct aio_op){.iov = iov,
				.pieces = 2,
				.kind = VB_IO_WRITE,
				.flags = AIO_POOL | (random_below(2) ? AIO_BRIEF : 0),
				.buffer = -1,
				.file = -1,
				.fd = (int)(which % FILES)};
			in_flight[which] = true;
			aio_start(crowd.aio, &ops[which]);
			count++;
		} else if (in_flight[which] && !random_below(10)) {
			aio_cancel(crowd.aio, &ops[which]);
			aio_sweep(crowd.aio);
		}
		if (now_ns() >= end)
			store_release(&over, true);
		if (random_below(3))
			aio_flush(crowd.aio);
		if (random_below(3) && now_ns() < end)
			continue;
		aio_flush(crowd.aio);
		poll(&readable, 1, now_ns() < end ? 0 : 100);
		for (struct aio_op *op = aio_reap(crowd.aio); op; op = op->next) {
			CHECK(in_flight[op - ops]);
			CHECK(op->result == 4096 || (op->result == -ECANCELED && op->unwanted));
			given_up += op->result < 0;
			in_flight[op - ops] = false;
			count--;
		}
		CHECK(now_ns() < end + DEADLINE);
	}
	store_release(&over, true);
	pthread_join(other, NULL);
	CHECK(given_up);
	aio_destroy(crowd.aio);
}

/* ---- lanes, compared with a model: lists of the operations of each file, in order */

#define OPS 2000
#define NUMBERS 300 /* of files: more than there are lanes */

static struct {
	struct aio_lanes lanes;
	struct aio_op ops[OPS];
	int queued[NUMBERS];
	int running[NUMBERS];
	int next_of[NUMBERS][OPS]; /* which, in order */
	int taken[NUMBERS];
	int added[NUMBERS];
} model;

static void check_sums(int files, uint32_t most)
{
	uint32_t waiting = 0;

	for (int file = 0; file < files; file++)
		waiting += MIN((uint32_t)model.queued[file], most - (uint32_t)model.running[file]);
	CHECK_EQUAL(model.lanes.waiting, waiting);
	CHECK_EQUAL(model.lanes.brief, 0);
}

static struct aio_op *take_and_check(uint32_t most)
{
	struct aio_op *op = aio_lanes_take(&model.lanes);

	if (op) {
		CHECK_EQUAL(op - model.ops, model.next_of[op->fd][model.taken[op->fd]++]);
		model.queued[op->fd]--;
		model.running[op->fd]++;
		CHECK((uint32_t)model.running[op->fd] <= most);
	}
	return op;
}

static void add(int number, int file)
{
	model.ops[number] = (struct aio_op){.kind = VB_IO_READ, .fd = file};
	model.next_of[file][model.added[file]++] = number;
	model.queued[file]++;
	aio_lanes_add(&model.lanes, &model.ops[number]);
}

TEST(lanes_are_served_in_order_and_no_lane_has_too_much)
{
	static struct aio_op *running[OPS];

	for (uint32_t most = 1; most < 6; most += 2) {
		uint32_t count = 0;
		int added = 0, ended = 0;

		memset(&model, 0, sizeof(model));
		aio_lanes_init(&model.lanes, most);
		while (ended < OPS) {
			struct aio_op *op;

			if (added < OPS && random_below(3) == 0)
				add(added++, (int)random_below(20));
			if (random_below(3) == 0 && (op = take_and_check(most)))
				running[count++] = op;
			if (count && random_below(3) == 0) {
				uint32_t which = random_below(count);

				op = running[which];
				running[which] = running[--count];
				model.running[op->fd]--;
				aio_lanes_end(&model.lanes, op);
				ended++;
			}
			check_sums(20, most);
		}
		CHECK(!aio_lanes_take(&model.lanes));
	}
}

TEST(lanes_are_taken_in_turn)
{
	memset(&model, 0, sizeof(model));
	aio_lanes_init(&model.lanes, 16);
	for (int i = 0; i < 8; i++)
		add(i, 3);
	add(8, 4);
	add(9, 5);
	for (int i = 0; i < 3; i++)
		CHECK_EQUAL(aio_lanes_take(&model.lanes)->fd, 3 + i);
	CHECK_EQUAL(aio_lanes_take(&model.lanes)->fd, 3);
}

TEST(lanes_that_are_shared_for_want_of_more_lose_nothing)
{
	int taken = 0;

	memset(&model, 0, sizeof(model));
	aio_lanes_init(&model.lanes, 1);
	for (int i = 0; i < OPS; i++)
		add(i, i % NUMBERS);
	CHECK_EQUAL(model.lanes.waiting, LANES);
	for (struct aio_op *op; (op = aio_lanes_take(&model.lanes)); taken++)
		aio_lanes_end(&model.lanes, op);
	CHECK_EQUAL(taken, OPS);
	CHECK_EQUAL(model.lanes.waiting, 0);
}

TEST(lanes_know_which_are_stuck)
{
	struct aio_op *op = NULL;

	memset(&model, 0, sizeof(model));
	aio_lanes_init(&model.lanes, 2);
	for (int i = 0; i < 6; i++)
		add(i, i % 2);
	for (int i = 0; i < 4; i++)
		op = aio_lanes_take(&model.lanes);
	CHECK(!aio_lanes_take(&model.lanes));
	CHECK_EQUAL(aio_lanes_stuck(&model.lanes), 0); /* they have only begun */
	CHECK_EQUAL(aio_lanes_stuck(&model.lanes), 4);
	aio_lanes_end(&model.lanes, op);
	CHECK_EQUAL(aio_lanes_take(&model.lanes)->fd, op->fd);
	CHECK_EQUAL(aio_lanes_stuck(&model.lanes), 2);
	CHECK_EQUAL(aio_lanes_stuck(&model.lanes), 4);
}

TEST(lanes_give_up_what_is_unwanted_and_go_on_with_the_rest)
{
	struct aio_op *swept = NULL;
	int count = 0;

	memset(&model, 0, sizeof(model));
	aio_lanes_init(&model.lanes, 2);
	for (int i = 0; i < 30; i++) {
		add(i, i % 3);
		model.ops[i].unwanted = i % 3 == 1 || i % 2;
	}
	aio_lanes_sweep(&model.lanes, &swept);
	for (; swept; swept = swept->next, count++)
		CHECK(swept->unwanted);
	CHECK_EQUAL(count, 20);
	CHECK_EQUAL(model.lanes.waiting, 4);
	for (struct aio_op *op; (op = aio_lanes_take(&model.lanes)); count++) {
		CHECK(!op->unwanted);
		aio_lanes_end(&model.lanes, op);
	}
	CHECK_EQUAL(count, 30);
}
