/* test_requests.c: one request at a time: VIRTIO 1.2 §5.2.6 and what becomes of each kind. */
#include <dirent.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include "harness.h"

#define SIZE (1u << 20)
#define RW (VB_EXTENT_READ | VB_EXTENT_WRITE)

/* An engine, a guest with one queue, a disk without extents; and the last message that was not an ACK. */
static struct rig {
	struct engine *engine;
	struct guest guest;
	struct driver driver;
	struct vb_disk *disk;
	int fd;
	struct vb_message request, io_error, broken;
	int requests, io_errors;
} rig;

static void note(struct engine *engine, const struct vb_message *m)
{
	(void)engine;
	if (m->type == VB_REQUEST) {
		rig.request = *m;
		rig.requests++;
	} else if (m->type == VB_IO_ERROR) {
		rig.io_error = *m;
		rig.io_errors++;
	} else {
		rig.broken = *m;
	}
}

static void rig_up(enum vb_io_kind kind, const struct vb_disk_config *disk)
{
	struct driver_config config = {
		.size = 16, .data_bytes = 65536, .pieces = 3, .event_idx = true, .indirect = true};

	rig = (struct rig){.engine = engine_new(kind, 0)};
	rig.engine->on_message = note;
	guest_init(&rig.guest);
	rig.fd = file_new(false, SIZE);
	rig.disk = disk_new(77, SIZE);
	if (disk) {
		vb_disk_unref(rig.disk);
		CHECK_EQUAL(vb_disk_create(disk, &rig.disk), 0);
	}
	disk_attach(rig.engine, rig.disk, rig.guest.memory);
	driver_init(&rig.driver, &rig.guest, &config);
	driver_start(&rig.driver, rig.engine, rig.disk, 3);
}

static void rig_down(void)
{
	driver_stop(&rig.driver);
	disk_detach(rig.engine, rig.disk);
	engine_delete(rig.engine);
	vb_disk_unref(rig.disk);
	driver_deinit(&rig.driver);
	guest_deinit(&rig.guest);
	close(rig.fd);
}

static void expect(uint32_t type, uint64_t sector, uint32_t length, int status, uint32_t written)
{
	uint32_t actually = 0xdeadbeef;

	CHECK_EQUAL(driver_do(&rig.driver, type, sector, length, &actually), status);
	CHECK_EQUAL(actually, written);
}

static void set_flush(int fd)
{
	struct vb_message set = {.type = VB_FLUSH_SET, .disk = (uint64_t)rig.disk, .result = fd};

	CHECK_EQUAL(engine_command(rig.engine, set).result, 0);
}

TEST(refused_requests_have_the_status_of_the_list)
{
	rig_up(VB_IO_AUTO, NULL);
	disk_map(rig.engine, rig.disk, whole_file(rig.fd, SIZE, RW | VB_EXTENT_INLINE));
	expect(VIRTIO_BLK_T_IN, 0, 700, VIRTIO_BLK_S_IOERR, 1);
	expect(VIRTIO_BLK_T_OUT, 0, 700, VIRTIO_BLK_S_IOERR, 1);
	expect(VIRTIO_BLK_T_IN, SIZE / 512 - 1, 1024, VIRTIO_BLK_S_IOERR, 1);
	expect(VIRTIO_BLK_T_OUT, SIZE / 512, 512, VIRTIO_BLK_S_IOERR, 1);
	expect(VIRTIO_BLK_T_IN, UINT64_MAX, 512, VIRTIO_BLK_S_IOERR, 1);
	expect(VIRTIO_BLK_T_IN, UINT64_MAX / 512 + 1, 512, VIRTIO_BLK_S_IOERR, 1);
	expect(VIRTIO_BLK_T_IN, SIZE / 512 - 1, 512, VIRTIO_BLK_S_OK, 513);
	expect(VIRTIO_BLK_T_IN, SIZE / 512, 0, VIRTIO_BLK_S_OK, 1);
	expect(VIRTIO_BLK_T_SECURE_ERASE, 0, 16, VIRTIO_BLK_S_UNSUPP, 1);
	expect(99, 0, 512, VIRTIO_BLK_S_UNSUPP, 1);
	CHECK_EQUAL(rig.requests, 0);
	engine_until(rig.engine, rig.io_errors == 6); /* a guest may know before control does */
	CHECK_EQUAL(rig.io_error.result, -EINVAL);
	CHECK_EQUAL(rig.driver.stats->op[VB_OP_READ].errors, 4);
	vb_disk_set_capacity(rig.disk, SIZE / 2);
	expect(VIRTIO_BLK_T_IN, SIZE / 512 - 1, 512, VIRTIO_BLK_S_IOERR, 1);
	rig_down();
}

