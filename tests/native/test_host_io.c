/* test_host_io.c: vb_io, with io_uring and with threads. */
#include <fcntl.h>
#include <poll.h>
#include <sys/resource.h>
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

/* One operation: parts that are longer than a system call, that follow each other, and that do not. */
static void many_parts(struct vb_io *io, int fd)
{
	enum { PARTS = 200, LONG = (2 << 20) + 4096, SHORT = 4096 };
	uint8_t *data = calloc(1, LONG + PARTS * SHORT), *again = calloc(1, LONG + PARTS * SHORT);
	struct vb_io_part parts[PARTS + 1];
	uint64_t offset = 12345;

	for (int i = 0; i < LONG + PARTS * SHORT; i++)
		data[i] = (uint8_t)(i * 7 + (i >> 12));
	for (int op = VB_IO_WRITE_MANY; op >= VB_IO_READ_MANY; op--) {
		struct vb_io_request r = {.op = (uint32_t)op, .fd = -1, .iov = (uint64_t)parts, .niov = PARTS + 1};
		uint64_t at = (uint64_t)(op == VB_IO_WRITE_MANY ? data : again);

		for (int i = 0; i <= PARTS; i++) {
			uint64_t length = i ? SHORT : LONG;

			parts[i] = (struct vb_io_part){.fd = fd, .offset = offset, .address = at, .length = length};
			at += length;
			offset += length + (i % 70 ? 0 : 512);
		}
		CHECK_EQUAL(one(io, r).result, LONG + PARTS * SHORT);
		offset = 12345;
	}
	CHECK(!memcmp(data, again, LONG + PARTS * SHORT));
	/* The second is where the file ends; the one behind it is not done. */
	memset(again, 0, SHORT);
	parts[1] = (struct vb_io_part){.fd = fd, .offset = 1ull << 40, .address = (uint64_t)again, .length = 1};
	parts[2] = (struct vb_io_part){.fd = fd, .offset = offset, .address = (uint64_t)again, .length = SHORT};
	parts[0] = (struct vb_io_part){.fd = fd, .offset = offset, .address = (uint64_t)data, .length = SHORT};
	CHECK_EQUAL(one(io, (struct vb_io_request){.op = VB_IO_READ_MANY, .fd = -1, .iov = (uint64_t)parts, .niov = 3})
			    .result,
		SHORT);
	CHECK(!again[0] && !memcmp(again, again + 1, SHORT - 1));
	parts[1].fd = -1;
	CHECK_EQUAL(one(io, (struct vb_io_request){.op = VB_IO_WRITE_MANY, .fd = -1, .iov = (uint64_t)parts, .niov = 3})
			    .result,
		-EBADF);
	free(data);
	free(again);
	CHECK_EQUAL(ftruncate(fd, 1 << 20), 0);
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
	static uint8_t buffers[64][4096];
	struct vb_iov iovs[64];
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
	many_parts(io, fd);
	many_at_once(kind, fd);
	/* More than fits: the rest is refused, and taken later. */
	for (int i = 0; i < 64; i++) {
		iovs[i] = (struct vb_iov){(uint64_t)buffers[i], 4096};
		batch[i] = (struct vb_io_request){.cookie = (uint64_t)i,
			.fd = fd,
			.iov = (uint64_t)&iovs[i],
			.niov = 1,
			.op = VB_IO_READ,
			.offset = 4096u * (unsigned)i};
	}
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
/* What somebody else makes of the next entry of a ring, and which ring that was. */
static struct {
	bool at_work;
	uint8_t opcode, flags;
	int ring_fd;
} intruder;

/* Stands in for the one of liburing. */
int io_uring_submit(struct io_uring *ring)
{
	int (*real)(struct io_uring *) = (int (*)(struct io_uring *))dlsym(RTLD_NEXT, "io_uring_submit");

	if (intruder.at_work) {
		struct io_uring_sqe *entry = &ring->sq.sqes[ring->sq.sqe_head & *ring->sq.kring_mask];

		entry->opcode = intruder.opcode;
		entry->flags = intruder.flags;
		intruder.ring_fd = ring->ring_fd;
	}
	return load_relaxed(&refusals) > 0 && __atomic_fetch_sub(&refusals, 1, __ATOMIC_RELAXED) > 0 ? -EAGAIN
												     : real(ring);
}

static void skip_without_restrictions(void)
{
	struct io_uring_params params = {.flags = IORING_SETUP_R_DISABLED};
	struct io_uring ring;

	if (vb_io_uring_error())
		skip("io_uring is forbidden here");
	if (io_uring_queue_init_params(1, &ring, &params))
		skip("rings cannot be restricted before Linux 5.10");
	io_uring_queue_exit(&ring);
}

static void check_intruder(struct vb_io *io, struct vb_io_request request, uint8_t opcode, uint8_t flags, int result)
{
	intruder.opcode = opcode;
	intruder.flags = flags;
	CHECK_EQUAL(one(io, request).result, result);
}
#endif

TEST(rings_do_nothing_but_what_the_engine_asks_of_them)
{
#ifdef VB_NO_URING
	skip("compiled without liburing");
#else
	/* All of them are older than restrictions are. */
	static const uint8_t operations[] = {
		IORING_OP_NOP,
		IORING_OP_READ,
		IORING_OP_WRITE,
		IORING_OP_OPENAT,
		IORING_OP_OPENAT2,
		IORING_OP_CLOSE,
		IORING_OP_ACCEPT,
		IORING_OP_CONNECT,
		IORING_OP_SENDMSG,
		IORING_OP_SEND,
		IORING_OP_RECVMSG,
		IORING_OP_RECV,
		IORING_OP_TIMEOUT,
		IORING_OP_SPLICE,
		IORING_OP_STATX,
		IORING_OP_FALLOCATE,
	};
	static const uint8_t flags[] = {IOSQE_ASYNC, IOSQE_IO_LINK, IOSQE_IO_DRAIN, IOSQE_BUFFER_SELECT};
	char data[512];
	struct vb_iov iov = {(uint64_t)data, sizeof(data)};
	struct vb_io_request request = {.op = VB_IO_READ, .iov = (uint64_t)&iov, .niov = 1};
	struct io_uring_probe probe;
	struct io_uring ring;
	struct vb_io *io;

	skip_without_restrictions();
	request.fd = file_new(false, 4096);
	CHECK_EQUAL(vb_io_create(VB_IO_URING, 8, 0, &io), 0);
	intruder.at_work = true;
	for (size_t i = 0; i < sizeof(operations); i++)
		check_intruder(io, request, operations[i], 0, -EACCES);
	for (size_t i = 0; i < sizeof(flags); i++)
		check_intruder(io, request, IORING_OP_READV, flags[i], -EACCES);
	check_intruder(io, request, IORING_OP_READV, 0, 512);
	/* Nor can it be given more to work with. */
	ring = (struct io_uring){.ring_fd = intruder.ring_fd, .enter_ring_fd = intruder.ring_fd};
	CHECK_EQUAL(io_uring_register_probe(&ring, &probe, 0), -EACCES);
	CHECK_EQUAL(io_uring_register_eventfd(&ring, request.fd), -EACCES);
	CHECK_EQUAL(io_uring_unregister_files(&ring), -EACCES);
	vb_io_destroy(io);
	close(request.fd);
#endif
}

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

/* An engine thread whose first queue reads a file, and whose second one needs no I/O. */
struct rig {
	struct engine *engine;
	struct vb_disk *disk;
	struct guest guest;
	struct driver reads, quick;
	int fd;
};

static void rig_up(struct rig *rig)
{
	struct driver_config config = {.size = 16, .data_bytes = 512, .event_idx = true};
	struct vb_extent null = whole_file(-1, 4096, VB_EXTENT_READ | VB_EXTENT_NULL);

	if (vb_io_uring_error())
		skip("io_uring is forbidden here");
	rig->engine = engine_new(VB_IO_URING, 0);
	rig->disk = disk_new(1, 1 << 20);
	rig->fd = file_new(false, 1 << 20);
	guest_init(&rig->guest);
	disk_attach(rig->engine, rig->disk, rig->guest.memory);
	disk_map(rig->engine, rig->disk, whole_file(rig->fd, 1 << 20, VB_EXTENT_READ));
	disk_map(rig->engine, rig->disk, null);
	driver_init(&rig->reads, &rig->guest, &config);
	driver_init(&rig->quick, &rig->guest, &config);
	driver_start(&rig->reads, rig->engine, rig->disk, 1);
	driver_start(&rig->quick, rig->engine, rig->disk, 2);
}

static void rig_down(struct rig *rig)
{
	driver_stop(&rig->reads);
	driver_stop(&rig->quick);
	disk_detach(rig->engine, rig->disk);
	engine_delete(rig->engine);
	vb_disk_unref(rig->disk);
	driver_deinit(&rig->reads);
	driver_deinit(&rig->quick);
	guest_deinit(&rig->guest);
	close(rig->fd);
}

static int64_t cpu_us(void)
{
	struct rusage usage;

	getrusage(RUSAGE_SELF, &usage);
	return (usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) * 1000000 + usage.ru_utime.tv_usec +
	       usage.ru_stime.tv_usec;
}

/* The timer that would have tried again must not keep the thread awake. */
TEST(a_thread_is_idle_again_after_io_uring_has_refused)
{
	struct rig rig;
	struct pollfd never = {.events = POLLIN};
	int64_t before;

	rig_up(&rig);
	never.fd = vb_thread_fd(rig.engine->thread);
	store_relaxed(&refusals, 150); /* each try is a hundred */
	CHECK_EQUAL(driver_do(&rig.reads, VIRTIO_BLK_T_IN, 8, 512, NULL), 0);
	CHECK_EQUAL(load_relaxed(&refusals), 0);
	before = cpu_us();
	CHECK_EQUAL(poll(&never, 1, 300), 0);
	CHECK(cpu_us() - before < 100000);
	rig_down(&rig);
}

TEST(queues_are_heard_while_io_uring_refuses_the_io_of_others)
{
	struct rig rig;
	uint64_t end;

	rig_up(&rig);
	store_relaxed(&refusals, INT32_MAX);
	driver_add(&rig.reads, 0, VIRTIO_BLK_T_IN, 8, 512);
	driver_publish(&rig.reads);
	end = now_ns() + DEADLINE / 4;
	for (int i = 0; i < 20; i++)
		CHECK_EQUAL(driver_do(&rig.quick, VIRTIO_BLK_T_IN, 0, 512, NULL), 0);
	CHECK(now_ns() < end);
	CHECK_EQUAL(driver_reap(&rig.reads, NULL), -1);
	store_relaxed(&refusals, 0);
	engine_until(rig.engine, driver_reap(&rig.reads, NULL) == 0);
	rig_down(&rig);
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
