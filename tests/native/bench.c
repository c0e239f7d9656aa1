/*
 * bench.c: how fast the engine is by itself. Not run by the tests: `build.sh bench -O2 && ./bench bench_inline_tmpfs`.
 *
 * bench_turn_*: one thread is driver and engine in turn, so nothing depends on what else the machine does. Under callgrind
 * they count the engine's instructions for each request: docs/benchmarks.md.
 */
#include <sys/resource.h>
#include "harness.h"
#include "src/thread.h"

#define SIZE (256u << 20)

/* CPU time of everybody but the guest, which is this thread. */
static double engine_seconds(void)
{
	struct rusage all, self;

	getrusage(RUSAGE_SELF, &all);
	getrusage(RUSAGE_THREAD, &self);
	return (double)(all.ru_utime.tv_sec + all.ru_stime.tv_sec - self.ru_utime.tv_sec - self.ru_stime.tv_sec) +
	       (double)(all.ru_utime.tv_usec + all.ru_stime.tv_usec - self.ru_utime.tv_usec - self.ru_stime.tv_usec) /
		       1e6;
}

static uint32_t measure(
	struct driver_config config, enum vb_io_kind kind, uint32_t flags, uint64_t poll_ns, uint32_t depth)
{
	struct engine *engine = engine_new(kind, poll_ns);
	struct vb_disk *disk = disk_new(1, SIZE);
	struct driver driver;
	struct guest guest;
	int fd = file_new(false, SIZE), token;
	uint64_t begin, done = 0;
	double cpu;

	for (uint64_t at = 0; at < SIZE; at += 4096)
		CHECK_EQUAL(pwrite(fd, "x", 1, (off_t)at), 1);
	guest_init(&guest);
	disk_attach(engine, disk, guest.memory);
	disk_map(engine, disk, whole_file(fd, SIZE, flags | VB_EXTENT_READ | VB_EXTENT_WRITE));
	driver_init(&driver, &guest, &config);
	driver_start(&driver, engine, disk, 1);
	begin = now_ns();
	cpu = engine_seconds();
	for (uint16_t i = 0; i < depth; i++)
		driver_add(&driver, i, VIRTIO_BLK_T_IN, random_below(SIZE / 4096) * 8, 4096);
	driver_publish(&driver);
	while (now_ns() - begin < 2000000000ull) {
		int reaped = 0;

		while ((token = driver_reap(&driver, NULL)) >= 0) {
			driver_add(&driver, (uint16_t)token, VIRTIO_BLK_T_IN, random_below(SIZE / 4096) * 8, 4096);
			reaped++;
		}
		done += (uint64_t)reaped;
		if (reaped)
			driver_publish(&driver);
		else if (poll_ns)
			cpu_relax();
		else
			driver_wait(&driver, 1000);
	}
	begin = now_ns() - begin;
	cpu = engine_seconds() - cpu;
	engine->on_message = NULL;
	driver_stop(&driver);
	disk_detach(engine, disk);
	engine_delete(engine);
	vb_disk_unref(disk);
	guest_deinit(&guest);
	printf("depth %2u: %7.0f requests/s, %5.2f us of engine CPU each, %llu kicks, %llu calls\n", depth,
		(double)done * 1e9 / (double)begin, cpu * 1e6 / (double)done, (unsigned long long)driver.stats->kicks,
		(unsigned long long)driver.stats->calls);
	driver_deinit(&driver);
	close(fd);
	return (uint32_t)done;
}

static void all(enum vb_io_kind kind, uint32_t flags)
{
	struct driver_config config = {
		.size = 128, .data_bytes = 4096, .indirect = true, .event_idx = true, .alignment = 4096};

	for (uint32_t depth = 1; depth <= 32; depth += 31) {
		printf("both sides polling,  ");
		measure(config, kind, flags, 1000000, depth);
		printf("both sides sleeping, ");
		measure(config, kind, flags, 0, depth);
	}
}

/* ---------------------------------------------------------------- by turns */

#define TURN_DEPTH 32

/* All that a turn of the engine serves: what callgrind is told to count. */
__attribute__((noinline)) static void engine_turn(struct engine *engine)
{
	thread_turn(engine->thread);
}

static double own_seconds(void)
{
	struct rusage self;

	getrusage(RUSAGE_THREAD, &self);
	return (double)(self.ru_utime.tv_sec + self.ru_stime.tv_sec) +
	       (double)(self.ru_utime.tv_usec + self.ru_stime.tv_usec) / 1e6;
}