TEST(read_only_disks_refuse_what_modifies)
{
	rig_up(VB_IO_AUTO, &(struct vb_disk_config){.capacity = SIZE, .read_only = 1, .max_segments = 1});
	disk_map(rig.engine, rig.disk, whole_file(rig.fd, SIZE, RW | VB_EXTENT_INLINE));
	expect(VIRTIO_BLK_T_OUT, 0, 512, VIRTIO_BLK_S_IOERR, 1);
	expect(VIRTIO_BLK_T_DISCARD, 0, 16, VIRTIO_BLK_S_IOERR, 1);
	expect(VIRTIO_BLK_T_WRITE_ZEROES, 0, 7, VIRTIO_BLK_S_IOERR, 1);
	expect(VIRTIO_BLK_T_IN, 0, 512, VIRTIO_BLK_S_OK, 513);
	rig_down();
}

TEST(get_id_gives_what_fits)
{
	rig_up(VB_IO_AUTO, NULL);
	memset(driver_data(&rig.driver, 0), 'x', 30);
	expect(VIRTIO_BLK_T_GET_ID, 0, 20, VIRTIO_BLK_S_OK, 21);
	CHECK(!memcmp(driver_data(&rig.driver, 0), "a serial of 20 charsxxxx", 24));
	memset(driver_data(&rig.driver, 0), 'x', 30);
	expect(VIRTIO_BLK_T_GET_ID, 0, 5, VIRTIO_BLK_S_OK, 6);
	CHECK(!memcmp(driver_data(&rig.driver, 0), "a serxxxx", 9));
	expect(VIRTIO_BLK_T_GET_ID, 0, 30, VIRTIO_BLK_S_OK, 21);
	rig_down();
}

static void put_segment(int index, uint64_t sector, uint32_t sectors, uint32_t flags)
{
	struct virtio_blk_discard_write_zeroes segment = {sector, sectors, flags};

	memcpy(driver_data(&rig.driver, 0) + 16 * index, &segment, 16);
}

TEST(refused_segments_have_the_status_of_the_list)
{
	rig_up(VB_IO_AUTO, NULL);
	put_segment(0, 0, 8, 0);
	expect(VIRTIO_BLK_T_DISCARD, 0, 0, VIRTIO_BLK_S_IOERR, 1);
	expect(VIRTIO_BLK_T_DISCARD, 0, 15, VIRTIO_BLK_S_IOERR, 1);
	expect(VIRTIO_BLK_T_DISCARD, 0, 9 * 16, VIRTIO_BLK_S_UNSUPP, 1);
	put_segment(1, 8, 8, 1);
	expect(VIRTIO_BLK_T_DISCARD, 0, 32, VIRTIO_BLK_S_UNSUPP, 1);
	put_segment(1, 8, 8, 2);
	expect(VIRTIO_BLK_T_WRITE_ZEROES, 0, 32, VIRTIO_BLK_S_UNSUPP, 1);
	put_segment(1, SIZE / 512 - 7, 8, 0);
	expect(VIRTIO_BLK_T_WRITE_ZEROES, 0, 32, VIRTIO_BLK_S_IOERR, 1);
	put_segment(1, UINT64_MAX, 8, 0);
	expect(VIRTIO_BLK_T_WRITE_ZEROES, 0, 32, VIRTIO_BLK_S_IOERR, 1);
	CHECK_EQUAL(rig.requests, 0);
	rig_down();
}

