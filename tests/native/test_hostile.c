/* test_hostile.c: drivers and front-ends that break the rules cost themselves a queue, and nobody else anything. */
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include "harness.h"

#define SIZE (1u << 20)
#define RW (VB_EXTENT_READ | VB_EXTENT_WRITE)

/* A victim whose ring the tests spoil, and a witness on the same thread and disk that must not notice. */
static struct arena {
	struct engine *engine;
	struct guest guest, other;
	struct driver victim, witness;
	struct vb_disk *disk, *witness_disk;
	int fd;
	int broken; /* messages */
	struct vb_message last;
	int requests;
	struct vb_message request;
} arena;

static void note(struct engine *engine, const struct vb_message *m)
{
	(void)engine;
	if (m->type == VB_QUEUE_BROKEN) {
		arena.broken++;
		arena.last = *m;
	} else if (m->type == VB_REQUEST) {
		arena.requests++;
		arena.request = *m;
	} else {
		CHECK_EQUAL(m->type, VB_IO_ERROR);
	}
}

static void arena_up(bool indirect, enum vb_io_kind kind)
{
	struct driver_config config = {.size = 8, .data_bytes = 4096, .indirect = indirect};

	memset(&arena, 0, sizeof(arena));
	arena.engine = engine_new(kind, 0);
	arena.engine->on_message = note;
	guest_init(&arena.guest);
	guest_init(&arena.other);
	arena.fd = file_new(false, SIZE);
	arena.disk = disk_new(1, SIZE);
	arena.witness_disk = disk_new(2, SIZE);
	disk_attach(arena.engine, arena.disk, arena.guest.memory);
	disk_attach(arena.engine, arena.witness_disk, arena.other.memory);
	disk_map(arena.engine, arena.disk, whole_file(arena.fd, SIZE, RW | VB_EXTENT_INLINE));
	disk_map(arena.engine, arena.witness_disk, whole_file(arena.fd, SIZE, RW | VB_EXTENT_INLINE));
	driver_init(&arena.victim, &arena.guest, &config);
	driver_init(&arena.witness, &arena.other, &config);
	driver_start(&arena.victim, arena.engine, arena.disk, 1);
	driver_start(&arena.witness, arena.engine, arena.witness_disk, 2);
}

static void arena_down(void)
{
	CHECK_EQUAL(driver_do(&arena.witness, VIRTIO_BLK_T_OUT, 3, 4096, NULL), VIRTIO_BLK_S_OK);
	CHECK_EQUAL(driver_do(&arena.witness, VIRTIO_BLK_T_IN, 3, 4096, NULL), VIRTIO_BLK_S_OK);
	driver_stop(&arena.victim);
	driver_stop(&arena.witness);
	disk_detach(arena.engine, arena.disk);
	disk_detach(arena.engine, arena.witness_disk);
	engine_delete(arena.engine);
	vb_disk_unref(arena.disk);
	vb_disk_unref(arena.witness_disk);
	driver_deinit(&arena.victim);
	driver_deinit(&arena.witness);
	guest_deinit(&arena.guest);
	guest_deinit(&arena.other);
	close(arena.fd);
}

/* What was published breaks the victim's queue; then a stop and a start with good contents mend it. */
static void expect_broken_at(int line, enum vb_broken reason)
{
	struct driver *d = &arena.victim;
	eventfd_t signalled = 0;

	uint64_t end = now_ns() + DEADLINE;

	while (!arena.broken && now_ns() < end)
		engine_pump(arena.engine, 1);
	if (arena.last.result != (int)reason) {
		fprintf(stderr, "line %d: broken for reason %d and not %d\n", line, arena.last.result, (int)reason);
		exit(1);
	}
	CHECK_EQUAL(arena.broken, 1);
	CHECK_EQUAL(arena.last.queue, 1);
	CHECK_EQUAL(arena.last.disk, 1);
	CHECK_EQUAL(eventfd_read(d->err_fd, &signalled), 0);
	CHECK_EQUAL(signalled, 1);
	CHECK_EQUAL(driver_do(&arena.witness, VIRTIO_BLK_T_IN, 0, 512, NULL), VIRTIO_BLK_S_OK);
	driver_stop(d);
	d->config.start = d->avail_idx = d->published = d->used_idx = 0;
	memset(d->avail, 0, 6 + 2u * d->config.size);
	memset(d->used, 0, 6 + 8u * d->config.size);
	driver_start(d, arena.engine, arena.disk, 1);
	CHECK_EQUAL(driver_do(d, VIRTIO_BLK_T_IN, 0, 512, NULL), VIRTIO_BLK_S_OK);
	CHECK_EQUAL(arena.broken, 1);
	arena.broken = 0;
	arena.last.result = 0;
}

