/* test_disturbed.c: queues that sleep until they are kicked, while control changes everything that can be changed; and what
 * they read is what they have written. */
#include <poll.h>
#include <pthread.h>
#include <sys/uio.h>
#include "harness.h"

#define DISK_SIZE (1u << 20)
#define PAGE 4096u
#define RW (VB_EXTENT_READ | VB_EXTENT_WRITE)
#define QUEUES 6
#define WAVES 20
#define LOG_SIZE ((GUEST_GPA + 2ull * GUEST_REGION) / PAGE / 8)

/* A driver that never looks before it is called, like a guest whose processors sleep: one lost kick, or one lost call,
 * is the end. */
struct sleeper {
	pthread_t pthread;
	struct driver driver;
	int kick_fd;                       /* ours always; the device may be made to look by itself */
	_Alignas(64) uint8_t region[PAGE]; /* where its requests are tracked, if they are */
	bool was_suspended;
	uint8_t content[DISK_SIZE / PAGE /
			QUEUES];               /* of its part of the disk: a page for each token, filled with this */
	bool reads[DISK_SIZE / PAGE / QUEUES]; /* whether that is what a token does */
	uint32_t stop, done;
};

static struct {
	struct engine *engine;
	struct guest guest;
	struct vb_disk *disk;
	struct sleeper sleepers[QUEUES];
	struct vb_extent file;
	uint64_t waiting[1024];
	int waiters;
	struct vb_memory_log *log;
	uint8_t *log_bits;
} rig;

static void ask(struct sleeper *s, uint16_t token)
{
	uint32_t page = (uint32_t)(s - rig.sleepers) * (uint32_t)sizeof(s->content) + token, dice = random_below(8);
	uint8_t *data = driver_data(&s->driver, token);

	s->reads[token] = dice >= 4;
	s->content[token] += dice && dice < 4;
	memset(data, s->reads[token] ? ~s->content[token] : s->content[token], PAGE);
	if (dice == 0)
		driver_add(&s->driver, token, VIRTIO_BLK_T_FLUSH, 0, 0);
	else
		driver_add(&s->driver, token, dice < 4 ? VIRTIO_BLK_T_OUT : VIRTIO_BLK_T_IN, 8 * page, PAGE);
}

static void check_answer(struct sleeper *s, uint16_t token)
{
	const uint8_t *data = driver_data(&s->driver, token);

	CHECK_EQUAL(*driver_status(&s->driver, token), VIRTIO_BLK_S_OK);
	for (uint32_t i = 0; s->reads[token] && i < PAGE; i++)
		CHECK_EQUAL(data[i], s->content[token]);
}

static void *sleep_and_ask(void *opaque)
{
	struct sleeper *s = opaque;
	struct driver *d = &s->driver;
	uint32_t in_flight = 0;

	while (!load_acquire(&s->stop) || in_flight) {
		uint32_t burst = in_flight || load_acquire(&s->stop) ? 0 : 1 + random_below(d->tokens);
		int token;

		for (uint16_t i = 0; i < burst; i++, in_flight++) {
			ask(s, i);
			if (random_below(3) == 0)
				driver_publish(d);
		}
		if (driver_has_added(d))
			driver_publish(d);
		while ((token = driver_reap(d, NULL)) >= 0) {
			check_answer(s, (uint16_t)token);
			in_flight--;
			store_release(&s->done, s->done + 1);
		}
		if (in_flight)
			CHECK(driver_wait(d, 15000));
	}
	return NULL;
}

/* Some misses are answered, the others served by the map that comes again. */
static void miss(struct engine *engine, const struct vb_message *m)
{
	struct iovec whole = {(void *)m->pointer, m->length};
	const struct iovec *data = m->count == 1 ? &whole : (const struct iovec *)m->pointer;

	CHECK_EQUAL(m->type, VB_REQUEST);
	if (m->aux != VIRTIO_BLK_T_FLUSH && random_below(2)) {
		rig.waiting[rig.waiters++] = m->cookie;
		return;
	}
	if (m->aux == VIRTIO_BLK_T_OUT)
		CHECK_EQUAL(pwritev(rig.file.fd, data, (int)m->count, (off_t)m->offset), m->length);
	else if (m->aux == VIRTIO_BLK_T_IN)
		CHECK_EQUAL(preadv(rig.file.fd, data, (int)m->count, (off_t)m->offset), m->length);
	engine_tell(engine, (struct vb_message){.type = VB_COMPLETE, .cookie = m->cookie, .length = m->length});
}

static void retry_all(void)
{
	while (rig.waiters)
		engine_tell(rig.engine, (struct vb_message){.type = VB_RETRY, .cookie = rig.waiting[--rig.waiters]});
}

