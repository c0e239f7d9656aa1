/* test_engine.c: threads, messages, and what they promise. */
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <stddef.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include "harness.h"

#define SIZE (1u << 20)
#define RW (VB_EXTENT_READ | VB_EXTENT_WRITE)

/* ---------------------------------------------------------------- the ring up is full */

static struct vb_message collected[20000];
static int collected_count;

static void collect(struct engine *engine, const struct vb_message *m)
{
	(void)engine;
	CHECK_EQUAL(m->type, VB_REQUEST);
	collected[collected_count++] = *m;
}

/* Nobody takes messages while four queues offer more misses than the ring has room for. */
TEST(a_full_ring_loses_nothing)
{
	struct engine *engine = engine_new(VB_IO_AUTO, 0);
	struct vb_disk *disk = disk_new(1, SIZE);
	struct driver_config config = {.size = 1024, .data_bytes = 512, .indirect = true, .event_idx = true};
	struct driver drivers[4];
	struct guest guest;
	struct vb_message revoke = {.type = VB_REVOKE, .disk = (uint64_t)disk, .length = SIZE};
	uint64_t cookies[500], end = now_ns() + DEADLINE, in_flight;
	int finished = 0;

	engine->on_message = collect;
	guest_init(&guest);
	disk_attach(engine, disk, guest.memory);
	for (uint32_t i = 0; i < 4; i++) {
		driver_init(&drivers[i], &guest, &config);
		driver_start(&drivers[i], engine, disk, i);
	}
	for (int i = 0; i < 4; i++) {
		for (uint16_t token = 0; token < 1024; token++)
			driver_add(&drivers[i], token, VIRTIO_BLK_T_IN, 0, 512);
		driver_publish(&drivers[i]);
	}
	/* It stops popping before the ring is quite full. */
	do {
		CHECK(now_ns() < end);
		in_flight = 0;
		for (int i = 0; i < 4; i++)
			in_flight += load_relaxed(&drivers[i].stats->in_flight);
	} while (in_flight < 3000);
	/* Commands still find room for their answers, as many as are promised. */
	for (int i = 0; i < 500; i++)
		cookies[i] = engine_send(engine, revoke);
	CHECK_EQUAL(collected_count, 0);
	for (int i = 0; i < 500; i++)
		CHECK_EQUAL(engine_wait(engine, cookies[i]).result, 0);
	engine_until(engine, collected_count == 4 * 1024);
	for (int i = 0; i < collected_count; i++)
		engine_tell(engine, (struct vb_message){.type = VB_COMPLETE, .cookie = collected[i].cookie});
	while (finished < 4 * 1024) {
		CHECK(now_ns() < end);
		for (int i = 0; i < 4; i++)
			while (driver_reap(&drivers[i], NULL) >= 0)
				finished++;
		engine_pump(engine, 0);
	}
	for (int i = 0; i < 4; i++) {
		CHECK_EQUAL(driver_stop(&drivers[i]), 1024);
		driver_deinit(&drivers[i]);
	}
	disk_detach(engine, disk);
	engine_delete(engine);
	vb_disk_unref(disk);
	guest_deinit(&guest);
}

static void answer_collected(struct engine *engine)
{
	for (int i = 0; i < collected_count; i++)
		engine_tell(engine, (struct vb_message){.type = VB_COMPLETE, .cookie = collected[i].cookie});
	collected_count = 0;
}

/* What a driver can make us hold does not grow with its ring. */
TEST(a_long_ring_waits_for_what_was_popped)
{
	struct driver_config config = {.size = 4096, .data_bytes = 512, .indirect = true, .event_idx = true};
	struct stand *s = stand_new(VB_IO_AUTO, 0, SIZE, &config);
	struct vb_message revoke = {.type = VB_REVOKE, .disk = (uint64_t)s->disk, .length = SIZE};
	int finished = 0;

	s->engine->on_message = collect;
	for (uint16_t token = 0; token < 4096; token++)
		driver_add(&s->driver, token, VIRTIO_BLK_T_IN, 0, 512);
	driver_publish(&s->driver);
	driver_start(&s->driver, s->engine, s->disk, 1);
	for (int round = 1; round <= 4; round++) {
		engine_until(s->engine, collected_count == 1024);
		/* An answer to a command says that all there was to pop has been popped. */
		for (int i = 0; i < 20; i++)
			CHECK_EQUAL(engine_command(s->engine, revoke).result, 0);
		CHECK_EQUAL(collected_count, 1024);
		CHECK_EQUAL(load_relaxed(&s->driver.stats->in_flight), 1024);
		answer_collected(s->engine);
		for (uint64_t end = now_ns() + DEADLINE; finished < 1024 * round;) {
			CHECK(now_ns() < end);
			finished += driver_reap(&s->driver, NULL) >= 0;
		}
	}
	CHECK_EQUAL(driver_stop(&s->driver), 4096);
	stand_delete(s);
}

