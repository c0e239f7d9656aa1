/* test_memory_log.c: the log of guest memory that the engine has written, for live migration. */
#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>
#include "harness.h"
#include "src/memory_log.h"

#define PAGE 4096u
#define GUEST_SIZE (2ull * GUEST_REGION)
#define LOG_SIZE ((GUEST_GPA + GUEST_SIZE) / PAGE / 8)
#define FIRST_BYTE (GUEST_GPA / PAGE / 8) /* of the log, that is about guest memory */
#define SIZE (1u << 20)                   /* of the disk */
#define SHORT (64u << 10)                 /* so much of it is not in the file */
#define ROOM (64u << 10)                  /* of a request */
#define TOKENS 8
#define RING 1024 /* more than a page of used elements */

struct log {
	int memfd;
	uint8_t *bits;
	uint64_t size;
	struct vb_memory_log *log;
};

static struct log log_new(uint64_t size)
{
	struct log l = {.memfd = memfd_create("log", MFD_CLOEXEC), .size = size};

	CHECK_EQUAL(ftruncate(l.memfd, (off_t)size), 0);
	l.bits = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, l.memfd, 0);
	CHECK(l.bits != MAP_FAILED);
	CHECK_EQUAL(vb_memory_log_create((uint64_t)l.bits, size, &l.log), 0);
	return l;
}

static void log_delete(struct log *l)
{
	vb_memory_log_destroy(l->log);
	munmap(l->bits, l->size);
	close(l->memfd);
}

static bool is_marked(const struct log *l, uint64_t page)
{
	return load_relaxed(&l->bits[page / 8]) >> page % 8 & 1;
}

TEST(memory_log_marks_pages_as_the_protocol_says)
{
	enum { PAGES = 200 };
	struct log l = log_new(PAGES / 8);

	for (int round = 0; round < 3000; round++) {
		uint64_t gpa = random_below(PAGES * PAGE), length = random_below(PAGES * PAGE - (uint32_t)gpa + 1);

		if (random_below(2))
			length %= 3 * PAGE;
		memset(l.bits, 0, l.size);
		vb_memory_log_mark(l.log, gpa, length);
		for (uint64_t page = 0; page < PAGES; page++)
			CHECK_EQUAL(
				is_marked(&l, page), length && page >= gpa / PAGE && page <= (gpa + length - 1) / PAGE);
	}
	CHECK(!vb_memory_log_lost(l.log));
	log_delete(&l);
}

TEST(memory_log_is_lost_by_what_does_not_fit_into_it_and_nothing_else_is_hurt)
{
	static const struct {
		uint64_t gpa, length;
	} beyond[] = {{7 * PAGE, PAGE + 1}, {8 * PAGE, 1}, {UINT64_MAX, 1}, {UINT64_MAX, UINT64_MAX}, {0, UINT64_MAX},
		{PAGE, UINT64_MAX - PAGE}, {1ull << 63, 1ull << 63}};

	for (size_t i = 0; i < sizeof(beyond) / sizeof(beyond[0]); i++) {
		struct log l = log_new(2);
		struct vb_memory_log *first_byte;

		CHECK_EQUAL(vb_memory_log_create((uint64_t)l.bits, 1, &first_byte), 0);
		vb_memory_log_mark(first_byte, beyond[i].gpa, beyond[i].length);
		CHECK(vb_memory_log_lost(first_byte));
		CHECK_EQUAL(l.bits[1], 0);
		vb_memory_log_destroy(first_byte);
		log_delete(&l);
	}
}