#define expect_broken(reason) expect_broken_at(__LINE__, reason)

static uint64_t header_gpa(void)
{
	return driver_gpa(&arena.victim, driver_status(&arena.victim, 0)) - 16;
}

static uint64_t status_gpa(void)
{
	return driver_gpa(&arena.victim, driver_status(&arena.victim, 0));
}

static void offer(uint16_t head)
{
	driver_offer(&arena.victim, head);
	driver_publish(&arena.victim);
	if (arena.victim.kick_fd >= 0)
		eventfd_write(arena.victim.kick_fd, 1);
}

#define NEXT VRING_DESC_F_NEXT
#define WRITE VRING_DESC_F_WRITE
#define INDIRECT VRING_DESC_F_INDIRECT

static void set(int index, uint64_t addr, uint32_t len, uint16_t flags, uint16_t next)
{
	arena.victim.desc[index] = (struct vring_desc){addr, len, flags, next};
}

/* below, beyond, across the end, wrapping */
static const uint64_t outside[] = {GUEST_GPA - 1, GUEST_GPA + 2 * (uint64_t)GUEST_REGION,
	GUEST_GPA + 2 * (uint64_t)GUEST_REGION - 8, UINT64_MAX - 7};

static void expect_failed(void)
{
	struct driver *d = &arena.victim;
	uint32_t written;

	*driver_status(d, 0) = 0xff;
	offer(0);
	engine_until(arena.engine, driver_reap(d, &written) == 0);
	CHECK_EQUAL(written, 1);
	CHECK_EQUAL(*driver_status(d, 0), VIRTIO_BLK_S_IOERR);
}

TEST(buffers_outside_of_memory_cost_their_request)
{
	struct driver *d = &arena.victim;
	char *header, *data;
	uint64_t at;

	arena_up(false, VB_IO_AUTO);
	header = (char *)driver_status(d, 0) - 16;
	at = guest_alloc(&arena.guest, 512, 16);
	data = guest_at(&arena.guest, at);
	memset(data, '#', 512);
	for (int i = 0; i < 4; i++) {
		memset(header, 0, 16);
		/* header */
		set(0, outside[i], 16, NEXT, 1);
		set(1, status_gpa(), 1, WRITE, 0);
		expect_failed();
		/* data of a read: what is in memory of it stays as it is */
		set(0, header_gpa(), 16, NEXT, 1);
		set(1, GUEST_GPA + at, 512, NEXT | WRITE, 2);
		set(2, outside[i], 512, NEXT | WRITE, 3);
		set(3, status_gpa(), 1, WRITE, 0);
		expect_failed();
		CHECK_EQUAL(data[0], '#');
		/* data of a write */
		header[0] = VIRTIO_BLK_T_OUT;
		set(1, outside[i], 512, NEXT, 2);
		set(2, status_gpa(), 1, WRITE, 0);
		expect_failed();
	}
	set(0, header_gpa(), 0xffffffff, NEXT, 1);
	set(1, status_gpa(), 1, WRITE, 0);
	expect_failed();
	CHECK_EQUAL(arena.broken, 0);
	CHECK_EQUAL(driver_do(d, VIRTIO_BLK_T_IN, 0, 512, NULL), VIRTIO_BLK_S_OK);
	arena_down();
}