/* Begin a request that must miss. */
static void miss(uint32_t type, uint64_t sector, uint32_t length)
{
	int before = rig.requests;

	driver_add(&rig.driver, 0, type, sector, length);
	driver_publish(&rig.driver);
	engine_until(rig.engine, rig.requests > before);
	CHECK_EQUAL(rig.request.aux, type);
	CHECK_EQUAL(rig.request.disk, 77);
	CHECK_EQUAL(rig.request.queue, 3);
}

static void complete(int status, uint64_t written, uint32_t used_length)
{
	uint32_t length;

	engine_tell(rig.engine,
		(struct vb_message){
			.type = VB_COMPLETE, .cookie = rig.request.cookie, .result = status, .length = written});
	engine_until(rig.engine, driver_reap(&rig.driver, &length) == 0);
	CHECK_EQUAL(length, used_length);
	CHECK_EQUAL(*driver_status(&rig.driver, 0), status);
}

TEST(misses_carry_what_control_needs)
{
	const struct vb_segment *segments;
	const struct vb_iov *iov;
	struct vb_iov whole;
	uint64_t total = 0;

	rig_up(VB_IO_AUTO, NULL);
	miss(VIRTIO_BLK_T_IN, 6, 4096);
	CHECK_EQUAL(rig.request.offset, 6 * 512);
	CHECK_EQUAL(rig.request.length, 4096);
	whole = (struct vb_iov){rig.request.pointer, rig.request.length};
	iov = rig.request.count == 1 ? &whole : (const struct vb_iov *)rig.request.pointer;
	for (uint32_t i = 0; i < rig.request.count; i++)
		total += iov[i].length;
	CHECK_EQUAL(total, 4096);
	CHECK_EQUAL(iov[0].address, (uint64_t)driver_data(&rig.driver, 0));
	complete(VIRTIO_BLK_S_OK, 4096, 4097);
	miss(VIRTIO_BLK_T_OUT, 6, 512);
	complete(VIRTIO_BLK_S_IOERR, 0, 1);
	miss(VIRTIO_BLK_T_FLUSH, 0, 0);
	CHECK_EQUAL(rig.request.count, 0);
	complete(VIRTIO_BLK_S_OK, 0, 1);
	put_segment(0, 8, 16, 0);
	put_segment(1, 100, 0, 1);
	miss(VIRTIO_BLK_T_WRITE_ZEROES, 0, 32);
	CHECK_EQUAL(rig.request.count, 2);
	segments = (const struct vb_segment *)rig.request.pointer;
	CHECK_EQUAL(segments[0].offset, 8 * 512);
	CHECK_EQUAL(segments[0].length, 16 * 512);
	CHECK_EQUAL(segments[0].flags, 0);
	CHECK_EQUAL(segments[1].offset, 100 * 512);
	CHECK_EQUAL(segments[1].flags, 1);
	complete(VIRTIO_BLK_S_OK, 0, 1);
	CHECK_EQUAL(rig.driver.stats->op[VB_OP_WRITE_ZEROES].bytes, 16 * 512);
	CHECK_EQUAL(rig.driver.stats->misses, 4);
	CHECK_EQUAL(rig.driver.stats->hits, 0);
	rig_down();
}

TEST(a_retry_that_misses_again_says_so_and_stale_cookies_find_nothing)
{
	struct vb_message first;

	rig_up(VB_IO_AUTO, NULL);
	miss(VIRTIO_BLK_T_IN, 0, 512);
	CHECK_EQUAL(rig.request.flags, 0);
	first = rig.request;
	engine_tell(rig.engine, (struct vb_message){.type = VB_RETRY, .cookie = first.cookie});
	engine_until(rig.engine, rig.requests == 2);
	CHECK_EQUAL(rig.request.flags, 1);
	complete(VIRTIO_BLK_S_OK, 512, 513);
	/* Completed twice, and with nonsense: nobody is harmed. */
	for (uint64_t i = 0; i < 64; i++) {
		engine_tell(rig.engine, (struct vb_message){.type = VB_COMPLETE, .cookie = first.cookie ^ (1ull << i)});
		engine_tell(rig.engine, (struct vb_message){.type = VB_RETRY, .cookie = first.cookie});
	}
	miss(VIRTIO_BLK_T_IN, 0, 512);
	CHECK(rig.request.cookie != first.cookie);
	CHECK_EQUAL(rig.driver.stats->misses, 2);
	complete(VIRTIO_BLK_S_OK, 512, 513);
	rig_down();
}

