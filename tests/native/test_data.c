/* test_data.c: what guests write is what they read, however the engine does it. */
#include <fcntl.h>
#include <sys/uio.h>
#include "harness.h"
#include "worker.h"

#define RW (VB_EXTENT_READ | VB_EXTENT_WRITE)

/* ---------------------------------------------------------------- one queue, every way to do I/O */

struct way {
	enum vb_io_kind kind;
	bool on_disk;
	uint32_t flags;
	struct driver_config config;
	uint32_t register_memory;
	bool direct;
	uint64_t poll_ns;
	bool crowded; /* the thread serves another disk, too */
	bool evicted; /* the page cache forgets the file again and again */
};

/* As a condition of engine_until: make the page cache forget the file meanwhile. */
static bool worker_finished_without_cache(struct worker *w, int fd)
{
	CHECK_EQUAL(fdatasync(fd), 0);
	CHECK_EQUAL(posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED), 0);
	return worker_finished(w);
}

/* All is used that was available. */
static void check_base(uint32_t base, const struct driver_config *config, uint32_t requests)
{
	CHECK_EQUAL(base & 0xffff, config->packed ? base >> 16 : (uint16_t)(config->start + requests));
}

static void run_way(const struct way *way)
{
	uint64_t size = 64u * RANGE;
	struct stand *s = stand_new(way->kind, way->poll_ns, size, &way->config);
	struct worker worker;
	int fd = file_new(way->on_disk, size);
	struct vb_disk *other = disk_new(2, size);
	struct vb_extent extent = whole_file(fd, size, RW | way->flags);
	struct vb_message set;

	if (way->crowded)
		disk_attach(s->engine, other, s->guest.memory);
	set = (struct vb_message){
		.type = VB_MEMORY_SET, .flags = 1, .disk = (uint64_t)s->disk, .pointer = (uint64_t)s->guest.memory};
	if (way->register_memory && engine_command(s->engine, set).aux < way->register_memory)
		printf("registered buffers degraded\n");
	worker_start(&worker, &s->driver, 0, 3000);
	if (way->direct) {
		if (fcntl(fd, F_SETFL, O_DIRECT))
			skip("no O_DIRECT here");
		extent.request_alignment = extent.memory_alignment = 4096;
		worker.alignment = 8;
	}
	disk_map(s->engine, s->disk, extent);
	CHECK(s->driver.tokens <= 64);
	driver_start(&s->driver, s->engine, s->disk, 5);
	worker_go(&worker);
	engine_until(s->engine, way->evicted ? worker_finished_without_cache(&worker, fd) : worker_finished(&worker));
	worker_join(&worker);
	check_base(driver_stop(&s->driver), &way->config, 3000);
	CHECK_EQUAL(s->driver.stats->hits, 3000);
	CHECK_EQUAL(s->driver.stats->misses, 0);
	CHECK_EQUAL(s->driver.stats->in_flight, 0);
	CHECK_EQUAL(s->driver.stats->op[VB_OP_READ].requests + s->driver.stats->op[VB_OP_WRITE].requests, 3000);
	CHECK_EQUAL(vb_disk_write_gen(s->disk), s->driver.stats->op[VB_OP_WRITE].requests);
	if (way->crowded)
		disk_detach(s->engine, other);
	stand_delete(s);
	vb_disk_unref(other);
	close(fd);
}

#define CONFIG(...)                                                                                                    \
	{                                                                                                              \
		.size = 64, .data_bytes = 32768, .start = 65500, __VA_ARGS__                                           \
	}

TEST(data_inline_tmpfs_event_idx)
{
	run_way(&(struct way){VB_IO_AUTO, .flags = VB_EXTENT_INLINE, .config = CONFIG(.event_idx = true)});
}

TEST(data_inline_tmpfs_indirect_many_pieces)
{
	run_way(&(struct way){VB_IO_AUTO, .flags = VB_EXTENT_INLINE, .poll_ns = 100000,
		.config = CONFIG(.indirect = true, .pieces = 40, .event_idx = true)});
}

TEST(data_inline_small_queue_with_long_indirect_tables)
{
	struct driver_config config = CONFIG(.indirect = true, .pieces = 64);

	config.size = 16;
	config.data_bytes = 65536;
	run_way(&(struct way){VB_IO_AUTO, .flags = VB_EXTENT_INLINE, .config = config});
}

TEST(data_threads_tmpfs)
{
	run_way(&(struct way){VB_IO_THREADS, .config = CONFIG(.event_idx = true)});
}

TEST(data_threads_disk_direct_chains)
{
	run_way(&(struct way){VB_IO_THREADS, .on_disk = true, .config = CONFIG(.pieces = 4)});
}