/* Each queue has room for its breakage put aside in the ring up: they must not use up what commands need. */
TEST(queues_beyond_a_number_are_refused_and_the_thread_goes_on)
{
	struct driver_config config = {.size = 8, .data_bytes = 512};
	struct stand *s = stand_new(VB_IO_AUTO, 0, SIZE, &config);
	struct vb_queue_config queue;
	struct vb_message start = {.type = VB_QUEUE_START, .disk = (uint64_t)s->disk, .pointer = (uint64_t)&queue};
	uint32_t started = 0;
	int result = 0;

	driver_start(&s->driver, s->engine, s->disk, 0);
	disk_map(s->engine, s->disk, whole_file(-1, SIZE, RW | VB_EXTENT_NULL));
	queue = driver_queue_config(&s->driver);
	queue.enabled = 0;
	queue.kick_fd = -1;
	while (!result && started < 10000) {
		start.queue = started + 1;
		result = engine_command(s->engine, start).result;
		started += !result;
	}
	CHECK_EQUAL(result, -ENOSPC);
	CHECK_EQUAL(started, 1023); /* and the driver's own */
	CHECK_EQUAL(driver_do(&s->driver, VIRTIO_BLK_T_OUT, 0, 512, NULL), VIRTIO_BLK_S_OK);
	for (; started; started--)
		CHECK_EQUAL(
			engine_command(s->engine, (struct vb_message){.type = VB_QUEUE_STOP, .queue = started}).result,
			0);
	stand_delete(s);
}

/* The wish to be kicked is in guest memory, so it does not move to another mapping with the queue. */
TEST(kicks_are_asked_for_anew_in_new_memory)
{
	struct driver_config config = {.size = 8, .data_bytes = 512, .event_idx = true};
	struct stand *s = stand_new(VB_IO_AUTO, 0, SIZE, &config);
	struct vb_message set = {.type = VB_MEMORY_SET, .disk = (uint64_t)s->disk};
	uint16_t *avail_event;

	disk_map(s->engine, s->disk, whole_file(-1, SIZE, RW | VB_EXTENT_NULL));
	driver_start(&s->driver, s->engine, s->disk, 1);
	avail_event = (uint16_t *)&s->driver.used->ring[config.size];
	CHECK_EQUAL(driver_do(&s->driver, VIRTIO_BLK_T_IN, 0, 512, NULL), VIRTIO_BLK_S_OK);
	engine_until(s->engine, load_acquire(avail_event) == 1);
	store_release(avail_event, 77); /* as if the other memory had never seen this ring */
	set.pointer = (uint64_t)s->guest.memory;
	CHECK_EQUAL(engine_command(s->engine, set).result, 0);
	engine_until(s->engine, load_acquire(avail_event) == 1);
	CHECK_EQUAL(driver_do(&s->driver, VIRTIO_BLK_T_IN, 0, 512, NULL), VIRTIO_BLK_S_OK);
	stand_delete(s);
}

TEST(commands_beyond_the_ring_are_told_so_and_all_answered)
{
	struct engine *engine = engine_new(VB_IO_AUTO, 0);
	struct vb_message batch[512], received[512];
	uint32_t alike;
	int sent = 0, answered = 0, taken, count;
	uint64_t end = now_ns() + DEADLINE;

	memset(batch, 0, sizeof(batch));
	/* Fill both rings: the engine takes commands only while it can answer. */
	while (sent < 8000) {
		CHECK(now_ns() < end);
		taken = vb_thread_send(engine->thread, batch, 512);
		sent += taken;
	}
	while (answered < sent) {
		CHECK(now_ns() < end);
		count = vb_thread_receive(engine->thread, received, 512, &alike);
		for (int i = 0; i < count; i++)
			CHECK_EQUAL(received[i].result, -EINVAL); /* there is no command 0 */
		answered += count;
	}
	CHECK_EQUAL(vb_thread_receive(engine->thread, received, 512, &alike), 0);
	engine_delete(engine);
}

/* ---------------------------------------------------------------- orders and refusals */

TEST(what_is_in_use_cannot_be_forgotten)
{
	struct driver_config config = {.size = 8, .data_bytes = 512};
	struct stand *s = stand_new(VB_IO_AUTO, 0, SIZE, &config);
	struct vb_message detach = {.type = VB_DISK_DETACH, .disk = (uint64_t)s->disk};
	struct vb_message attach = {.type = VB_DISK_ATTACH, .disk = (uint64_t)s->disk};
	struct vb_message detach_unknown = {.type = VB_DISK_DETACH, .disk = (uint64_t)&detach};

	CHECK_EQUAL(engine_command(s->engine, detach_unknown).result, -ENOENT);
	CHECK_EQUAL(engine_command(s->engine, attach).result, -EEXIST);
	CHECK_EQUAL(vb_thread_destroy(s->engine->thread), -EBUSY);
	driver_start(&s->driver, s->engine, s->disk, 1);
	CHECK_EQUAL(engine_command(s->engine, detach).result, -EBUSY);
	CHECK_EQUAL(engine_command(s->engine, (struct vb_message){.type = VB_QUEUE_STOP, .queue = 2}).result, -ENOENT);
	driver_stop(&s->driver);
	CHECK_EQUAL(engine_command(s->engine, (struct vb_message){.type = VB_QUEUE_STOP, .queue = 1}).result, -ENOENT);
	stand_delete(s);
}