/* With io_uring at its limit, requests of one queue wait for each other inside the engine. */
TEST(more_requests_than_io_uring_is_given)
{
	struct driver_config config = {.size = 2048, .data_bytes = 512, .indirect = true};
	struct driver driver;
	int finished = 0;

	rig_up(VB_IO_AUTO, NULL);
	disk_map(rig.engine, rig.disk, whole_file(rig.fd, SIZE, RW));
	driver_init(&driver, &rig.guest, &config);
	for (uint16_t token = 0; token < 2048; token++)
		driver_add(&driver, token, VIRTIO_BLK_T_IN, token, 512);
	driver_publish(&driver);
	driver_start(&driver, rig.engine, rig.disk, 9);
	/* Waiting at its stop for all that it had popped. */
	engine_until(rig.engine, load_acquire(&driver.used->idx) > 0);
	CHECK(driver_stop(&driver) <= 2048);
	while (driver_reap(&driver, NULL) >= 0)
		finished++;
	CHECK_EQUAL(finished, driver.config.start);
	driver_deinit(&driver);
	rig_down();
}

static int thread_count(void)
{
	DIR *tasks = opendir("/proc/self/task");
	int count = 0;

	while (readdir(tasks))
		count++;
	closedir(tasks);
	return count;
}

/* What would hold up everybody on the thread goes to the pool, although the file never blocks. */
TEST(long_requests_are_not_served_inline)
{
	struct driver_config config = {.size = 8, .data_bytes = 3u << 20};
	struct driver driver;
	uint32_t written;
	int fd, before;

	rig_up(VB_IO_AUTO, &(struct vb_disk_config){.capacity = 4u << 20});
	fd = file_new(false, 4u << 20);
	disk_map(rig.engine, rig.disk, whole_file(fd, 4u << 20, RW | VB_EXTENT_INLINE));
	driver_init(&driver, &rig.guest, &config);
	driver_start(&driver, rig.engine, rig.disk, 9);
	before = thread_count();
	for (int half = 0; half < 2; half++) {
		uint32_t length = half ? 3u << 20 : 1u << 20;

		memset(driver_data(&driver, 0), 'a' + half, length);
		CHECK_EQUAL(driver_do(&driver, VIRTIO_BLK_T_OUT, 8, length, NULL), VIRTIO_BLK_S_OK);
		memset(driver_data(&driver, 0), 0, length);
		CHECK_EQUAL(driver_do(&driver, VIRTIO_BLK_T_IN, 8, length, &written), VIRTIO_BLK_S_OK);
		CHECK_EQUAL(written, length + 1);
		for (uint32_t i = 0; i < length; i++)
			CHECK_EQUAL(driver_data(&driver, 0)[i], 'a' + half);
		CHECK_EQUAL(thread_count() > before, half); /* the pool's first */
	}
	driver_stop(&driver);
	driver_deinit(&driver);
	close(fd);
	rig_down();
}

TEST(alignment_and_missing_rights_miss)
{
	struct vb_extent extent;

	rig_up(VB_IO_AUTO, NULL);
	extent = whole_file(rig.fd, SIZE, VB_EXTENT_READ | VB_EXTENT_INLINE);
	extent.request_alignment = 4096;
	disk_map(rig.engine, rig.disk, extent);
	expect(VIRTIO_BLK_T_IN, 8, 8192, VIRTIO_BLK_S_OK, 8193);
	miss(VIRTIO_BLK_T_IN, 1, 4096);
	complete(VIRTIO_BLK_S_OK, 4096, 4097);
	miss(VIRTIO_BLK_T_IN, 8, 512);
	complete(VIRTIO_BLK_S_OK, 512, 513);
	miss(VIRTIO_BLK_T_OUT, 8, 4096);
	complete(VIRTIO_BLK_S_OK, 0, 1);
	extent.memory_alignment = 4096;
	disk_map(rig.engine, rig.disk, extent);
	miss(VIRTIO_BLK_T_IN, 8, 8192); /* the harness aligns data to 512 */
	complete(VIRTIO_BLK_S_OK, 8192, 8193);
	extent.memory_alignment = 3;
	CHECK_EQUAL(
		engine_command(rig.engine,
			(struct vb_message){
				.type = VB_MAP, .disk = (uint64_t)rig.disk, .pointer = (uint64_t)&extent, .count = 1})
			.result,
		-EINVAL);
	rig_down();
}