TEST(data_uring_tmpfs)
{
	if (vb_io_uring_error())
		skip("io_uring is forbidden here");
	run_way(&(struct way){VB_IO_URING, .config = CONFIG(.event_idx = true, .indirect = true, .pieces = 3)});
}

TEST(data_uring_disk_polling_engine)
{
	if (vb_io_uring_error())
		skip("io_uring is forbidden here");
	run_way(&(struct way){VB_IO_URING, .on_disk = true, .poll_ns = 200000, .config = CONFIG(.pieces = 2)});
}

TEST(data_uring_fixed_buffers_o_direct)
{
	if (vb_io_uring_error())
		skip("io_uring is forbidden here");
	run_way(&(struct way){VB_IO_URING, .on_disk = true, .direct = true, .flags = VB_EXTENT_FIXED,
		.register_memory = 2, .config = CONFIG(.event_idx = true, .alignment = 4096)});
}

TEST(data_pool_beside_uring)
{
	run_way(&(struct way){
		VB_IO_AUTO, .on_disk = true, .flags = VB_EXTENT_POOL, .config = CONFIG(.event_idx = true)});
}

TEST(data_page_cache)
{
	run_way(&(struct way){VB_IO_AUTO, .on_disk = true, .flags = VB_EXTENT_CACHED,
		.config = CONFIG(.event_idx = true, .indirect = true, .pieces = 3)});
}

TEST(data_page_cache_that_forgets)
{
	run_way(&(struct way){VB_IO_AUTO, .on_disk = true, .evicted = true, .flags = VB_EXTENT_CACHED,
		.config = CONFIG(.event_idx = true, .pieces = 5)});
}

TEST(data_page_cache_of_several_disks)
{
	run_way(&(struct way){VB_IO_AUTO, .on_disk = true, .crowded = true, .evicted = true, .flags = VB_EXTENT_CACHED,
		.config = CONFIG(.event_idx = true)});
}

TEST(data_page_cache_without_uring)
{
	run_way(&(struct way){VB_IO_THREADS, .on_disk = true, .evicted = true, .flags = VB_EXTENT_CACHED,
		.config = CONFIG(.event_idx = true)});
}

/* Files in memory have no page cache to look into: RWF_NOWAIT is refused. */
TEST(data_page_cache_that_cannot_be_asked)
{
	run_way(&(struct way){VB_IO_AUTO, .flags = VB_EXTENT_CACHED, .config = CONFIG(.event_idx = true)});
}

TEST(data_without_kick_fd)
{
	run_way(&(struct way){VB_IO_AUTO, .flags = VB_EXTENT_INLINE, .config = CONFIG(.no_kick_fd = true)});
}

TEST(data_without_any_fd)
{
	run_way(&(struct way){VB_IO_AUTO, .flags = VB_EXTENT_INLINE,
		.config = CONFIG(.no_kick_fd = true, .no_call_fd = true, .event_idx = true)});
}

/* ---------------------------------------------------------------- several queues, two threads, one disk */

static void serve_from(struct engine *engine, const struct vb_message *m)
{
	int fd = *(int *)engine->opaque;
	struct iovec whole = {(void *)m->pointer, m->length};
	const struct iovec *iov = m->count == 1 ? &whole : (const struct iovec *)m->pointer;
	struct vb_message answer = {.type = VB_COMPLETE, .cookie = m->cookie, .length = m->length};
	ssize_t n = -1;

	CHECK_EQUAL(m->type, VB_REQUEST);
	CHECK_EQUAL(m->disk, 1);
	if (m->aux == VIRTIO_BLK_T_IN)
		n = preadv(fd, iov, (int)m->count, (off_t)m->offset);
	else if (m->aux == VIRTIO_BLK_T_OUT)
		n = pwritev(fd, iov, (int)m->count, (off_t)m->offset);
	CHECK_EQUAL(n, m->length);
	if (m->aux != VIRTIO_BLK_T_IN)
		answer.length = 0;
	engine_tell(engine, answer);
}