TEST(broken_rings)
{
	struct driver *d = &arena.victim;

	arena_up(false, VB_IO_AUTO);
	/* avail.idx */
	d->avail_idx += 9;
	driver_publish(d);
	eventfd_write(d->kick_fd, 1);
	expect_broken(VB_BROKEN_AVAIL_IDX);
	d->avail_idx -= 1;
	driver_publish(d);
	eventfd_write(d->kick_fd, 1);
	expect_broken(VB_BROKEN_AVAIL_IDX);
	/* heads */
	offer(8);
	expect_broken(VB_BROKEN_HEAD);
	offer(65535);
	expect_broken(VB_BROKEN_HEAD);
	/* loops */
	set(0, header_gpa(), 16, NEXT, 0);
	offer(0);
	expect_broken(VB_BROKEN_CHAIN_LOOP);
	for (int i = 0; i < 8; i++)
		set(i, header_gpa(), 16, NEXT, (uint16_t)((i + 1) % 8));
	offer(3);
	expect_broken(VB_BROKEN_CHAIN_LOOP);
	/* next */
	set(0, header_gpa(), 16, NEXT, 8);
	offer(0);
	expect_broken(VB_BROKEN_CHAIN_NEXT);
	/* indirect, not negotiated */
	set(0, header_gpa(), 32, INDIRECT, 0);
	offer(0);
	expect_broken(VB_BROKEN_INDIRECT);
	/* the status is not in memory: nobody can be told */
	for (int i = 0; i < 4; i++) {
		set(0, header_gpa(), 16, NEXT, 1);
		set(1, header_gpa(), 16, NEXT | WRITE, 2);
		set(2, outside[i], 16, WRITE, 0);
		offer(0);
		expect_broken(VB_BROKEN_ADDRESS);
	}
	/* order, also by an empty descriptor */
	set(0, status_gpa(), 1, NEXT | WRITE, 1);
	set(1, header_gpa(), 16, 0, 0);
	offer(0);
	expect_broken(VB_BROKEN_ORDER);
	set(0, status_gpa(), 0, NEXT | WRITE, 1);
	set(1, header_gpa(), 16, 0, 0);
	offer(0);
	expect_broken(VB_BROKEN_ORDER);
	/* nowhere to put the status */
	set(0, header_gpa(), 16, 0, 0);
	offer(0);
	expect_broken(VB_BROKEN_NO_STATUS);
	set(0, header_gpa(), 16, NEXT, 1);
	set(1, status_gpa(), 0, WRITE, 0);
	offer(0);
	expect_broken(VB_BROKEN_NO_STATUS);
	arena_down();
}

TEST(broken_indirect_tables)
{
	struct driver *d = &arena.victim;
	struct vring_desc *table;
	uint64_t at, gpa;

	arena_up(true, VB_IO_AUTO);
	at = guest_alloc(&arena.guest, 200 * 16, 16);
	gpa = GUEST_GPA + at;
	table = guest_at(&arena.guest, at);
	table[0] = (struct vring_desc){header_gpa(), 16, NEXT, 1};
	table[1] = (struct vring_desc){status_gpa(), 1, WRITE, 0};
	for (int i = 0; i < 5; i++) {
		uint32_t bad[] = {0, 15, 17, 131 * 16, 0xfffffff0};

		set(0, gpa, bad[i], INDIRECT, 0);
		offer(0);
		expect_broken(VB_BROKEN_INDIRECT);
	}
	set(0, gpa, 32, INDIRECT | NEXT, 1);
	offer(0);
	expect_broken(VB_BROKEN_INDIRECT);
	set(0, GUEST_GPA - 16, 32, INDIRECT, 0);
	offer(0);
	expect_broken(VB_BROKEN_ADDRESS);
	table[0].flags = INDIRECT;
	set(0, gpa, 32, INDIRECT, 0);
	offer(0);
	expect_broken(VB_BROKEN_INDIRECT);
	table[0] = (struct vring_desc){header_gpa(), 16, NEXT, 2};
	set(0, gpa, 32, INDIRECT, 0);
	offer(0);
	expect_broken(VB_BROKEN_CHAIN_NEXT);
	table[0].next = 0;
	set(0, gpa, 32, INDIRECT, 0);
	offer(0);
	expect_broken(VB_BROKEN_CHAIN_LOOP);
	/* What is legal: direct descriptors first, WRITE on the one that is indirect, tables at odd addresses. */
	set(0, header_gpa(), 16, NEXT, 1);
	set(1, gpa + 3, 16, INDIRECT | WRITE, 0);
	memcpy((char *)table + 3, &(struct vring_desc){status_gpa(), 1, WRITE, 0}, 16);
	memset((char *)driver_status(d, 0) - 16, 0, 16);
	((struct virtio_blk_outhdr *)(driver_status(d, 0) - 16))->type = VIRTIO_BLK_T_IN;
	*driver_status(d, 0) = 0xff;
	offer(0);
	engine_until(arena.engine, driver_reap(d, NULL) == 0);
	CHECK_EQUAL(*driver_status(d, 0), VIRTIO_BLK_S_OK);
	arena_down();
}