TEST(zero_and_null_extents)
{
	struct vb_extent extent;

	rig_up(VB_IO_AUTO, NULL);
	extent = whole_file(-1, SIZE / 2, VB_EXTENT_READ | VB_EXTENT_ZERO);
	disk_map(rig.engine, rig.disk, extent);
	extent.offset = SIZE / 2;
	extent.flags = RW | VB_EXTENT_NULL;
	disk_map(rig.engine, rig.disk, extent);
	memset(driver_data(&rig.driver, 0), 'x', 8192);
	expect(VIRTIO_BLK_T_IN, 0, 4096, VIRTIO_BLK_S_OK, 4097);
	for (int i = 0; i < 8192; i++)
		CHECK_EQUAL(driver_data(&rig.driver, 0)[i], i < 4096 ? 0 : 'x');
	miss(VIRTIO_BLK_T_OUT, 0, 4096);
	complete(VIRTIO_BLK_S_OK, 0, 1);
	expect(VIRTIO_BLK_T_OUT, SIZE / 1024, 4096, VIRTIO_BLK_S_OK, 1);
	expect(VIRTIO_BLK_T_IN, SIZE / 1024, 8192, VIRTIO_BLK_S_OK, 8193);
	CHECK_EQUAL(driver_data(&rig.driver, 0)[8191], 'x');
	rig_down();
}

static void file_ends_inside_extent(enum vb_io_kind kind, uint32_t flags)
{
	rig_up(kind, NULL);
	disk_map(rig.engine, rig.disk, whole_file(rig.fd, SIZE, RW | flags));
	CHECK_EQUAL(ftruncate(rig.fd, 4096 + 100), 0);
	expect(VIRTIO_BLK_T_IN, 0, 4096, VIRTIO_BLK_S_OK, 4097);
	expect(VIRTIO_BLK_T_IN, 8, 4096, VIRTIO_BLK_S_IOERR, 1);
	engine_until(rig.engine, rig.io_errors == 1);
	CHECK_EQUAL(rig.io_error.result, -EIO);
	CHECK_EQUAL(rig.io_error.offset, 4096);
	CHECK_EQUAL(rig.io_error.length, 4096);
	rig_down();
}

TEST(end_of_file_inside_an_extent_is_an_error)
{
	file_ends_inside_extent(VB_IO_AUTO, VB_EXTENT_INLINE);
	file_ends_inside_extent(VB_IO_AUTO, 0);
	file_ends_inside_extent(VB_IO_THREADS, 0);
}

static void failing_file(enum vb_io_kind kind, uint32_t flags)
{
	int fd;

	rig_up(kind, NULL);
	fd = open("/dev/full", O_RDWR | O_CLOEXEC);
	CHECK(fd >= 0);
	disk_map(rig.engine, rig.disk, whole_file(fd, SIZE, RW | flags));
	expect(VIRTIO_BLK_T_OUT, 0, 4096, VIRTIO_BLK_S_IOERR, 1);
	engine_until(rig.engine, rig.io_errors == 1);
	CHECK_EQUAL(rig.io_error.result, -ENOSPC);
	/* A part of it may have been written: a flush has something to do. */
	CHECK_EQUAL(vb_disk_write_gen(rig.disk), 1);
	rig_down();
	close(fd);
}