TEST(data_four_queues_on_two_threads_half_missing)
{
	struct engine *engines[2] = {engine_new(VB_IO_AUTO, 0), engine_new(VB_IO_THREADS, 50000)};
	struct driver_config config = CONFIG(.event_idx = true, .pieces = 2);
	uint64_t size = 4u * 16 * RANGE;
	int fd = file_new(false, size), done = 0;
	struct vb_disk *disk = disk_new(1, size);
	struct guest guest;
	struct driver drivers[4];
	struct worker workers[4];

	guest_init(&guest);
	for (int i = 0; i < 2; i++) {
		engines[i]->on_message = serve_from;
		engines[i]->opaque = &fd;
		disk_attach(engines[i], disk, guest.memory);
		/* Every other range: requests of odd tokens miss. */
		for (uint64_t at = 0; at < size; at += 2 * RANGE) {
			struct vb_extent extent = whole_file(fd, RANGE, RW | (i ? 0 : VB_EXTENT_INLINE));

			extent.offset = extent.host_offset = at;
			disk_map(engines[i], disk, extent);
		}
	}
	for (int i = 0; i < 4; i++) {
		driver_init(&drivers[i], &guest, &config);
		driver_start(&drivers[i], engines[i % 2], disk, (uint32_t)i + 10);
		worker_start(&workers[i], &drivers[i], (uint64_t)i * 16 * SECTORS, 2000);
		worker_go(&workers[i]);
	}
	for (uint64_t end = now_ns() + DEADLINE; done < 4;) {
		CHECK(now_ns() < end);
		engine_pump(engines[0], 1);
		engine_pump(engines[1], 1);
		done = 0;
		for (int i = 0; i < 4; i++)
			done += worker_finished(&workers[i]);
	}
	for (int i = 0; i < 4; i++) {
		worker_join(&workers[i]);
		CHECK_EQUAL(driver_stop(&drivers[i]), (uint16_t)(65500 + 2000));
		CHECK_EQUAL(drivers[i].stats->hits + drivers[i].stats->misses, 2000);
		CHECK(drivers[i].stats->misses > 0);
		CHECK(drivers[i].stats->hits > 0);
		driver_deinit(&drivers[i]);
	}
	for (int i = 0; i < 2; i++) {
		disk_detach(engines[i], disk);
		engine_delete(engines[i]);
	}
	vb_disk_unref(disk);
	guest_deinit(&guest);
	close(fd);
}

/* ---------------------------------------------------------------- the graph changes under load */

/* Where the data of each range is at the moment: in one of two files. */
struct moving {
	int fds[2];
	uint32_t flags;
	struct vb_disk *disk;
	uint8_t where[64];
	bool busy[64]; /* being moved: misses wait */
	struct {
		uint64_t cookie, range;
	} waiting[64];
	int waiters;
};

static void map_range(struct engine *engine, struct moving *m, uint64_t range)
{
	struct vb_extent extent = whole_file(m->fds[m->where[range]], RANGE, RW | m->flags);

	extent.offset = extent.host_offset = range * RANGE;
	disk_map(engine, m->disk, extent);
}

static void map_and_retry(struct engine *engine, const struct vb_message *message)
{
	static struct vb_extent keep[65536];
	static uint16_t next;
	struct moving *m = engine->opaque;
	uint64_t range = message->offset / RANGE;
	struct vb_extent extent = whole_file(m->fds[m->where[range]], RANGE, RW | m->flags);

	CHECK_EQUAL(message->type, VB_REQUEST);
	if (m->busy[range]) {
		m->waiting[m->waiters].cookie = message->cookie;
		m->waiting[m->waiters++].range = range;
		return;
	}
	CHECK(!(message->flags & 1)); /* a retry behind its MAP always hits */
	extent.offset = extent.host_offset = range * RANGE;
	/* Must live until the acknowledgement, for which nobody waits here. */
	keep[next] = extent;
	engine_send(engine,
		(struct vb_message){
			.type = VB_MAP, .disk = (uint64_t)m->disk, .pointer = (uint64_t)&keep[next++], .count = 1});
	engine_tell(engine, (struct vb_message){.type = VB_RETRY, .cookie = message->cookie});
}

static void release_waiters(struct engine *engine, struct moving *m, uint64_t range)
{
	for (int i = 0; i < m->waiters;) {
		if (m->waiting[i].range != range) {
			i++;
			continue;
		}
		engine_tell(engine, (struct vb_message){.type = VB_RETRY, .cookie = m->waiting[i].cookie});
		m->waiting[i] = m->waiting[--m->waiters];
	}
}

/* Revoke a range, move its data to the other file, spoil where it was, map it again. Were a write still in flight when
 * the revocation is acknowledged, it would be lost, and the guest would notice. */