TEST(disabled_queues_pop_nothing_until_enabled)
{
	struct driver_config config = {.size = 8, .data_bytes = 512};
	struct stand *s = stand_new(VB_IO_AUTO, 0, SIZE, &config);
	int fd = file_new(false, SIZE);
	struct vb_message enable = {.type = VB_QUEUE_ENABLE, .queue = 1};

	disk_map(s->engine, s->disk, whole_file(fd, SIZE, RW | VB_EXTENT_INLINE));
	driver_start(&s->driver, s->engine, s->disk, 1);
	engine_command(s->engine, enable);
	driver_add(&s->driver, 0, VIRTIO_BLK_T_IN, 0, 512);
	driver_publish(&s->driver);
	for (int i = 0; i < 20; i++)
		engine_command(s->engine, enable);
	CHECK_EQUAL(driver_reap(&s->driver, NULL), -1);
	enable.flags = 1;
	engine_command(s->engine, enable);
	engine_until(s->engine, driver_reap(&s->driver, NULL) == 0);
	stand_delete(s);
	close(fd);
}

TEST(idle_threads_use_no_cpu)
{
	struct driver_config config = {.size = 8, .data_bytes = 512, .event_idx = true};
	struct stand *s = stand_new(VB_IO_AUTO, 32000, SIZE, &config);
	struct rusage before, after;
	int fd = file_new(false, SIZE);
	struct pollfd never = {.fd = vb_thread_fd(s->engine->thread), .events = POLLIN};

	disk_map(s->engine, s->disk, whole_file(fd, SIZE, RW));
	driver_start(&s->driver, s->engine, s->disk, 1);
	for (int i = 0; i < 100; i++)
		CHECK_EQUAL(driver_do(&s->driver, VIRTIO_BLK_T_IN, 0, 512, NULL), 0);
	/* It has to be given the time in which it might do something. */
	getrusage(RUSAGE_SELF, &before);
	CHECK_EQUAL(poll(&never, 1, 300), 0);
	getrusage(RUSAGE_SELF, &after);
	CHECK(after.ru_nvcsw - before.ru_nvcsw < 20);
	CHECK(after.ru_utime.tv_sec * 1000000 + after.ru_utime.tv_usec - before.ru_utime.tv_sec * 1000000 -
			before.ru_utime.tv_usec <
		30000);
	stand_delete(s);
	close(fd);
}

/* A driver that adds the next chain as soon as it has the last one back does so before the engine has asked for kicks
 * again: the engine has to look once more before it sleeps. */
static void no_kick_is_lost(bool event_idx)
{
	struct driver_config config = {.size = 8, .data_bytes = 512, .event_idx = event_idx};
	struct stand *s = stand_new(VB_IO_AUTO, 0, SIZE, &config);
	uint64_t end = now_ns() + DEADLINE;

	disk_map(s->engine, s->disk, whole_file(-1, SIZE, RW | VB_EXTENT_NULL));
	driver_start(&s->driver, s->engine, s->disk, 1);
	for (int i = 0; i < 30000; i++) {
		driver_add(&s->driver, 0, VIRTIO_BLK_T_IN, 0, 512);
		driver_publish(&s->driver);
		while (driver_reap(&s->driver, NULL) < 0)
			CHECK(now_ns() < end);
	}
	stand_delete(s);
}

TEST(no_kick_is_lost_between_the_last_look_and_the_sleep)
{
	no_kick_is_lost(false);
	no_kick_is_lost(true);
}

/* ---------------------------------------------------------------- no io_uring */

static void forbid_io_uring(int error)
{
	struct sock_filter filter[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_io_uring_setup, 0, 1),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | (unsigned)error),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
	};
	struct sock_fprog program = {.len = 4, .filter = filter};

	CHECK_EQUAL(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
	CHECK_EQUAL(prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program), 0);
}