TEST(failed_writes_are_reported_and_count_as_writes)
{
	failing_file(VB_IO_AUTO, VB_EXTENT_INLINE);
	failing_file(VB_IO_AUTO, 0);
	failing_file(VB_IO_THREADS, 0);
}

static void flushes(enum vb_io_kind kind)
{
	int fd;

	rig_up(kind, NULL);
	set_flush(VB_FLUSH_NOTHING);
	expect(VIRTIO_BLK_T_FLUSH, 0, 0, VIRTIO_BLK_S_OK, 1);
	fd = file_new(true, SIZE);
	set_flush(fd);
	expect(VIRTIO_BLK_T_FLUSH, 0, 0, VIRTIO_BLK_S_OK, 1);
	CHECK_EQUAL(rig.requests, 0);
	set_flush(VB_FLUSH_MISS);
	miss(VIRTIO_BLK_T_FLUSH, 0, 0);
	complete(VIRTIO_BLK_S_OK, 0, 1);
	close(fd);
	/* An eventfd cannot be flushed. */
	set_flush(rig.driver.err_fd);
	expect(VIRTIO_BLK_T_FLUSH, 0, 0, VIRTIO_BLK_S_IOERR, 1);
	engine_until(rig.engine, rig.io_errors == 1);
	CHECK_EQUAL(rig.io_error.result, -EINVAL);
	CHECK_EQUAL(rig.driver.stats->op[VB_OP_FLUSH].requests, 4);
	rig_down();
}

TEST(flush_is_served_by_fdatasync_where_allowed)
{
	flushes(VB_IO_AUTO);
	flushes(VB_IO_THREADS);
}

TEST(write_through_reaches_the_file_system)
{
	/* RWF_DSYNC is refused by files that know nothing of it, and not by those that do. */
	rig_up(VB_IO_AUTO, NULL);
	disk_map(rig.engine, rig.disk, whole_file(rig.driver.err_fd, SIZE, RW | VB_EXTENT_INLINE));
	vb_disk_set_write_through(rig.disk, 1);
	expect(VIRTIO_BLK_T_OUT, 0, 512, VIRTIO_BLK_S_IOERR, 1);
	disk_map(rig.engine, rig.disk, whole_file(rig.fd, SIZE, RW | VB_EXTENT_INLINE));
	expect(VIRTIO_BLK_T_OUT, 0, 512, VIRTIO_BLK_S_OK, 1);
	CHECK_EQUAL(vb_disk_write_gen(rig.disk), 2);
	rig_down();
}

TEST(any_framing_and_buffers_that_cross_regions)
{
	struct driver *d = &rig.driver;
	uint64_t border = GUEST_GPA + GUEST_REGION;
	uint8_t *low, *high;
	struct virtio_blk_outhdr header = {.type = VIRTIO_BLK_T_OUT, .sector = 4};
	uint32_t written;
	uint8_t back[1024];

	rig_up(VB_IO_AUTO, NULL);
	disk_map(rig.engine, rig.disk, whole_file(rig.fd, SIZE, RW));
	low = rig.guest.base[0] + GUEST_REGION - 516;
	high = rig.guest.base[1];
	/* 16 bytes of header and 1024 of data, across the border, cut at odd places: 10 | 506+... */
	memcpy(low, &header, 16);
	for (int i = 0; i < 1024; i++)
		*(i < 500 ? low + 16 + i : high + i - 500) = (uint8_t)(i * 3);
	d->desc[0] = (struct vring_desc){border - 516, 10, VRING_DESC_F_NEXT, 1};
	d->desc[1] = (struct vring_desc){border - 506, 1030, VRING_DESC_F_NEXT, 2};
	d->desc[2] = (struct vring_desc){0, 0, VRING_DESC_F_NEXT | VRING_DESC_F_WRITE, 3};
	d->desc[3] = (struct vring_desc){border + 4096, 1, VRING_DESC_F_WRITE, 0};
	driver_offer(d, 0);
	driver_publish(d);
	engine_until(rig.engine, driver_reap(d, &written) == 0);
	CHECK_EQUAL(high[4096], VIRTIO_BLK_S_OK);
	CHECK_EQUAL(written, 1);
	CHECK_EQUAL(pread(rig.fd, back, 1024, 4 * 512), 1024);
	for (int i = 0; i < 1024; i++)
		CHECK_EQUAL(back[i], (uint8_t)(i * 3));
	/* The status is the last writable byte, behind data in the same descriptor. */
	header.type = VIRTIO_BLK_T_IN;
	memcpy(low, &header, 16);
	d->desc[0] = (struct vring_desc){border - 516, 16, VRING_DESC_F_NEXT, 1};
	d->desc[1] = (struct vring_desc){border, 1025, VRING_DESC_F_WRITE, 0};
	memset(high, 0xee, 1026);
	driver_offer(d, 0);
	driver_publish(d);
	engine_until(rig.engine, driver_reap(d, &written) == 0);
	CHECK_EQUAL(written, 1025);
	CHECK(!memcmp(high, back, 1024));
	CHECK_EQUAL(high[1024], VIRTIO_BLK_S_OK);
	CHECK_EQUAL(high[1025], 0xee);
	/* A header that is too short. */
	d->desc[0] = (struct vring_desc){border - 516, 15, VRING_DESC_F_NEXT, 1};
	driver_offer(d, 0);
	driver_publish(d);
	engine_until(rig.engine, driver_reap(d, &written) == 0);
	CHECK_EQUAL(written, 1);
	CHECK_EQUAL(high[1024], VIRTIO_BLK_S_IOERR);
	rig_down();
}