TEST(a_driver_that_offers_more_than_the_ring_has_is_broken_but_gets_its_answers)
{
	struct driver *d = &arena.victim;
	struct vb_message revoke = {.type = VB_REVOKE, .length = SIZE};

	arena_up(true, VB_IO_AUTO);
	revoke.disk = (uint64_t)arena.disk;
	engine_command(arena.engine, revoke);
	for (uint16_t i = 0; i < 8; i++)
		driver_add(d, i, VIRTIO_BLK_T_IN, 0, 512);
	driver_publish(d);
	eventfd_write(d->kick_fd, 1);
	engine_until(arena.engine, arena.requests == 8);
	driver_add(d, 0, VIRTIO_BLK_T_IN, 0, 512);
	driver_publish(d);
	eventfd_write(d->kick_fd, 1);
	engine_until(arena.engine, arena.broken == 1);
	CHECK_EQUAL(arena.last.result, VB_BROKEN_AVAIL_IDX);
	engine_tell(arena.engine, (struct vb_message){.type = VB_COMPLETE, .cookie = arena.request.cookie});
	engine_until(arena.engine, driver_reap(d, NULL) >= 0);
	/* The stop waits for the other seven. */
	{
		uint64_t stop = engine_send(arena.engine, (struct vb_message){.type = VB_QUEUE_STOP, .queue = 1});

		engine_command(arena.engine, revoke);
		CHECK(!engine_acked(arena.engine, stop));
		for (uint64_t i = 0; i < 8; i++)
			engine_tell(arena.engine,
				(struct vb_message){.type = VB_COMPLETE, .cookie = (arena.request.cookie & ~7ull) | i});
		engine_wait(arena.engine, stop);
	}
	d->config.start = d->avail_idx = d->used_idx = 0;
	d->avail->idx = d->used->idx = 0;
	driver_start(d, arena.engine, arena.disk, 1);
	arena_down();
}

TEST(rings_outside_of_memory_are_refused)
{
	struct vb_queue_config good, bad;
	struct vb_message start = {.type = VB_QUEUE_START, .queue = 7};

	arena_up(false, VB_IO_AUTO);
	good = driver_queue_config(&arena.victim);
	good.kick_fd = -1;
	start.disk = (uint64_t)arena.disk;
	start.pointer = (uint64_t)&bad;
	for (int i = 0; i < 9; i++) {
		int expected = -EFAULT;

		bad = good;
		switch (i) {
		case 0:
			bad.desc_uva += 8;
			break;
		case 1:
			bad.avail_uva += 1;
			break;
		case 2:
			bad.used_uva += 2;
			break;
		case 3:
			bad.desc_uva = GUEST_UVA + GUEST_REGION - 16 * 7;
			break;
		case 4:
			bad.used_uva = UINT64_MAX - 3;
			break;
		case 5:
			bad.avail_uva = 0;
			break;
		case 6:
			bad.size = 12;
			expected = -EINVAL;
			break;
		case 7:
			bad.size = 65536;
			expected = -EINVAL;
			break;
		case 8:
			bad.kick_fd = arena.fd;
			expected = -EPERM;
			break;
		}
		CHECK_EQUAL(engine_command(arena.engine, start).result, expected);
	}
	start.queue = 1;
	CHECK_EQUAL(engine_command(arena.engine, start).result, -EEXIST);
	arena_down();
}

TEST(rings_that_a_new_memory_map_lacks_break_the_queue)
{
	struct vb_message set = {.type = VB_MEMORY_SET};

	arena_up(false, VB_IO_AUTO);
	set.disk = (uint64_t)arena.disk;
	CHECK_EQUAL(engine_command(arena.engine, set).result, 0);
	engine_until(arena.engine, arena.broken == 1);
	CHECK_EQUAL(arena.last.result, VB_BROKEN_RING_ADDRESS);
	CHECK_EQUAL(vb_memory_refs(arena.guest.memory), 1);
	arena_down();
}