static void by_turns(uint32_t flags, uint32_t type, bool packed, bool tracked)
{
	static _Alignas(4096) uint8_t region[8192];
	uint32_t rounds = 3000;
	struct engine *engine = engine_new_by_hand(VB_IO_AUTO);
	struct driver_config config = {.size = 128,
		.data_bytes = 4096,
		.indirect = true,
		.event_idx = true,
		.packed = packed,
		.alignment = 4096,
		.inflight = tracked ? region : NULL,
		.inflight_size = sizeof(region)};
	struct vb_disk *disk = disk_new(1, SIZE);
	int fd = file_new(false, SIZE), token;
	struct driver driver;
	struct guest guest;
	double cpu = 0;

	for (uint64_t at = 0; at < SIZE; at += 4096)
		CHECK_EQUAL(pwrite(fd, "x", 1, (off_t)at), 1);
	guest_init(&guest);
	disk_attach(engine, disk, guest.memory);
	disk_map(engine, disk, whole_file(fd, SIZE, flags | VB_EXTENT_READ | VB_EXTENT_WRITE));
	driver_init(&driver, &guest, &config);
	driver_start(&driver, engine, disk, 1);
	for (uint32_t round = 0; round < rounds; round++) {
		for (uint16_t i = 0; i < TURN_DEPTH; i++)
			driver_add(&driver, i, type, random_below(SIZE / 4096) * 8, 4096);
		driver_publish(&driver);
		cpu -= own_seconds();
		engine_turn(engine);
		cpu += own_seconds();
		while ((token = driver_reap(&driver, NULL)) >= 0)
			CHECK_EQUAL(*driver_status(&driver, (uint16_t)token), VIRTIO_BLK_S_OK);
	}
	printf("%u requests, %.3f us of CPU each\n", rounds * TURN_DEPTH, cpu * 1e6 / rounds / TURN_DEPTH);
	driver_stop(&driver);
	disk_detach(engine, disk);
	engine_delete(engine);
	vb_disk_unref(disk);
	driver_deinit(&driver);
	guest_deinit(&guest);
	close(fd);
}

TEST(bench_turn_null)
{
	by_turns(VB_EXTENT_NULL, VIRTIO_BLK_T_IN, false, false);
}

TEST(bench_turn_read)
{
	by_turns(VB_EXTENT_INLINE, VIRTIO_BLK_T_IN, false, false);
}

TEST(bench_turn_write)
{
	by_turns(VB_EXTENT_INLINE, VIRTIO_BLK_T_OUT, false, false);
}

TEST(bench_turn_packed_null)
{
	by_turns(VB_EXTENT_NULL, VIRTIO_BLK_T_IN, true, false);
}

TEST(bench_turn_packed_read)
{
	by_turns(VB_EXTENT_INLINE, VIRTIO_BLK_T_IN, true, false);
}

TEST(bench_turn_packed_write)
{
	by_turns(VB_EXTENT_INLINE, VIRTIO_BLK_T_OUT, true, false);
}

TEST(bench_turn_tracked_null)
{
	by_turns(VB_EXTENT_NULL, VIRTIO_BLK_T_IN, false, true);
}

TEST(bench_turn_tracked_read)
{
	by_turns(VB_EXTENT_INLINE, VIRTIO_BLK_T_IN, false, true);
}

TEST(bench_turn_tracked_write)
{
	by_turns(VB_EXTENT_INLINE, VIRTIO_BLK_T_OUT, false, true);
}

TEST(bench_turn_tracked_packed_null)
{
	by_turns(VB_EXTENT_NULL, VIRTIO_BLK_T_IN, true, true);
}

TEST(bench_turn_tracked_packed_read)
{
	by_turns(VB_EXTENT_INLINE, VIRTIO_BLK_T_IN, true, true);
}

TEST(bench_turn_tracked_packed_write)
{
	by_turns(VB_EXTENT_INLINE, VIRTIO_BLK_T_OUT, true, true);
}

/* ---------------------------------------------------------------- two threads */

TEST(bench_inline_tmpfs)
{
	all(VB_IO_AUTO, VB_EXTENT_INLINE);
}

TEST(bench_null)
{
	all(VB_IO_AUTO, VB_EXTENT_NULL);
}

TEST(bench_uring_tmpfs)
{
	all(VB_IO_AUTO, 0);
}

TEST(bench_threads_tmpfs)
{
	all(VB_IO_THREADS, 0);
}