TEST(a_chain_of_thousands_of_pieces)
{
	enum { PIECES = 4000 };
	struct driver_config config = {.size = 4096, .data_bytes = 65536, .indirect = true, .event_idx = true};
	struct driver d;
	struct vring_desc *table;
	uint64_t at;
	uint32_t written;
	int fd;

	for (int kind = VB_IO_AUTO; kind <= VB_IO_THREADS; kind += 2) {
		rig_up((enum vb_io_kind)kind, NULL);
		fd = file_new(true, 4 << 20);
		vb_disk_set_capacity(rig.disk, 4 << 20);
		disk_map(rig.engine, rig.disk, whole_file(fd, 4 << 20, RW));
		driver_init(&d, &rig.guest, &(struct driver_config){.size = 4096, .indirect = true});
		(void)config;
		driver_start(&d, rig.engine, rig.disk, 9);
		at = guest_alloc(&rig.guest, 16 * (PIECES + 2), 16);
		table = guest_at(&rig.guest, at);
		for (int write = 1; write >= 0; write--) {
			uint64_t data = GUEST_GPA + GUEST_REGION + 8192;
			uint8_t *bytes = rig.guest.base[1] + 8192;

			*(struct virtio_blk_outhdr *)rig.guest.base[1] =
				(struct virtio_blk_outhdr){.type = write ? VIRTIO_BLK_T_OUT : VIRTIO_BLK_T_IN};
			table[0] = (struct vring_desc){GUEST_GPA + GUEST_REGION, 16, VRING_DESC_F_NEXT, 1};
			for (int i = 0; i < PIECES; i++) {
				/* Every other 512 bytes, so that nothing can be merged. */
				for (int j = 0; j < 512; j++)
					bytes[1024 * i + j] = write ? (uint8_t)(i + j) : 0;
				table[i + 1] = (struct vring_desc){data + 1024u * (unsigned)i, 512,
					VRING_DESC_F_NEXT | (write ? 0 : VRING_DESC_F_WRITE), (uint16_t)(i + 2)};
			}
			table[PIECES + 1] =
				(struct vring_desc){GUEST_GPA + GUEST_REGION + 64, 1, VRING_DESC_F_WRITE, 0};
			d.desc[0] = (struct vring_desc){GUEST_GPA + at, 16 * (PIECES + 2), VRING_DESC_F_INDIRECT, 0};
			driver_offer(&d, 0);
			driver_publish(&d);
			engine_until(rig.engine, driver_reap(&d, &written) == 0);
			CHECK_EQUAL(rig.guest.base[1][64], VIRTIO_BLK_S_OK);
			CHECK_EQUAL(written, write ? 1 : 512 * PIECES + 1);
			for (int i = 0; i < PIECES && !write; i++)
				for (int j = 0; j < 512; j++)
					CHECK_EQUAL(bytes[1024 * i + j], (uint8_t)(i + j));
		}
		driver_stop(&d);
		driver_deinit(&d);
		rig_down();
		close(fd);
	}
}