TEST(more_regions_than_can_be_guarded_are_refused)
{
	enum { MANY = 16384 };
	struct vb_region *regions = calloc(MANY + 1, sizeof(*regions));
	struct vb_memory *memory, *same, *other;

	CHECK(regions);
	/* Nobody touches them, so they need not be there. */
	for (uint64_t i = 0; i <= MANY; i++)
		regions[i] = (struct vb_region){i << 20, i << 20, 4096, (uint64_t)1 << 46 | i << 20};
	CHECK_EQUAL(vb_memory_create(regions, MANY + 1, &memory), -ENOSPC);
	for (int round = 0; round < 2; round++) {
		CHECK_EQUAL(vb_memory_create(regions, MANY, &memory), 0);
		CHECK_EQUAL(vb_memory_create(regions + 100, MANY - 100, &same), 0);
		CHECK_EQUAL(vb_memory_create(&regions[MANY], 1, &other), -ENOSPC);
		vb_memory_unref(memory);
		CHECK_EQUAL(vb_memory_create(&regions[MANY], 1, &other), 0);
		vb_memory_unref(same);
		vb_memory_unref(other);
	}
	free(regions);
}

/* ---------------------------------------------------------------- memory that goes away */

/* ThreadSanitizer holds locks of its own during an access that it watches, and a handler that runs because of that
 * access needs them too. */
static void skip_under_thread_sanitizer(void)
{
#ifdef __has_feature
#if __has_feature(thread_sanitizer)
	skip("ThreadSanitizer cannot watch what a SIGBUS handler does");
#endif
#endif
}

static void truncate_memory(enum vb_io_kind kind, uint32_t flags, off_t keep, bool rings_gone)
{
	struct driver *d = &arena.victim;
	struct vb_message stop = {.type = VB_QUEUE_STOP, .queue = 1};

	arena_up(false, kind);
	CHECK_EQUAL(driver_do(d, VIRTIO_BLK_T_OUT, 0, 4096, NULL), VIRTIO_BLK_S_OK);
	disk_map(arena.engine, arena.disk, whole_file(arena.fd, SIZE, RW | flags));
	driver_add(d, 0, VIRTIO_BLK_T_IN, 0, 4096);
	if (!rings_gone)
		driver_publish(d);
	CHECK_EQUAL(ftruncate(arena.guest.memfd, keep), 0);
	CHECK_EQUAL(eventfd_write(d->kick_fd, 1), 0);
	if (rings_gone) {
		engine_until(arena.engine, arena.broken == 1);
		CHECK_EQUAL(arena.last.result, VB_BROKEN_MEMORY_FAULT);
		CHECK(vb_memory_faulted(arena.guest.memory));
	}
	CHECK(!vb_memory_faulted(arena.other.memory));
	CHECK_EQUAL(driver_do(&arena.witness, VIRTIO_BLK_T_IN, 0, 512, NULL), VIRTIO_BLK_S_OK);
	CHECK_EQUAL(engine_command(arena.engine, stop).result, 0);
	/* So that arena_down finds a queue to stop. */
	ftruncate(arena.guest.memfd, 2 * GUEST_REGION);
	d->config.start = 0;
	memset(d->avail, 0, 4);
	driver_start(d, arena.engine, arena.disk, 1);
	arena_down();
}

TEST(truncated_memory_costs_the_front_end_its_queue)
{
	skip_under_thread_sanitizer();
	truncate_memory(VB_IO_AUTO, VB_EXTENT_INLINE, 0, true);
	truncate_memory(VB_IO_AUTO, 0, 0, true);
	truncate_memory(VB_IO_THREADS, 0, 0, true);
}

static void *truncate_soon(void *opaque)
{
	struct guest *guest = opaque;

	for (int i = 0; i < 100; i++)
		sched_yield();
	ftruncate(guest->memfd, 4096);
	return NULL;
}

/* A front-end that truncates its memory while the engine works in it: whatever is hit first, nobody else notices. */
static void truncate_under_load(enum vb_io_kind kind, uint32_t flags)
{
	struct driver *d = &arena.victim;
	pthread_t thread;
	uint64_t end = now_ns() + DEADLINE;

	arena_up(false, kind);
	disk_map(arena.engine, arena.disk, whole_file(arena.fd, SIZE, RW | flags));
	CHECK_EQUAL(pthread_create(&thread, NULL, truncate_soon, &arena.guest), 0);
	/* This guest's half faults too: the guard is for the whole process. */
	while (!arena.broken) {
		driver_add(d, 0, random_below(2) ? VIRTIO_BLK_T_IN : VIRTIO_BLK_T_OUT, 8, 4096);
		driver_publish(d);
		while (!arena.broken && load_acquire(&d->used->idx) == d->used_idx) {
			CHECK(now_ns() < end);
			eventfd_write(d->kick_fd, 1);
			engine_pump(arena.engine, 1);
		}
		d->used_idx++;
	}
	CHECK_EQUAL(arena.last.result, VB_BROKEN_MEMORY_FAULT);
	pthread_join(thread, NULL);
	arena_down();
}

