/* test_host_io.c: vb_io, with io_uring and with threads. */
#include <fcntl.h>
#include <poll.h>
#include "harness.h"
#ifndef VB_NO_URING
#include <dlfcn.h>
#include <liburing.h>
#endif

static struct vb_io_result one(struct vb_io *io, struct vb_io_request request)
{
	struct pollfd readable = {.fd = vb_io_fd(io), .events = POLLIN};
	struct vb_io_result result;
	uint64_t end = now_ns() + DEADLINE;

	request.cookie = 42;
	CHECK_EQUAL(vb_io_submit(io, &request, 1), 1);
	while (!vb_io_reap(io, &result, 1)) {
		CHECK(now_ns() < end);
		poll(&readable, 1, 1000);
	}
	CHECK_EQUAL(result.cookie, 42);
	return result;
}

static void many_pieces(struct vb_io *io, int fd)
{
	enum { PIECES = 3000 };
	static uint8_t data[PIECES][16];
	static struct vb_iov iov[PIECES], before[PIECES];

	for (int i = 0; i < PIECES; i++) {
		memset(data[i], i, 16);
		/* Some are empty. */
		iov[i] = (struct vb_iov){(uint64_t)data[i], i % 7 ? 16 : 0};
	}
	memcpy(before, iov, sizeof(iov));
	for (int op = VB_IO_WRITE; op >= VB_IO_READ; op--) {
		struct vb_io_request r = {
			.op = (uint32_t)op, .fd = fd, .iov = (uint64_t)iov, .niov = PIECES, .offset = 5};

		CHECK_EQUAL(one(io, r).result, 16 * (PIECES - (PIECES + 6) / 7));
		CHECK(!memcmp(before, iov, sizeof(iov)));
		for (int i = 0; i < PIECES && op == VB_IO_READ; i++)
			CHECK(!(i % 7) || data[i][15] == (uint8_t)i);
		memset(data, 0, sizeof(data));
	}
}

/* Many more at once than io_uring is given: the others queue up. */
static void many_at_once(enum vb_io_kind kind, int fd)
{
	enum { COUNT = 8000 };
	static struct vb_io_request requests[COUNT];
	static struct vb_io_result results[COUNT];
	static uint8_t data[COUNT][16], seen[COUNT];
	static struct vb_iov iov[COUNT];
	struct vb_io *io;
	struct pollfd readable = {.events = POLLIN};
	uint64_t end = now_ns() + DEADLINE;

	memset(seen, 0, sizeof(seen));
	CHECK_EQUAL(vb_io_create(kind, COUNT, 4, &io), 0);
	readable.fd = vb_io_fd(io);
	for (int i = 0; i < COUNT; i++) {
		iov[i] = (struct vb_iov){(uint64_t)data[i], 16};
		requests[i] = (struct vb_io_request){.cookie = (uint64_t)i,
			.fd = fd,
			.iov = (uint64_t)&iov[i],
			.niov = 1,
			.op = VB_IO_READ,
			.offset = (uint64_t)i};
	}
	CHECK_EQUAL(vb_io_submit(io, requests, COUNT), COUNT);
	for (int done = 0; done < COUNT;) {
		int n = vb_io_reap(io, results, COUNT);

		CHECK(now_ns() < end);
		for (int i = 0; i < n; i++) {
			CHECK_EQUAL(results[i].result, 16);
			CHECK_EQUAL(seen[results[i].cookie]++, 0);
		}
		done += n;
		if (!n)
			poll(&readable, 1, 1000);
	}
	vb_io_destroy(io);
}