static void set_fd(struct sleeper *s, enum vb_queue_fd which, int fd)
{
	struct vb_message set = {.type = VB_QUEUE_FD, .queue = s->driver.key, .aux = which, .result = fd};

	CHECK_EQUAL(engine_command(rig.engine, set).result, 0);
}

static void enable(struct sleeper *s, uint16_t enabled)
{
	struct vb_message message = {.type = VB_QUEUE_ENABLE, .queue = s->driver.key, .flags = enabled};

	CHECK_EQUAL(engine_command(rig.engine, message).result, 0);
}

/* Where requests are tracked the stop may leave them in flight. */
static void restart(struct sleeper *s)
{
	bool suspends = s->driver.config.inflight && random_below(2);
	struct vb_message stop = {.type = VB_QUEUE_STOP, .queue = s->driver.key, .flags = suspends}, ack;
	uint64_t cookie = engine_send(rig.engine, stop);
	struct vb_queue_config config = driver_queue_config(&s->driver);

	retry_all();
	while (!engine_acked(rig.engine, cookie)) {
		engine_pump(rig.engine, 1);
		retry_all();
	}
	ack = rig.engine->acks[cookie];
	CHECK_EQUAL(ack.result, 0);
	s->was_suspended |= suspends;
	config.base = (uint32_t)ack.aux;
	config.logged = (uint8_t)random_below(2);
	config.log_gpa = GUEST_GPA + s->driver.used_at;
	CHECK_EQUAL(engine_command(rig.engine, (struct vb_message){.type = VB_QUEUE_START,
						       .queue = s->driver.key,
						       .disk = (uint64_t)rig.disk,
						       .pointer = (uint64_t)&config})
			    .result,
		0);
}

static void move_memory(void)
{
	struct vb_memory *fresh = guest_snapshot(&rig.guest);
	struct vb_message set = {
		.type = VB_MEMORY_SET, .disk = (uint64_t)rig.disk, .flags = 1, .pointer = (uint64_t)fresh};
	uint64_t cookie = engine_send(rig.engine, set);

	while (!engine_acked(rig.engine, cookie)) {
		engine_pump(rig.engine, 1);
		retry_all();
	}
	CHECK_EQUAL(rig.engine->acks[cookie].result, 0);
	vb_memory_unref(rig.guest.memory);
	rig.guest.memory = fresh;
}

/* As a front-end does that migrates, or has more memory now. */
static void change_log(void)
{
	struct vb_memory_log *old = rig.log;
	uint8_t *old_bits = rig.log_bits;
	struct vb_message set = {.type = VB_LOG_SET, .disk = (uint64_t)rig.disk, .result = -1};

	rig.log = NULL;
	rig.log_bits = NULL;
	if (!old || random_below(2)) {
		rig.log_bits = calloc(1, LOG_SIZE);
		CHECK_EQUAL(vb_memory_log_create((uint64_t)rig.log_bits, LOG_SIZE, &rig.log), 0);
	}
	set.pointer = (uint64_t)rig.log;
	set.flags = (uint16_t)random_below(2);
	CHECK_EQUAL(engine_command(rig.engine, set).result, 0);
	CHECK(!old || !vb_memory_log_lost(old));
	vb_memory_log_destroy(old);
	free(old_bits);
}

/* A part of the file, so that the map has many extents, and too many. */
static void map_part(void)
{
	struct vb_extent part = rig.file;

	part.offset = part.host_offset = PAGE * random_below(DISK_SIZE / PAGE);
	part.length = MIN((uint64_t)PAGE * (1 + random_below(8)), DISK_SIZE - part.offset);
	part.request_alignment = random_below(2) ? part.request_alignment : 512;
	disk_map(rig.engine, rig.disk, part);
	retry_all();
}

static void disturb(void)
{
	struct sleeper *s = &rig.sleepers[random_below(QUEUES)];
	struct vb_message command = {.disk = (uint64_t)rig.disk};

	switch (random_below(13)) {
	case 0:
		set_fd(s, VB_QUEUE_KICK, -1);
		for (uint32_t i = random_below(5), done = load_acquire(&s->done); i; i--)
			engine_until(rig.engine, (retry_all(), load_acquire(&s->done) - done >= i));
		set_fd(s, VB_QUEUE_KICK, s->kick_fd);
		break;
	case 1:
		set_fd(s, VB_QUEUE_CALL, s->driver.call_fd);
		break;
	case 2:
		enable(s, 0);
		if (random_below(2))
			engine_pump(rig.engine, 1);
		enable(s, 1);
		break;
	case 3:
		command.type = VB_REVOKE;
		command.offset = PAGE * random_below(DISK_SIZE / PAGE);
		command.length = DISK_SIZE;
		CHECK_EQUAL(engine_command(rig.engine, command).result, 0);
		break;
	case 4:
		disk_map(rig.engine, rig.disk, rig.file);
		retry_all();
		break;
	case 5:
		command.type = VB_FLUSH_SET;
		command.result = VB_FLUSH_MISS;
		CHECK_EQUAL(engine_command(rig.engine, command).result, 0);
		command.result = random_below(2) ? rig.file.fd : VB_FLUSH_MISS;
		CHECK_EQUAL(engine_command(rig.engine, command).result, 0);
		break;
	case 6:
		move_memory();
		break;
	case 7:
		restart(s);
		break;
	case 8:
		vb_disk_set_write_through(rig.disk, (int)random_below(2));
		break;
	case 9:
		change_log();
		break;
	case 10:
	case 11:
		map_part();
		break;
	default:
		engine_pump(rig.engine, 1);
	}
	if (rig.waiters > 500)
		retry_all();
}