TEST(memory_truncated_under_load)
{
	skip_under_thread_sanitizer();
	truncate_under_load(VB_IO_AUTO, VB_EXTENT_INLINE);
	truncate_under_load(VB_IO_AUTO, 0);
	truncate_under_load(VB_IO_THREADS, 0);
}

TEST(data_on_truncated_pages_is_an_io_error)
{
	struct driver *d = &arena.victim;
	struct vb_extent extent;

	arena_up(false, VB_IO_AUTO);
	extent = whole_file(arena.fd, SIZE, RW | VB_EXTENT_INLINE);
	disk_map(arena.engine, arena.disk, extent);
	/* Only the second region goes, where nothing of the ring is. */
	CHECK_EQUAL(ftruncate(arena.guest.memfd, GUEST_REGION), 0);
	*(struct virtio_blk_outhdr *)(driver_status(d, 0) - 16) = (struct virtio_blk_outhdr){.type = VIRTIO_BLK_T_OUT};
	set(0, header_gpa(), 16, NEXT, 1);
	set(1, GUEST_GPA + GUEST_REGION, 4096, NEXT, 2);
	set(2, status_gpa(), 1, WRITE, 0);
	offer(0);
	engine_until(arena.engine, driver_reap(d, NULL) == 0);
	CHECK_EQUAL(*driver_status(d, 0), VIRTIO_BLK_S_IOERR);
	CHECK_EQUAL(arena.broken, 0);
	arena_down();
}

static void *reset_handler_and_fault(void *opaque)
{
	*(volatile char *)opaque = 1;
	return NULL;
}

TEST(a_sigbus_of_somebody_else_still_kills)
{
	int fd, status;
	pid_t child;
	char *page;

	arena_up(false, VB_IO_AUTO);
	fd = file_new(false, 4096);
	page = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	CHECK_EQUAL(ftruncate(fd, 0), 0);
	child = fork();
	if (!child) {
		fclose(stderr);
		reset_handler_and_fault(page);
		_exit(0);
	}
	CHECK_EQUAL(waitpid(child, &status, 0), child);
	CHECK(!WIFEXITED(status) || WEXITSTATUS(status) != 0);
	arena_down();
}

TEST(memory_that_cannot_be_registered_is_used_all_the_same)
{
	struct vb_message set = {.type = VB_MEMORY_SET, .flags = 1};
	struct vb_message ack;

	arena_up(false, VB_IO_AUTO);
	CHECK_EQUAL(ftruncate(arena.guest.memfd, GUEST_REGION), 0);
	disk_map(arena.engine, arena.disk, whole_file(arena.fd, SIZE, RW | VB_EXTENT_FIXED));
	set.disk = (uint64_t)arena.disk;
	set.pointer = (uint64_t)arena.guest.memory;
	ack = engine_command(arena.engine, set);
	CHECK_EQUAL(ack.result, 0);
	CHECK(ack.aux < 2);
	CHECK_EQUAL(driver_do(&arena.victim, VIRTIO_BLK_T_OUT, 0, 4096, NULL), VIRTIO_BLK_S_OK);
	CHECK_EQUAL(driver_do(&arena.victim, VIRTIO_BLK_T_IN, 0, 4096, NULL), VIRTIO_BLK_S_OK);
	CHECK_EQUAL(arena.broken, 0);
	arena_down();
}

/* ---------------------------------------------------------------- a queue that wants all of its thread */

/* What one of two queues gets done in the turn in which both find work, and that the other has its turn; in the end all
 * is done without another kick. */