/* As default container profiles do. */
TEST(where_io_uring_is_forbidden_threads_do_the_work)
{
	struct vb_thread_options options = {.io_kind = VB_IO_URING};
	struct vb_thread *thread;
	struct driver_config config = {.size = 8, .data_bytes = 4096};
	struct stand *s;
	struct vb_io *io;
	int fd = file_new(true, SIZE);
	struct vb_message set = {.type = VB_MEMORY_SET, .flags = 1};

	forbid_io_uring(EPERM);
#ifndef VB_NO_URING
	CHECK_EQUAL(vb_io_uring_error(), -EPERM);
	CHECK_EQUAL(vb_thread_create(&options, &thread), -EPERM);
	CHECK_EQUAL(vb_io_create(VB_IO_URING, 8, 0, &io), -EPERM);
#else
	CHECK_EQUAL(vb_io_uring_error(), -ENOTSUP);
	CHECK_EQUAL(vb_thread_create(&options, &thread), -ENOTSUP);
#endif
	CHECK_EQUAL(vb_io_create(VB_IO_AUTO, 8, 0, &io), 0);
	CHECK_EQUAL(vb_io_kind(io), VB_IO_THREADS);
	vb_io_destroy(io);
	s = stand_new(VB_IO_AUTO, 0, SIZE, &config);
	CHECK_EQUAL(vb_thread_io_kind(s->engine->thread), VB_IO_THREADS);
	set.disk = (uint64_t)s->disk;
	set.pointer = (uint64_t)s->guest.memory;
	CHECK_EQUAL(engine_command(s->engine, set).aux, 0);
	disk_map(s->engine, s->disk, whole_file(fd, SIZE, RW | VB_EXTENT_FIXED));
	driver_start(&s->driver, s->engine, s->disk, 1);
	memset(driver_data(&s->driver, 0), 0x33, 4096);
	CHECK_EQUAL(driver_do(&s->driver, VIRTIO_BLK_T_OUT, 8, 4096, NULL), 0);
	memset(driver_data(&s->driver, 0), 0, 4096);
	CHECK_EQUAL(driver_do(&s->driver, VIRTIO_BLK_T_IN, 8, 4096, NULL), 0);
	CHECK_EQUAL(driver_data(&s->driver, 0)[4095], 0x33);
	stand_delete(s);
	close(fd);
}

/* ---------------------------------------------------------------- pinned memory and its limit */

#define PIECE (1u << 18)

/* Become somebody whose locked memory is counted, and is nobody else's. */
static void lock_no_more_than(uint64_t bytes)
{
	struct rlimit limit = {bytes, bytes};
	uid_t uid = 0x40000000u + (uid_t)getpid();

	CHECK_EQUAL(setrlimit(RLIMIT_MEMLOCK, &limit), 0);
	if (!geteuid())
		CHECK_EQUAL(setresuid(uid, uid, uid), 0);
	prctl(PR_SET_DUMPABLE, 1, 0, 0, 0); /* LeakSanitizer looks at us */
}

static uint64_t register_memory(struct engine *engine, struct vb_disk *disk, uint8_t *const *pieces, uint32_t count)
{
	struct vb_region regions[4];
	struct vb_message set = {.type = VB_MEMORY_SET, .flags = 1, .disk = (uint64_t)disk}, ack;
	struct vb_memory *memory;

	for (uint32_t i = 0; i < count; i++)
		regions[i] = (struct vb_region){(uint64_t)i * PIECE, (uint64_t)i * PIECE, PIECE, (uint64_t)pieces[i]};
	CHECK_EQUAL(vb_memory_create(regions, count, &memory), 0);
	set.pointer = (uint64_t)memory;
	ack = engine_command(engine, set);
	CHECK_EQUAL(ack.result, 0);
	vb_memory_unref(memory);
	return ack.aux;
}

/* Twice as much as there is would be over the limit, whether the old map goes on in the new one or not. */
TEST(memory_that_is_pinned_counts_once_when_the_map_changes)
{
	struct vb_disk *disk = disk_new(1, SIZE);
	struct engine *engine;
	uint8_t *pieces[4];

	for (int i = 0; i < 4; i++) {
		pieces[i] = mmap(NULL, PIECE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
		CHECK(pieces[i] != MAP_FAILED);
	}
	lock_no_more_than(3 * (uint64_t)PIECE + PIECE / 2);
	engine = engine_new(VB_IO_AUTO, 0);
	disk_attach(engine, disk, NULL);
	if (!register_memory(engine, disk, pieces, 2))
		skip("no registered buffers here");
	CHECK_EQUAL(register_memory(engine, disk, pieces, 3), 3);     /* one more */
	CHECK_EQUAL(register_memory(engine, disk, pieces + 1, 2), 2); /* one less */
	CHECK_EQUAL(register_memory(engine, disk, pieces + 1, 3), 3);
	CHECK_EQUAL(register_memory(engine, disk, pieces, 4), 3); /* too many: the rest is used all the same */
	disk_detach(engine, disk);
	engine_delete(engine);
	vb_disk_unref(disk);
	for (int i = 0; i < 4; i++)
		munmap(pieces[i], PIECE);
}