static void run(enum vb_io_kind kind)
{
	struct vb_io *io;
	int fd = file_new(true, 0), sink = open("/dev/full", O_WRONLY | O_CLOEXEC);
	uint8_t data[4096];
	struct vb_iov iov = {(uint64_t)data, sizeof(data)};
	struct vb_io_request r = {.fd = fd, .iov = (uint64_t)&iov, .niov = 1};
	struct vb_io_result results[64];
	struct vb_io_request batch[64];
	int done = 0, taken;
	uint64_t end = now_ns() + DEADLINE;

	CHECK_EQUAL(vb_io_create(kind, 16, 4, &io), 0);
	CHECK_EQUAL(vb_io_kind(io), kind);
	memset(data, 0x77, sizeof(data));
	r.op = VB_IO_WRITE;
	r.flags = 1;
	CHECK_EQUAL(one(io, r).result, 4096);
	r.flags = 0;
	r.op = VB_IO_FDATASYNC;
	CHECK_EQUAL(one(io, r).result, 0);
	r.op = VB_IO_READ;
	r.offset = 4000;
	CHECK_EQUAL(one(io, r).result, 96);
	r.offset = 10000;
	CHECK_EQUAL(one(io, r).result, 0);
	r.op = VB_IO_FALLOCATE;
	r.offset = 0;
	r.length = 1 << 20;
	CHECK_EQUAL(one(io, r).result, 0);
	CHECK_EQUAL(lseek(fd, 0, SEEK_END), 1 << 20);
	r.flags = FALLOC_FL_PUNCH_HOLE; /* without KEEP_SIZE */
	CHECK_EQUAL(one(io, r).result, -EOPNOTSUPP);
	r.flags = 0;
	r.op = VB_IO_WRITE;
	r.fd = sink;
	CHECK_EQUAL(one(io, r).result, -ENOSPC);
	r.fd = -1;
	CHECK_EQUAL(one(io, r).result, -EBADF);
	r.fd = fd;
	r.niov = 0;
	CHECK_EQUAL(one(io, r).result, 0);
	r.iov = 0;
	CHECK_EQUAL(one(io, r).result, 0);
	many_pieces(io, fd);
	many_at_once(kind, fd);
	/* More than fits: the rest is refused, and taken later. */
	for (int i = 0; i < 64; i++)
		batch[i] = (struct vb_io_request){.cookie = (uint64_t)i,
			.fd = fd,
			.iov = (uint64_t)&iov,
			.niov = 1,
			.op = VB_IO_READ,
			.offset = 4096u * (unsigned)i};
	taken = vb_io_submit(io, batch, 64);
	CHECK_EQUAL(taken, 16);
	while (done < 64) {
		int n = vb_io_reap(io, results, 5);

		CHECK(now_ns() < end);
		for (int i = 0; i < n; i++)
			CHECK_EQUAL(results[i].result, 4096);
		done += n;
		taken += vb_io_submit(io, batch + taken, 64 - (uint32_t)taken);
	}
	/* Destroyed with some in flight. */
	CHECK_EQUAL(vb_io_submit(io, batch, 10), 10);
	vb_io_destroy(io);
	close(fd);
	close(sink);
}

/* So many submissions find the kernel short of memory. */
static int refusals;

#ifndef VB_NO_URING
/* Stands in for the one of liburing. */
int io_uring_submit(struct io_uring *ring)
{
	int (*real)(struct io_uring *) = (int (*)(struct io_uring *))dlsym(RTLD_NEXT, "io_uring_submit");

	return __atomic_load_n(&refusals, __ATOMIC_RELAXED) > 0 && refusals-- > 0 ? -EAGAIN : real(ring);
}

#endif

/* Nothing is in flight, so nothing ends, so nobody would come back and try again. */
TEST(what_io_uring_refuses_is_submitted_again)
{
	char data[512];
	struct vb_iov iov = {(uint64_t)data, sizeof(data)};
	struct vb_io_request request = {.op = VB_IO_READ, .iov = (uint64_t)&iov, .niov = 1};
	struct vb_io_result result;
	struct vb_io *io;
	struct pollfd readable = {.events = POLLIN};

	if (vb_io_uring_error())
		skip("io_uring is forbidden here");
	CHECK_EQUAL(vb_io_create(VB_IO_URING, 8, 0, &io), 0);
	readable.fd = vb_io_fd(io);
	request.fd = file_new(false, 4096);
	for (int round = 0; round < 2; round++) {
		int count = 0;

		refusals = 350; /* each try is a hundred */
		CHECK_EQUAL(vb_io_submit(io, &request, 1), 1);
		for (int tries = 0; !count && tries < 10; tries++) {
			CHECK_EQUAL(poll(&readable, 1, 10000), 1);
			count = vb_io_reap(io, &result, 1);
		}
		CHECK_EQUAL(count, 1);
		CHECK_EQUAL(result.result, 512);
		CHECK_EQUAL(refusals, 0);
	}
	/* And then it is quiet. */
	CHECK_EQUAL(vb_io_reap(io, &result, 1), 0);
	CHECK_EQUAL(poll(&readable, 1, 20), 0);
	vb_io_destroy(io);
	close(request.fd);
}

TEST(host_io_with_threads)
{
	run(VB_IO_THREADS);
}

TEST(host_io_with_io_uring)
{
	if (vb_io_uring_error())
		skip("io_uring is forbidden here");
	run(VB_IO_URING);
}