static int done_in_one_turn(struct driver_config config, uint32_t flags, uint32_t length)
{
	struct engine *engine = engine_new_by_hand(VB_IO_AUTO);
	struct driver_config modest = {.size = 8, .data_bytes = 512};
	struct vb_disk *disk = disk_new(1, 64u << 20);
	struct driver greedy, witness;
	struct guest guest;
	int fd = file_new(false, 64u << 20), first, done;

	guest_init(&guest);
	disk_attach(engine, disk, guest.memory);
	disk_map(engine, disk, whole_file(fd, 64u << 20, VB_EXTENT_READ | flags));
	driver_init(&greedy, &guest, &config);
	driver_init(&witness, &guest, &modest);
	driver_start(&greedy, engine, disk, 1);
	driver_start(&witness, engine, disk, 2);
	for (uint16_t token = 0; token < greedy.tokens; token++)
		driver_add(&greedy, token, VIRTIO_BLK_T_IN, 0, length);
	driver_publish(&greedy);
	driver_add(&witness, 0, VIRTIO_BLK_T_IN, 0, 512);
	driver_publish(&witness);
	engine_pump(engine, 0);
	CHECK_EQUAL(driver_reap(&witness, NULL), 0);
	for (first = 0; driver_reap(&greedy, NULL) >= 0; first++)
		CHECK_EQUAL(*driver_status(&greedy, (uint16_t)first), VIRTIO_BLK_S_OK);
	for (done = first; done < greedy.tokens;) {
		engine_pump(engine, 0);
		while (driver_reap(&greedy, NULL) >= 0)
			done++;
	}
	driver_stop(&greedy);
	driver_stop(&witness);
	disk_detach(engine, disk);
	engine_delete(engine);
	vb_disk_unref(disk);
	driver_deinit(&greedy);
	driver_deinit(&witness);
	guest_deinit(&guest);
	close(fd);
	return first;
}

TEST(a_greedy_queue_gets_a_share_of_each_turn)
{
	struct driver_config bytes = {.size = 16, .data_bytes = 1 << 20, .indirect = true};
	struct driver_config descriptors = {.size = 4096, .data_bytes = 51200, .pieces = 100};
	struct driver_config much = {.size = 4, .data_bytes = 4 << 20, .indirect = true};
	int done;

	done = done_in_one_turn(bytes, VB_EXTENT_INLINE, 1 << 20);
	CHECK(done >= 1 && done <= 8);
	done = done_in_one_turn(bytes, VB_EXTENT_ZERO, 1 << 20);
	CHECK(done >= 1 && done <= 8);
	done = done_in_one_turn(descriptors, VB_EXTENT_NULL, 51200);
	CHECK(done >= 1 && done <= 20);
	/* What takes long is done by others. */
	CHECK_EQUAL(done_in_one_turn(much, VB_EXTENT_ZERO, 4 << 20), 0);
	CHECK_EQUAL(done_in_one_turn(much, VB_EXTENT_INLINE, 4 << 20), 0);
}

/* ---------------------------------------------------------------- fds */

static int set_fd(enum vb_queue_fd which, int fd)
{
	struct vb_message set = {.type = VB_QUEUE_FD, .queue = 1, .aux = which, .result = fd};

	return engine_command(arena.engine, set).result;
}

TEST(a_blocking_call_fd_that_is_saturated_hangs_nobody)
{
	struct driver *d = &arena.victim;
	int blocking = eventfd(0, EFD_CLOEXEC);

	arena_up(false, VB_IO_AUTO);
	CHECK_EQUAL(eventfd_write(blocking, 0xfffffffffffffffeull), 0);
	CHECK_EQUAL(set_fd(VB_QUEUE_CALL, blocking), 0);
	for (int i = 0; i < 20; i++) {
		CHECK_EQUAL(driver_do(d, VIRTIO_BLK_T_IN, 0, 512, NULL), VIRTIO_BLK_S_OK);
		CHECK_EQUAL(driver_do(&arena.witness, VIRTIO_BLK_T_IN, 0, 512, NULL), VIRTIO_BLK_S_OK);
	}
	/* The err fd may be replaced too, and be as full. */
	CHECK_EQUAL(set_fd(VB_QUEUE_ERR, blocking), 0);
	offer(100);
	engine_until(arena.engine, arena.broken == 1);
	CHECK_EQUAL(arena.last.result, VB_BROKEN_HEAD);
	CHECK_EQUAL(fcntl(blocking, F_GETFL) & O_NONBLOCK, 0);
	CHECK_EQUAL(fcntl(d->kick_fd, F_GETFL) & O_NONBLOCK, 0);
	CHECK_EQUAL(set_fd(VB_QUEUE_CALL, d->call_fd), 0);
	arena_down();
	close(blocking);
}