TEST(request_whose_io_failed_is_control_s_to_decide_about_if_it_says_so)
{
	static const uint32_t types[] = {VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_IN};

	rig_up(VB_IO_AUTO,
		&(struct vb_disk_config){
			.id = 77, .capacity = SIZE, .max_extents = 16, .ask_after_errors = 1 << VB_OP_WRITE});
	for (int inlined = 0; inlined < 2; inlined++) {
		int fd = open("/proc/self/exe", O_RDONLY), before = rig.requests; /* neither long enough nor writable */

		CHECK_EQUAL(ftruncate(rig.fd, 0), 0);
		disk_map(
			rig.engine, rig.disk, whole_file(fd, SIZE, VB_EXTENT_WRITE | (inlined ? VB_EXTENT_INLINE : 0)));
		driver_add(&rig.driver, 3, types[0], 8, 4096);
		driver_publish(&rig.driver);
		engine_until(rig.engine, rig.requests == before + 1);
		CHECK_EQUAL(rig.request.flags, VB_REQUEST_FAILED);
		CHECK_EQUAL(rig.request.result, -EBADF);
		CHECK_EQUAL(rig.request.offset, 4096);
		CHECK_EQUAL(rig.request.length, 4096);
		CHECK_EQUAL(driver_reap(&rig.driver, NULL), -1); /* nobody has told the driver */
		engine_tell(rig.engine, (struct vb_message){.type = VB_COMPLETE, .cookie = rig.request.cookie});
		engine_until(rig.engine, driver_reap(&rig.driver, NULL) == 3);
		CHECK_EQUAL(*driver_status(&rig.driver, 3), VIRTIO_BLK_S_OK);
		disk_map(rig.engine, rig.disk,
			whole_file(rig.fd, SIZE, VB_EXTENT_READ | (inlined ? VB_EXTENT_INLINE : 0)));
		expect(types[1], 8, 4096, VIRTIO_BLK_S_IOERR, 1);
		CHECK_EQUAL(rig.requests, before + 1);
		close(fd);
	}
	engine_until(rig.engine, rig.io_errors == 2);
	CHECK_EQUAL(rig.driver.stats->op[VB_OP_WRITE].errors, 0);
	CHECK_EQUAL(rig.driver.stats->misses, 2);
	rig_down();
}

TEST(flush_that_failed_is_control_s_to_decide_about_if_it_says_so)
{
	int fds[2];

	rig_up(VB_IO_AUTO, &(struct vb_disk_config){.id = 77, .capacity = SIZE, .ask_after_errors = 1 << VB_OP_FLUSH});
	CHECK_EQUAL(pipe(fds), 0); /* fdatasync of a pipe: EINVAL */
	set_flush(fds[1]);
	driver_add(&rig.driver, 1, VIRTIO_BLK_T_FLUSH, 0, 0);
	driver_publish(&rig.driver);
	engine_until(rig.engine, rig.requests == 1);
	CHECK_EQUAL(rig.request.flags, VB_REQUEST_FAILED);
	CHECK_EQUAL(rig.request.result, -EINVAL);
	CHECK_EQUAL(vb_disk_flush_failed(rig.disk), EINVAL); /* known before anybody is told */
	engine_tell(rig.engine,
		(struct vb_message){.type = VB_COMPLETE, .cookie = rig.request.cookie, .result = VIRTIO_BLK_S_IOERR});
	engine_until(rig.engine, driver_reap(&rig.driver, NULL) == 1);
	CHECK_EQUAL(*driver_status(&rig.driver, 1), VIRTIO_BLK_S_IOERR);
	CHECK_EQUAL(rig.io_errors, 0);
	rig_down();
	close(fds[0]);
	close(fds[1]);
}