static void run(enum vb_io_kind kind, uint32_t flags, bool on_disk, uint64_t poll_ns)
{
	memset(&rig, 0, sizeof(rig));
	rig.engine = engine_new(kind, poll_ns);
	rig.engine->on_message = miss;
	rig.disk = disk_new(1, DISK_SIZE);
	rig.file = whole_file(file_new(on_disk, DISK_SIZE), DISK_SIZE, RW | flags);
	guest_init(&rig.guest);
	disk_attach(rig.engine, rig.disk, rig.guest.memory);
	disk_map(rig.engine, rig.disk, rig.file);
	for (uint32_t i = 0; i < QUEUES; i++) {
		bool packed = i & 1, tracked = i > 1;
		struct driver_config config = {.size = packed ? 31 : 32,
			.packed = packed,
			.data_bytes = PAGE,
			.event_idx = i % 3,
			.indirect = i % 4 < 2,
			.start = packed ? 0 : 65500,
			.inflight = tracked ? rig.sleepers[i].region : NULL,
			.inflight_size = sizeof(rig.sleepers[i].region)};

		driver_init(&rig.sleepers[i].driver, &rig.guest, &config);
		CHECK(rig.sleepers[i].driver.tokens <= sizeof(rig.sleepers[i].content));
		rig.sleepers[i].kick_fd = rig.sleepers[i].driver.kick_fd;
		driver_start(&rig.sleepers[i].driver, rig.engine, rig.disk, i + 1);
	}
	for (int i = 0; i < QUEUES; i++)
		CHECK_EQUAL(pthread_create(&rig.sleepers[i].pthread, NULL, sleep_and_ask, &rig.sleepers[i]), 0);
	for (int wave = 0; wave < WAVES; wave++) {
		for (int i = 0; i < 50; i++)
			disturb();
		/* What went wrong shows when nothing comes that would set it right by accident. */
		for (int i = 0; i < QUEUES; i++) {
			uint32_t done = load_acquire(&rig.sleepers[i].done);

			engine_until(rig.engine, (retry_all(), load_acquire(&rig.sleepers[i].done) - done >= 20));
		}
	}
	for (int i = 0; i < QUEUES; i++)
		store_release(&rig.sleepers[i].stop, 1);
	disk_map(rig.engine, rig.disk, rig.file);
	for (int i = 0; i < QUEUES; i++) {
		struct sleeper *s = &rig.sleepers[i];

		engine_until(rig.engine, (retry_all(), !pthread_tryjoin_np(s->pthread, NULL)));
		driver_stop(&s->driver);
		CHECK(s->done);
		CHECK_EQUAL(s->driver.stats->in_flight, 0);
		/* What was left in flight was tried more than once. */
		CHECK(s->driver.stats->hits + s->driver.stats->misses >= s->done);
		CHECK(s->was_suspended || s->driver.stats->hits + s->driver.stats->misses == s->done);
		CHECK_EQUAL(s->driver.stats->op[VB_OP_READ].requests + s->driver.stats->op[VB_OP_WRITE].requests +
				    s->driver.stats->op[VB_OP_FLUSH].requests,
			s->done);
		driver_deinit(&s->driver);
	}
	disk_detach(rig.engine, rig.disk);
	engine_delete(rig.engine);
	vb_disk_unref(rig.disk);
	vb_memory_log_destroy(rig.log);
	free(rig.log_bits);
	guest_deinit(&rig.guest);
	close(rig.file.fd);
}

TEST(nobody_sleeps_for_ever_while_everything_changes_inline)
{
	run(VB_IO_THREADS, VB_EXTENT_INLINE, false, 0);
}

TEST(nobody_sleeps_for_ever_while_everything_changes_uring)
{
	run(VB_IO_AUTO, VB_EXTENT_FIXED, true, 20000);
}

TEST(nobody_sleeps_for_ever_while_everything_changes_page_cache)
{
	run(VB_IO_AUTO, VB_EXTENT_CACHED, true, 0);
}

TEST(nobody_sleeps_for_ever_while_everything_changes_threads)
{
	run(VB_IO_THREADS, VB_EXTENT_CACHED | VB_EXTENT_POOL, true, 0);
}