static void move_range(struct engine *engine, struct moving *m, uint64_t range)
{
	static uint8_t data[RANGE], spoilt[RANGE];
	struct vb_message revoke = {
		.type = VB_REVOKE, .disk = (uint64_t)m->disk, .offset = range * RANGE, .length = RANGE};
	int from = m->fds[m->where[range]], to = m->fds[!m->where[range]];

	m->busy[range] = true;
	CHECK_EQUAL(engine_command(engine, revoke).result, 0);
	CHECK_EQUAL(pread(from, data, RANGE, (off_t)(range * RANGE)), RANGE);
	CHECK_EQUAL(pwrite(to, data, RANGE, (off_t)(range * RANGE)), RANGE);
	memset(spoilt, 0x5a, RANGE);
	CHECK_EQUAL(pwrite(from, spoilt, RANGE, (off_t)(range * RANGE)), RANGE);
	m->where[range] = !m->where[range];
	m->busy[range] = false;
	if (random_below(2) || m->waiters) {
		map_range(engine, m, range);
		release_waiters(engine, m, range);
	}
}

static void run_moving(enum vb_io_kind kind, bool on_disk, uint32_t flags, bool restart, bool packed)
{
	struct driver_config config = CONFIG(.event_idx = true, .pieces = 2, .packed = packed);
	uint64_t size = 64u * RANGE;
	struct stand *s = stand_new(kind, 20000, size, &config);
	struct moving m = {.fds = {file_new(on_disk, size), file_new(on_disk, size)}, .flags = flags, .disk = s->disk};
	struct worker worker;

	s->engine->on_message = map_and_retry;
	s->engine->opaque = &m;
	driver_start(&s->driver, s->engine, s->disk, 5);
	worker_start(&worker, &s->driver, 0, 4000);
	worker_go(&worker);
	for (uint64_t end = now_ns() + DEADLINE; !worker_finished(&worker);) {
		CHECK(now_ns() < end);
		move_range(s->engine, &m, random_below(s->driver.tokens));
		if (restart && random_below(4) == 0) {
			/* The guest knows nothing of this: it must be as if the engine had only been slow. */
			driver_stop(&s->driver);
			driver_start(&s->driver, s->engine, s->disk, 5);
			eventfd_write(s->driver.call_fd, 1);
		}
		engine_pump(s->engine, 0);
	}
	worker_join(&worker);
	check_base(driver_stop(&s->driver), &config, 4000);
	s->engine->on_message = NULL;
	stand_delete(s);
	close(m.fds[0]);
	close(m.fds[1]);
}

TEST(revoke_and_map_under_load_inline)
{
	run_moving(VB_IO_AUTO, false, VB_EXTENT_INLINE, false, false);
}

TEST(revoke_and_map_under_load_uring)
{
	run_moving(VB_IO_AUTO, true, 0, false, false);
}

TEST(revoke_and_map_under_load_threads)
{
	run_moving(VB_IO_THREADS, true, 0, false, false);
}

TEST(revoke_and_map_under_load_registered_files)
{
	run_moving(VB_IO_AUTO, true, VB_EXTENT_FIXED, false, false);
}

/* ---------------------------------------------------------------- fds that become other files */

struct recycled {
	struct vb_disk *disk;
	struct vb_extent extent;
	uint64_t waiting[64];
	int waiters;
	bool busy;
};

static void recycled_map(struct engine *engine, struct recycled *r)
{
	disk_map(engine, r->disk, r->extent);
	while (r->waiters)
		engine_tell(engine, (struct vb_message){.type = VB_RETRY, .cookie = r->waiting[--r->waiters]});
}

static void recycled_miss(struct engine *engine, const struct vb_message *message)
{
	struct recycled *r = engine->opaque;

	CHECK_EQUAL(message->type, VB_REQUEST);
	r->waiting[r->waiters++] = message->cookie;
	if (!r->busy)
		recycled_map(engine, r);
}

/* The file that was behind the fd is spoilt, and nobody has it any more: a lock that it had is gone. */
static void recycle(struct engine *engine, struct recycled *r)
{
	static uint8_t data[64 * RANGE];
	struct vb_message revoke = {.type = VB_REVOKE, .disk = (uint64_t)r->disk, .length = UINT64_MAX};
	struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
	int fd = r->extent.fd, other, fresh = file_new(true, sizeof(data));
	char path[64];

	r->busy = true;
	CHECK_EQUAL(engine_command(engine, revoke).result, 0);
	CHECK_EQUAL(pread(fd, data, sizeof(data), 0), sizeof(data));
	CHECK_EQUAL(pwrite(fresh, data, sizeof(data), 0), sizeof(data));
	snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
	other = open(path, O_RDWR | O_CLOEXEC);
	CHECK(other >= 0);
	CHECK_EQUAL(fcntl(fd, F_OFD_SETLK, &lock), 0);
	CHECK_EQUAL(fcntl(other, F_OFD_SETLK, &lock), -1);
	CHECK_EQUAL(dup3(fresh, fd, O_CLOEXEC), fd);
	CHECK_EQUAL(fcntl(other, F_OFD_SETLK, &lock), 0);
	CHECK_EQUAL(ftruncate(other, 0), 0);
	close(other);
	close(fresh);
	r->busy = false;
	recycled_map(engine, r);
}