/* Stands in for the one of libc: somebody who fills this eventfd just after it was looked at. */
static int filled_after_looks = -1;

int poll(struct pollfd *fds, nfds_t count, int timeout_ms)
{
	struct timespec timeout = {timeout_ms / 1000, timeout_ms % 1000 * 1000000l};
	int fd = load_relaxed(&filled_after_looks);
	int ready = (int)syscall(SYS_ppoll, fds, count, timeout_ms < 0 ? NULL : &timeout, NULL, 0);

	if (fd >= 0 && ready == 1 && fds[0].fd == fd && fds[0].revents & POLLOUT)
		CHECK_EQUAL(eventfd_write(fd, 0xfffffffffffffffeull), 0);
	return ready;
}

TEST(a_blocking_call_fd_that_fills_at_any_moment_hangs_nobody)
{
	int blocking = eventfd(0, EFD_CLOEXEC);
	eventfd_t signals;

	arena_up(false, VB_IO_AUTO);
	store_relaxed(&filled_after_looks, blocking);
	CHECK_EQUAL(set_fd(VB_QUEUE_CALL, blocking), 0);
	/* Requests one by one, so that each has a signal of its own. */
	for (int i = 0; i < 100; i++) {
		CHECK_EQUAL(driver_do(&arena.victim, VIRTIO_BLK_T_IN, 0, 512, NULL), VIRTIO_BLK_S_OK);
		CHECK_EQUAL(driver_do(&arena.witness, VIRTIO_BLK_T_IN, 0, 512, NULL), VIRTIO_BLK_S_OK);
		CHECK_EQUAL(eventfd_read(blocking, &signals), 0);
		CHECK(signals >= 0xfffffffffffffffeull);
	}
	/* Where nobody does that all of them arrive, but the one of a request that is still being told of. */
	store_relaxed(&filled_after_looks, -1);
	for (int i = 0; i < 100; i++)
		CHECK_EQUAL(driver_do(&arena.victim, VIRTIO_BLK_T_IN, 0, 512, NULL), VIRTIO_BLK_S_OK);
	CHECK_EQUAL(set_fd(VB_QUEUE_CALL, arena.victim.call_fd), 0);
	CHECK_EQUAL(eventfd_read(blocking, &signals), 0);
	CHECK(signals > 50 && signals <= 101);
	arena_down();
	close(blocking);
}

TEST(odd_fds_hang_nobody)
{
	struct driver *d = &arena.victim;
	int kick[2], call[2];
	char junk[4096] = {0};

	arena_up(false, VB_IO_AUTO);
	/* A pipe as kick fd, and as call fd one that is full, so that a write would block. */
	CHECK_EQUAL(pipe2(kick, O_CLOEXEC), 0);
	CHECK_EQUAL(pipe2(call, O_CLOEXEC), 0);
	for (int i = 0; i < 16; i++)
		CHECK_EQUAL(write(call[1], junk, 4096), 4096);
	CHECK_EQUAL(set_fd(VB_QUEUE_KICK, kick[0]), 0);
	CHECK_EQUAL(set_fd(VB_QUEUE_CALL, call[1]), 0);
	for (int i = 0; i < 10; i++) {
		driver_add(d, 0, VIRTIO_BLK_T_IN, 0, 512);
		driver_publish(d);
		CHECK_EQUAL(write(kick[1], junk, 5), 5);
		engine_until(arena.engine, driver_reap(d, NULL) == 0);
	}
	CHECK_EQUAL(driver_do(&arena.witness, VIRTIO_BLK_T_IN, 0, 512, NULL), VIRTIO_BLK_S_OK);
	/* A regular file cannot kick; the old fd stays. */
	CHECK_EQUAL(set_fd(VB_QUEUE_KICK, arena.fd), -EPERM);
	driver_add(d, 0, VIRTIO_BLK_T_IN, 0, 512);
	driver_publish(d);
	CHECK_EQUAL(write(kick[1], junk, 5), 5);
	engine_until(arena.engine, driver_reap(d, NULL) == 0);
	CHECK_EQUAL(set_fd(VB_QUEUE_KICK, d->kick_fd), 0);
	CHECK_EQUAL(set_fd(VB_QUEUE_CALL, d->call_fd), 0);
	for (int i = 0; i < 2; i++) {
		close(kick[i]);
		close(call[i]);
	}
	arena_down();
}