TEST(memory_log_finds_pages_by_host_addresses_where_neighbours_here_are_none_in_the_guest)
{
	uint8_t *host = mmap(NULL, 8 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	struct vb_region regions[] = {
		{.gpa = 20 * PAGE, .size = 4 * PAGE, .hva = (uint64_t)host, .uva = 4096},
		{.gpa = 10 * PAGE, .size = 4 * PAGE, .hva = (uint64_t)host + 4 * PAGE, .uva = 1 << 20},
	};
	struct iovec pieces[] = {{host + 3 * PAGE + 5, PAGE}, {host + 7 * PAGE, 1}};
	struct log l = log_new(8);
	struct vb_memory *memory;
	uint32_t guess = 1000;

	CHECK_EQUAL(vb_memory_create(regions, 2, &memory), 0);
	memory_log_mark_pieces(l.log, memory, &guess, pieces, 2);
	for (uint64_t page = 0; page < 64; page++)
		CHECK_EQUAL(is_marked(&l, page), page == 23 || page == 10 || page == 13);
	CHECK(!vb_memory_log_lost(l.log));
	vb_memory_log_mark_at(l.log, memory, (uint64_t)host + 7 * PAGE, 2 * PAGE);
	CHECK(vb_memory_log_lost(l.log));
	log_delete(&l);
	vb_memory_unref(memory);
	munmap(host, 8 * PAGE);
}

/* ---------------------------------------------------------------- by the engine */

/* A guest that reads, and a front-end that copies its memory meanwhile, as if to another host. */
static struct {
	struct engine *engine;
	struct vb_disk *disk;
	struct guest guest;
	struct driver driver;
	struct log log;
	pthread_mutex_t collecting; /* the log is not exchanged meanwhile */
	uint8_t *copy;
	uint32_t stop, rounds;
	bool broken;
	int log_fd;
	uint8_t noise[ROOM];
} rig;

static void on_message(struct engine *engine, const struct vb_message *m)
{
	if (m->type == VB_QUEUE_BROKEN) {
		CHECK_EQUAL(m->result, VB_BROKEN_LOG);
		rig.broken = true;
	} else if (m->type == VB_REQUEST) {
		const struct vb_iov *pieces = (const struct vb_iov *)m->pointer, whole = {m->pointer, m->length};
		struct vb_message done = {.type = VB_COMPLETE, .cookie = m->cookie, .length = m->length};

		/* Every other one fails, and has written all the same. */
		for (uint32_t i = 0; i < m->count; i++) {
			struct vb_iov piece = m->count == 1 ? whole : pieces[i];

			memcpy((void *)piece.address, rig.noise + random_below(512), piece.length / 2);
		}
		done.result = random_below(2) ? VIRTIO_BLK_S_IOERR : VIRTIO_BLK_S_OK;
		engine_tell(engine, done);
	} else {
		CHECK_EQUAL(m->type, VB_IO_ERROR);
	}
}

/* The guest, the engine and the kernel write there meanwhile: what is torn now is marked again later. */
__attribute__((no_sanitize("thread"))) static void copy_page(uint64_t page)
{
	uint64_t offset = page * PAGE - GUEST_GPA;
	const volatile uint64_t *from = guest_at(&rig.guest, offset);
	uint64_t *to = (uint64_t *)(rig.copy + offset);

	for (uint32_t i = 0; i < PAGE / 8; i++)
		to[i] = from[i];
}

static void copy_everything(void)
{
	for (uint64_t page = GUEST_GPA / PAGE; page < (GUEST_GPA + GUEST_SIZE) / PAGE; page++)
		copy_page(page);
}

static void collect(const struct log *l)
{
	for (uint64_t byte = FIRST_BYTE; byte < LOG_SIZE; byte++) {
		uint8_t bits =
			load_relaxed(&l->bits[byte]) ? __atomic_exchange_n(&l->bits[byte], 0, __ATOMIC_ACQ_REL) : 0;

		for (uint32_t bit = 0; bit < 8; bit++)
			if (bits >> bit & 1)
				copy_page(byte * 8 + bit);
	}
}

static void *collector(void *opaque)
{
	(void)opaque;
	while (!load_acquire(&rig.stop)) {
		pthread_mutex_lock(&rig.collecting);
		collect(&rig.log);
		pthread_mutex_unlock(&rig.collecting);
		__atomic_fetch_add(&rig.rounds, 1, __ATOMIC_RELAXED);
		sched_yield();
	}
	return NULL;
}

static void use_log(const struct log *l, bool enabled)
{
	struct vb_message log = {.type = VB_LOG_SET,
		.disk = (uint64_t)rig.disk,
		.pointer = l ? (uint64_t)l->log : 0,
		.flags = enabled,
		.result = rig.log_fd};
	struct vb_message ring = {.type = VB_QUEUE_LOG,
		.queue = rig.driver.key,
		.flags = enabled,
		.offset = GUEST_GPA + rig.driver.used_at};

	CHECK_EQUAL(engine_command(rig.engine, log).result, 0);
	CHECK_EQUAL(engine_command(rig.engine, ring).result, 0);
}

static void rig_up(enum vb_io_kind kind, uint32_t flags, const struct driver_config *config)
{
	int fd = file_new(false, SIZE - SHORT);

	memset(&rig, 0, sizeof(rig));
	pthread_mutex_init(&rig.collecting, NULL);
	rig.engine = engine_new(kind, 0);
	rig.engine->on_message = on_message;
	rig.disk = disk_new(1, SIZE);
	guest_init(&rig.guest);
	guest_alloc(&rig.guest, 1, PAGE);
	disk_attach(rig.engine, rig.disk, rig.guest.memory);
	for (uint32_t i = 0; i < sizeof(rig.noise); i++)
		rig.noise[i] = (uint8_t)random_below(256);
	for (uint64_t at = 0; at < SIZE - SHORT; at += ROOM)
		CHECK_EQUAL(pwrite(fd, rig.noise, ROOM, (off_t)at), ROOM);
	/* The first quarter is control's. */
	if (flags != VB_EXTENT_NULL)
		disk_map(rig.engine, rig.disk,
			(struct vb_extent){.offset = SIZE / 4,
				.length = SIZE - SIZE / 4,
				.host_offset = SIZE / 4,
				.fd = fd,
				.flags = VB_EXTENT_READ | flags,
				.request_alignment = 1,
				.memory_alignment = 1});
	driver_init(&rig.driver, &rig.guest, config);
	driver_start(&rig.driver, rig.engine, rig.disk, 1);
	rig.copy = calloc(1, GUEST_SIZE);
	rig.log_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
}

static void rig_down(void)
{
	if (rig.driver.runs)
		driver_stop(&rig.driver);
	disk_detach(rig.engine, rig.disk);
	engine_delete(rig.engine);
	vb_disk_unref(rig.disk);
	driver_deinit(&rig.driver);
	guest_deinit(&rig.guest);
	log_delete(&rig.log);
	close(rig.log_fd);
	free(rig.copy);
}

static void add_any(uint16_t token)
{
	uint32_t length = (1 + random_below(ROOM / 512)) * 512, sector = random_below((SIZE - length) / 512 + 1);
	uint32_t kinds = random_below(8);

	driver_add(&rig.driver, token, kinds ? VIRTIO_BLK_T_IN : VIRTIO_BLK_T_GET_ID, sector, kinds ? length : 512);
}

static void same(const void *address, uint64_t length)
{
	uint64_t offset = driver_gpa(&rig.driver, address) - GUEST_GPA;

	CHECK(!memcmp(rig.copy + offset, address, length));
}

/* As a front-end does that migrates, gives up, tries again, and gets more memory in between. */
static void change_log(void)
{
	struct log old = rig.log;

	switch (random_below(3)) {
	case 0:
		use_log(&rig.log, false);
		use_log(&rig.log, true);
		pthread_mutex_lock(&rig.collecting);
		copy_everything();
		pthread_mutex_unlock(&rig.collecting);
		break;
	case 1:
		pthread_mutex_lock(&rig.collecting);
		rig.log = log_new(LOG_SIZE + random_below(5));
		use_log(&rig.log, true);
		collect(&old);
		log_delete(&old);
		pthread_mutex_unlock(&rig.collecting);
		break;
	default:
		break;
	}
}

/* All that the engine has written to the ring: of packed descriptors, those that are used, and not their addresses. */
static void same_ring(const struct driver *driver)
{
	const struct vring_packed_desc *desc = guest_at(&rig.guest, driver->desc_at);

	if (!driver->config.packed) {
		same(driver->used, 6 + 8 * RING);
		return;
	}
	same(guest_at(&rig.guest, driver->used_at), sizeof(struct vring_packed_desc_event));
	for (uint32_t i = 0; i < RING; i++)
		if (!(desc[i].flags >> VRING_PACKED_DESC_F_AVAIL & 1) ==
			!(desc[i].flags >> VRING_PACKED_DESC_F_USED & 1))
			same(&desc[i].len, sizeof(desc[i]) - offsetof(struct vring_packed_desc, len));
}

static void copy_equals_memory(enum vb_io_kind kind, uint32_t flags, bool event_idx, bool packed, uint32_t requests)
{
	struct driver_config config = {.size = RING,
		.start = packed ? 0 : 65500,
		.packed = packed,
		.data_bytes = ROOM,
		.event_idx = event_idx,
		.pieces = 6};
	uint64_t end = now_ns() + DEADLINE;
	uint32_t done = 0, asked = 0;
	pthread_t thread;
	eventfd_t told;

	rig_up(kind, flags, &config);
	CHECK(rig.driver.tokens >= TOKENS);
	rig.log = log_new(LOG_SIZE);
	for (uint16_t token = 0; token < TOKENS; token++, asked++)
		add_any(token);
	driver_publish(&rig.driver);
	use_log(&rig.log, true);
	copy_everything();
	CHECK_EQUAL(pthread_create(&thread, NULL, collector, NULL), 0);
	/* On a busy machine the requests could be done before it has begun. */
	for (; !load_relaxed(&rig.rounds); sched_yield())
		CHECK(now_ns() < end);
	while (done < requests) {
		int token;

		CHECK(now_ns() < end);
		while ((token = driver_reap(&rig.driver, NULL)) >= 0) {
			done++;
			if (asked < requests) {
				add_any((uint16_t)token);
				asked++;
			}
		}
		driver_publish(&rig.driver);
		if (!random_below(20))
			change_log();
		else if (config.event_idx)
			driver_wait(&rig.driver, 1);
		engine_pump(rig.engine, 0);
	}
	driver_stop(&rig.driver);
	store_release(&rig.stop, 1);
	pthread_join(thread, NULL);
	collect(&rig.log);
	for (uint16_t token = 0; token < TOKENS; token++) {
		same(driver_data(&rig.driver, token), ROOM);
		same(driver_status(&rig.driver, token), 1);
	}
	same_ring(&rig.driver);
	CHECK(!rig.broken);
	CHECK_EQUAL(eventfd_read(rig.log_fd, &told), 0);
	rig_down();
}

TEST(front_end_that_copies_marked_pages_has_all_that_the_engine_wrote_inline)
{
	copy_equals_memory(VB_IO_AUTO, VB_EXTENT_INLINE, true, false, 1500);
}

TEST(front_end_that_copies_marked_pages_has_all_that_the_engine_wrote_uring)
{
	copy_equals_memory(VB_IO_AUTO, 0, false, false, 700);
	copy_equals_memory(VB_IO_THREADS, VB_EXTENT_CACHED, true, false, 500);
}

TEST(front_end_that_copies_marked_pages_has_all_zeroes_and_all_that_control_wrote)
{
	copy_equals_memory(VB_IO_AUTO, VB_EXTENT_ZERO, true, false, 700);
	copy_equals_memory(VB_IO_AUTO, VB_EXTENT_NULL, false, false, 500);
}

TEST(front_end_that_copies_marked_pages_has_all_that_the_engine_wrote_to_packed_rings)
{
	copy_equals_memory(VB_IO_AUTO, VB_EXTENT_INLINE, true, true, 1500);
	copy_equals_memory(VB_IO_AUTO, 0, false, true, 700);
}

TEST(used_ring_is_marked_where_the_front_end_says_and_only_if_it_says_so)
{
	struct driver_config config = {.size = 8, .data_bytes = 512};
	uint64_t elsewhere = (GUEST_GPA + GUEST_REGION) / PAGE;
	struct vb_message log = {.type = VB_LOG_SET, .result = -1}, ring = {.type = VB_QUEUE_LOG, .queue = 1};

	rig_up(VB_IO_AUTO, VB_EXTENT_INLINE, &config);
	rig.log = log_new(LOG_SIZE);
	log.disk = (uint64_t)rig.disk;
	log.pointer = (uint64_t)rig.log.log;
	CHECK_EQUAL(engine_command(rig.engine, log).result, 0);
	CHECK_EQUAL(driver_do(&rig.driver, VIRTIO_BLK_T_IN, SIZE / 1024, 512, NULL), VIRTIO_BLK_S_OK);
	for (uint64_t byte = 0; byte < LOG_SIZE; byte++)
		CHECK_EQUAL(load_relaxed(&rig.log.bits[byte]), 0);
	ring.flags = 1;
	ring.offset = elsewhere * PAGE;
	CHECK_EQUAL(engine_command(rig.engine, ring).result, 0);
	CHECK_EQUAL(driver_do(&rig.driver, VIRTIO_BLK_T_IN, SIZE / 1024, 512, NULL), VIRTIO_BLK_S_OK);
	driver_stop(&rig.driver);
	for (uint64_t page = 0; page < LOG_SIZE * 8; page++)
		CHECK_EQUAL(is_marked(&rig.log, page), page == elsewhere);
	rig_down();
}

static void lost_log(bool truncated)
{
	struct driver_config config = {.size = 8, .data_bytes = 512};

	rig_up(VB_IO_AUTO, VB_EXTENT_INLINE, &config);
	rig.log = log_new(truncated ? LOG_SIZE : FIRST_BYTE);
	use_log(&rig.log, true);
	if (truncated)
		CHECK_EQUAL(ftruncate(rig.log.memfd, 0), 0);
	driver_add(&rig.driver, 0, VIRTIO_BLK_T_IN, SIZE / 1024, 512);
	driver_publish(&rig.driver);
	engine_until(rig.engine, rig.broken);
	CHECK(vb_memory_log_lost(rig.log.log));
	CHECK(!vb_memory_faulted(rig.guest.memory));
	rig_down();
}

TEST(log_that_is_too_short_breaks_the_queue)
{
	lost_log(false);
}

TEST(log_that_is_truncated_breaks_the_queue)
{
#ifdef __has_feature
#if __has_feature(thread_sanitizer)
	skip("ThreadSanitizer cannot watch what a SIGBUS handler does");
#endif
#endif
	lost_log(true);
}