TEST(an_fd_that_becomes_another_file_is_not_taken_for_the_old_one)
{
	struct driver_config config = CONFIG(.event_idx = true, .pieces = 2);
	uint64_t size = 64u * RANGE;
	struct stand *s = stand_new(VB_IO_AUTO, 20000, size, &config);
	struct recycled r = {.disk = s->disk, .extent = whole_file(file_new(true, size), size, RW | VB_EXTENT_FIXED)};
	struct worker worker;

	s->engine->on_message = recycled_miss;
	s->engine->opaque = &r;
	driver_start(&s->driver, s->engine, s->disk, 5);
	worker_start(&worker, &s->driver, 0, 4000);
	worker_go(&worker);
	for (uint64_t end = now_ns() + DEADLINE; !worker_finished(&worker);) {
		CHECK(now_ns() < end);
		recycle(s->engine, &r);
		engine_pump(s->engine, 1);
	}
	worker_join(&worker);
	driver_stop(&s->driver);
	s->engine->on_message = NULL;
	stand_delete(s);
	close(r.extent.fd);
}

TEST(stop_and_start_under_load)
{
	run_moving(VB_IO_AUTO, false, 0, true, false);
}

/* Gives how many maps there were. */
static int change_memory_until_finished(struct stand *s, struct worker *worker)
{
	int changes = 0;

	for (uint64_t end = now_ns() + DEADLINE; !worker_finished(worker); changes++) {
		struct vb_memory *fresh = guest_snapshot(&s->guest);
		struct vb_message set = {.type = VB_MEMORY_SET, .flags = changes & 1, .disk = (uint64_t)s->disk};

		CHECK(now_ns() < end);
		set.pointer = (uint64_t)fresh;
		CHECK_EQUAL(engine_command(s->engine, set).result, 0);
		/* Nobody but us has the old one any more: it could be unmapped. */
		CHECK_EQUAL(vb_memory_refs(s->guest.memory), 1);
		vb_memory_unref(s->guest.memory);
		s->guest.memory = fresh;
	}
	return changes;
}

static void run_changing_memory(bool packed)
{
	struct driver_config config = CONFIG(.event_idx = true, .packed = packed);
	uint64_t size = 64u * RANGE;
	struct stand *s = stand_new(VB_IO_AUTO, 0, size, &config);
	int fd = file_new(true, size), changes = 0;
	struct worker worker;

	disk_map(s->engine, s->disk, whole_file(fd, size, RW | VB_EXTENT_FIXED));
	driver_start(&s->driver, s->engine, s->disk, 5);
	/* On a busy machine it may be done before there was time for more than a map or two. */
	while (changes <= 2) {
		CHECK_EQUAL(ftruncate(fd, 0), 0);
		CHECK_EQUAL(ftruncate(fd, (off_t)size), 0);
		worker_start(&worker, &s->driver, 0, 3000);
		worker_go(&worker);
		changes += change_memory_until_finished(s, &worker);
		worker_join(&worker);
	}
	stand_delete(s);
	close(fd);
}

TEST(memory_maps_change_under_load)
{
	run_changing_memory(false);
}

/* ---------------------------------------------------------------- the same on packed rings */

TEST(data_packed_direct_chains_in_a_ring_of_any_size)
{
	struct driver_config config = CONFIG(.packed = true, .event_idx = true, .pieces = 3);

	config.size = 53;
	run_way(&(struct way){VB_IO_AUTO, .flags = VB_EXTENT_INLINE, .config = config});
}

TEST(data_packed_indirect_out_of_order)
{
	run_way(&(struct way){VB_IO_THREADS, .on_disk = true,
		.config = CONFIG(.packed = true, .indirect = true, .event_idx = true, .pieces = 40)});
}

TEST(data_packed_without_event_idx)
{
	run_way(&(struct way){VB_IO_THREADS, .config = CONFIG(.packed = true, .pieces = 2)});
}

TEST(data_packed_without_any_fd)
{
	run_way(&(struct way){VB_IO_AUTO, .flags = VB_EXTENT_INLINE,
		.config = CONFIG(.packed = true, .no_kick_fd = true, .no_call_fd = true)});
}

TEST(packed_rings_stop_and_start_under_load)
{
	run_moving(VB_IO_AUTO, false, 0, true, true);
}

TEST(packed_rings_move_to_other_memory_maps_under_load)
{
	run_changing_memory(true);
}
