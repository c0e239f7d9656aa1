/* test_units.c: parts of the engine by themselves, against the simplest thing that can be right. */
#include <endian.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include "harness.h"
#include "src/ages.h"
#include "src/aio.h"
#include "src/blk.h"
#include "src/disk.h"
#include "src/extent_map.h"
#include "src/memory.h"
#include "src/stats.h"
#include "src/thread.h"
#include "src/virtqueue.h"

/* ---------------------------------------------------------------- the extent map */

#define BLOCKS 400

/* What each block of the disk is mapped to: 0, or 1 + its host block. */
static uint64_t model[BLOCKS];

static void check_sorted(const struct extent_map *map)
{
	for (uint32_t i = 0; i + 1 < map->count; i++) {
		const struct vb_extent *e = &map->entries[i].extent;

		CHECK(e->length);
		CHECK(e->offset + e->length <= map->entries[i + 1].extent.offset);
	}
	CHECK(map->count <= map->limit);
}

static void check_files(const struct extent_map *map)
{
	uint32_t extents[EXTENT_FILES] = {0};

	for (uint32_t i = 0; i < map->count; i++) {
		const struct extent_entry *entry = &map->entries[i];

		if (entry->file == EXTENT_FILES)
			continue;
		CHECK_EQUAL(map->files[entry->file].fd, entry->extent.fd);
		extents[entry->file]++;
	}
	for (uint32_t i = 0; i < EXTENT_FILES; i++)
		CHECK_EQUAL(map->files[i].extents, extents[i]);
}

/* The map may have forgotten, but what it says is so. */
static int check_against_model(struct extent_map *map)
{
	int found = 0;

	for (uint64_t i = 0; i < BLOCKS; i++) {
		const struct vb_extent *e = extent_map_find(map, i * 512, 512, VB_EXTENT_READ);

		if (!e)
			continue;
		found++;
		CHECK_EQUAL(e->host_offset + i * 512 - e->offset, (model[i] - 1) * 512);
	}
	return found;
}

/* Several at once, most often in order and apart from each other. */
static void insert_many(struct extent_map *map)
{
	struct vb_extent extents[20];
	uint32_t count = 1 + random_below(20);
	bool ordered = random_below(4);

	for (uint32_t n = 0; n < count; n++) {
		uint64_t first = ordered ? n * 20 + random_below(15) : random_below(BLOCKS - 20);
		uint64_t length = 1 + random_below(5), host = random_below(4) ? first : random_below(1000);

		extents[n] = (struct vb_extent){.offset = first * 512,
			.length = length * 512,
			.host_offset = host * 512,
			.fd = host == first ? 3 : 3 + (int)host % 12,
			.flags = VB_EXTENT_READ,
			.request_alignment = 1,
			.memory_alignment = 1};
		for (uint64_t i = 0; i < length; i++)
			model[first + i] = 1 + host + i;
	}
	extent_map_insert_all(map, extents, count);
}

static void random_extents(uint32_t limit)
{
	struct extent_map map;
	int mapped;

	extent_map_init(&map, limit);
	memset(model, 0, sizeof(model));
	for (int step = 0; step < 20000; step++) {
		uint64_t first = random_below(BLOCKS), count = 1 + random_below(MIN(BLOCKS - (uint32_t)first, 30u));
		/* Often host = guest, so that neighbours merge. */
		uint64_t host = random_below(4) ? first : random_below(1000);
		struct vb_extent e = {.offset = first * 512,
			.length = count * 512,
			.host_offset = host * 512,
			.fd = host == first ? 3 : 3 + (int)host % 12,
			.flags = VB_EXTENT_READ,
			.request_alignment = 1,
			.memory_alignment = 1};
		bool insert = random_below(3);

		CHECK(extent_valid(&e));
		if (insert)
			extent_map_insert(&map, &e);
		else
			extent_map_remove(&map, e.offset, e.length);
		for (uint64_t i = 0; i < count; i++)
			model[first + i] = insert ? 1 + host + i : 0;
		if (!random_below(8))
			insert_many(&map);
		check_sorted(&map);
		check_files(&map);
		if (step % 16 == 0) {
			mapped = 0;
			for (int i = 0; i < BLOCKS; i++)
				mapped += !!model[i];
			if (limit > BLOCKS)
				CHECK_EQUAL(check_against_model(&map), mapped);
			else
				CHECK(check_against_model(&map) <= mapped);
		}
	}
	CHECK(map.count > limit / 4 || limit > BLOCKS);
	extent_map_remove(&map, 1, UINT64_MAX);
	CHECK(map.count <= 1);
	extent_map_deinit(&map);
}

TEST(extent_map_does_as_an_array_of_blocks_does)
{
	random_extents(BLOCKS + 1);
}

TEST(extent_map_that_is_full_forgets_but_never_lies)
{
	random_extents(1);
	random_extents(2);
	random_extents(17);
	random_extents(40);
}

TEST(extents_that_continue_each_other_become_one)
{
	struct extent_map map;
	struct vb_extent e = {.length = 4096,
		.host_offset = 65536,
		.fd = 3,
		.flags = VB_EXTENT_READ,
		.request_alignment = 1,
		.memory_alignment = 1};

	extent_map_init(&map, 100);
	for (int i = 9; i >= 0; i--) {
		e.offset = (uint64_t)i * 4096;
		e.host_offset = 65536 + e.offset;
		extent_map_insert(&map, &e);
	}
	CHECK_EQUAL(map.count, 1);
	CHECK(extent_map_find(&map, 0, 40960, VB_EXTENT_READ));
	CHECK(!extent_map_find(&map, 0, 40961, VB_EXTENT_READ));
	CHECK(!extent_map_find(&map, 4096, 512, VB_EXTENT_WRITE));
	e.offset = 40960;
	e.host_offset += 512;
	extent_map_insert(&map, &e);
	CHECK_EQUAL(map.count, 2);
	/* Zeroes continue each other wherever they are. */
	e.flags = VB_EXTENT_READ | VB_EXTENT_ZERO;
	e.offset = 0;
	extent_map_insert(&map, &e);
	e.offset = 4096;
	extent_map_insert(&map, &e);
	CHECK_EQUAL(map.count, 3);
	extent_map_deinit(&map);
}

/* ---------------------------------------------------------------- notifications */

/* VIRTIO 1.2 §2.7.7.2: a notification exactly if the index passed used_event + 1; one by one and in batches, over the
 * end of the 16 bits. */
TEST(used_event_is_exact)
{
	static struct {
		_Alignas(16) struct vring_desc desc[8];
		uint16_t avail[3 + 8], used_pad;
		_Alignas(4) uint16_t used[2 + 4 * 8 + 1];
	} area;
	struct vb_region region = {.gpa = 0, .uva = 4096, .size = sizeof(area), .hva = (uint64_t)&area};
	struct vb_queue_config config = {.size = 8,
		.base = 65530,
		.event_idx = 1,
		.desc_uva = 4096,
		.avail_uva = 4096 + offsetof(typeof(area), avail),
		.used_uva = 4096 + offsetof(typeof(area), used)};
	struct vb_memory *memory;
	struct virtqueue vq;

	CHECK_EQUAL(vb_memory_create(&region, 1, &memory), 0);
	area.used[1] = 65530;
	CHECK_EQUAL(virtqueue_init(&vq, memory, &config), 0);
	vq.notified_valid = true;
	for (int step = 0; step < 100000; step++) {
		uint16_t before = vq.used_idx, count = (uint16_t)random_below(5);
		uint16_t event = (uint16_t)(before + random_below(12) - 6);
		bool expected = false;

		for (uint16_t i = 0; i < count; i++) {
			expected |= (uint16_t)(before + i) == event;
			vq.in_flight++;
			virtqueue_push(&vq, 0, 0, 0, 1);
		}
		area.avail[2 + 8] = event;
		virtqueue_publish(&vq);
		CHECK_EQUAL(area.used[1], (uint16_t)(before + count));
		CHECK_EQUAL(virtqueue_should_notify(&vq), expected);
		vq.next_avail = (uint16_t)step;
		virtqueue_disable_kicks(&vq);
		virtqueue_enable_kicks(&vq);
		CHECK_EQUAL(area.used[2 + 4 * 8], (uint16_t)step);
		CHECK_EQUAL(area.used[0], 0);
	}
	virtqueue_deinit(&vq);
	vb_memory_unref(memory);
}

/* VIRTIO 1.2 §2.8.10: a notification exactly if the descriptor of the event is among those that were used, whatever the
 * sizes of chains and of the ring, and over the wrap of the counters. */
TEST(packed_event_is_exact)
{
	static struct {
		_Alignas(16) struct vring_packed_desc desc[7];
		uint32_t driver_event, device_event;
	} area;
	struct vb_region region = {.gpa = 0, .uva = 4096, .size = sizeof(area), .hva = (uint64_t)&area};
	struct vb_queue_config config = {.size = 7,
		.packed = 1,
		.base = 0x80008000,
		.event_idx = 1,
		.desc_uva = 4096,
		.avail_uva = 4096 + offsetof(typeof(area), driver_event),
		.used_uva = 4096 + offsetof(typeof(area), device_event)};
	struct vb_memory *memory;
	struct virtqueue vq;
	uint32_t position = 0; /* modulo 14 */

	CHECK_EQUAL(vb_memory_create(&region, 1, &memory), 0);
	CHECK_EQUAL(virtqueue_init(&vq, memory, &config), 0);
	vq.notified_valid = true;
	for (int step = 0; step < 100000; step++) {
		uint32_t event = random_below(14), first = position % 7, first_wrap = position / 7;
		bool expected = false;

		for (uint32_t chains = random_below(3); chains; chains--) {
			uint16_t slots = (uint16_t)(1 + random_below(3));

			vq.in_flight += slots;
			virtqueue_push(&vq, 5, slots, 0, 1);
			for (; slots; slots--, position = (position + 1) % 14)
				expected |= position == event;
		}
		area.driver_event =
			(event % 7) | (event < 7 ? 0x8000u : 0) | (uint32_t)VRING_PACKED_EVENT_FLAG_DESC << 16;
		CHECK_EQUAL(virtqueue_has_news(&vq), position != first + 7 * first_wrap);
		virtqueue_publish(&vq);
		CHECK_EQUAL(vq.in_flight, 0);
		if (virtqueue_has_news(&vq))
			CHECK_EQUAL(
				area.desc[first].flags, first_wrap ? VRING_DESC_F_WRITE : 0x8080 | VRING_DESC_F_WRITE);
		CHECK_EQUAL(virtqueue_should_notify(&vq), expected);
		CHECK_EQUAL(virtqueue_base(&vq) >> 16, (position % 7) | (position < 7 ? 0x8000u : 0));
	}
	virtqueue_disable_kicks(&vq);
	CHECK_EQUAL(area.device_event, (uint32_t)VRING_PACKED_EVENT_FLAG_DISABLE << 16);
	virtqueue_enable_kicks(&vq);
	CHECK_EQUAL(area.device_event, (uint32_t)VRING_PACKED_EVENT_FLAG_DESC << 16 | 0x8000);
	virtqueue_deinit(&vq);
	vb_memory_unref(memory);
}

/* A position outside of the ring, and used descriptors that are ahead of those that are available. */
TEST(packed_bases_that_make_no_sense_are_refused)
{
	static _Alignas(16) uint8_t area[16 * 8 + 8];
	struct vb_region region = {.gpa = 0, .uva = 4096, .size = sizeof(area), .hva = (uint64_t)&area};
	struct vb_queue_config config = {
		.size = 6, .packed = 1, .desc_uva = 4096, .avail_uva = 4096 + 128, .used_uva = 4096 + 132};
	static const uint32_t bad[] = {0x80008006, 0x80068000, 0x80018000, 0x80000001, 0x00007fff};
	static const uint32_t good[] = {0x80008000, 0x00000000, 0x80008005, 0x80000000, 0x80050005, 0x00008000};
	struct vb_memory *memory;
	struct virtqueue vq;

	CHECK_EQUAL(vb_memory_create(&region, 1, &memory), 0);
	for (size_t i = 0; i < sizeof(bad) / sizeof(*bad); i++) {
		config.base = bad[i];
		CHECK_EQUAL(virtqueue_init(&vq, memory, &config), -EINVAL);
	}
	for (size_t i = 0; i < sizeof(good) / sizeof(*good); i++) {
		config.base = good[i];
		CHECK_EQUAL(virtqueue_init(&vq, memory, &config), 0);
		CHECK_EQUAL(virtqueue_base(&vq), good[i]);
		virtqueue_deinit(&vq);
	}
	vb_memory_unref(memory);
}

TEST(memory_maps_that_make_no_sense_are_refused)
{
	struct vb_memory *memory;
	struct vb_region good[2] = {{0, 0, 4096, 0x10000}, {4096, 0x100000, 4096, 0x20000}}, bad[2];

	for (int i = 0; i < 5; i++) {
		memcpy(bad, good, sizeof(bad));
		switch (i) {
		case 0:
			bad[1].gpa = 4095;
			break;
		case 1:
			bad[0].size = 0;
			break;
		case 2:
			bad[1].gpa = UINT64_MAX - 4094;
			break;
		case 3:
			bad[1].uva = UINT64_MAX;
			break;
		case 4:
			bad[1].hva = 0;
			break;
		}
		CHECK_EQUAL(vb_memory_create(bad, 2, &memory), -EINVAL);
	}
	CHECK_EQUAL(vb_memory_create(good, 2, &memory), 0);
	vb_memory_unref(memory);
	CHECK_EQUAL(vb_memory_create(NULL, 0, &memory), 0);
	vb_memory_unref(memory);
}

/* ---------------------------------------------------------------- latencies */

TEST(latency_buckets_are_a_quarter_wide_and_in_order)
{
	static struct vb_queue_stats stats;

	CHECK_EQUAL(vb_latency_bound(0), 0);
	for (uint32_t b = 1; b < VB_LATENCY_BUCKETS; b++) {
		uint64_t low = vb_latency_bound(b), below = vb_latency_bound(b - 1);

		CHECK(low > below);
		CHECK(low - below <= MAX(below / 4, 1u));
		memset(&stats, 0, sizeof(stats));
		stats_finish(&stats, VB_OP_READ, 1, 512, false, low);
		stats_finish(&stats, VB_OP_READ, 1, 0, true, low - 1);
		CHECK_EQUAL(stats.op[VB_OP_READ].latency[b], 1);
		CHECK_EQUAL(stats.op[VB_OP_READ].latency[b - 1], 1);
		CHECK_EQUAL(stats.op[VB_OP_READ].bytes, 512);
		CHECK_EQUAL(stats.op[VB_OP_READ].errors, 1);
		CHECK_EQUAL(stats.op[VB_OP_READ].latency_max_ns, low);
	}
	memset(&stats, 0, sizeof(stats));
	stats_finish(&stats, VB_OP_READ, 1, 0, false, UINT64_MAX);
	CHECK_EQUAL(stats.op[VB_OP_READ].latency[VB_LATENCY_BUCKETS - 1], 1);
}

/* ---------------------------------------------------------------- short transfers */

/* Whatever the kernel moves at a time, the operation goes on exactly behind it, and leaves its vector as it was. */
TEST(short_transfers_go_on_where_they_ended)
{
	static char memory[4096];

	for (int round = 0; round < 5000; round++) {
		struct iovec iov[8], before[8];
		struct aio_op op = {.iov = iov,
			.pieces = random_below(9),
			.kind = VB_IO_WRITE,
			.offset = 1000,
			.buffer = 3,
			.file = -1};
		uint64_t total = 0, done = 0;

		for (uint32_t i = 0; i < op.pieces; i++) {
			iov[i] = (struct iovec){memory + total + 50 * i, random_below(5) ? random_below(100) : 0};
			total += iov[i].iov_len;
		}
		memcpy(before, iov, sizeof(iov));
		while (done < total) {
			uint64_t n = 1 + random_below((uint32_t)(total - done)), left = 0;
			bool finished = aio_advance(&op, (int64_t)n);

			done += n;
			CHECK_EQUAL(finished, done == total);
			CHECK_EQUAL(op.offset, 1000 + done);
			CHECK_EQUAL(op.result, done);
			CHECK_EQUAL(op.buffer, -1);
			for (uint32_t i = 0; i < op.pieces; i++)
				left += op.iov[i].iov_len;
			CHECK_EQUAL(left, total - done);
			if (!finished && random_below(10) == 0) {
				CHECK(aio_advance(&op, random_below(2) ? -ENOSPC : 0));
				CHECK(op.result < 0);
				break;
			}
		}
		CHECK(!memcmp(before, iov, sizeof(iov)));
	}
}

/* ---------------------------------------------------------------- reads of the page cache */

/* Stands in for the one of libc. Of a read that must not wait it has this many bytes at hand, and then none: that is 0,
 * as Linux 5.9 and 5.10 may say it. */
static ssize_t at_hand = -1;

ssize_t preadv2(int fd, const struct iovec *iov, int count, off_t offset, int flags)
{
	ssize_t n = at_hand;

	if (at_hand < 0 || !(flags & RWF_NOWAIT))
		return syscall(SYS_preadv2, fd, iov, count, (unsigned long)offset, 0ul, flags);
	at_hand = 0;
	return pread(fd, iov->iov_base, (size_t)n, offset);
}

TEST(what_is_not_at_hand_is_not_taken_for_the_end_of_the_file)
{
	char expected[4096], data[4096];
	int fd = file_new(false, sizeof(expected));

	memset(expected, 0x5a, sizeof(expected));
	CHECK_EQUAL(pwrite(fd, expected, sizeof(expected), 0), sizeof(expected));
	for (ssize_t first = 0; first < 4096; first += 1024) {
		struct iovec iov = {data, sizeof(data)};
		struct aio_op op = {.iov = &iov, .pieces = 1, .kind = VB_IO_READ, .buffer = -1, .file = -1, .fd = fd};

		memset(data, 0, sizeof(data));
		at_hand = first;
		CHECK(!aio_try_read(&op));
		aio_run(&op);
		CHECK_EQUAL(op.result, 4096);
		CHECK(!memcmp(data, expected, sizeof(data)));
		CHECK(iov.iov_base == data && iov.iov_len == sizeof(data));
	}
	at_hand = -1;
	close(fd);
}

/* ---------------------------------------------------------------- revocations */

static int take_acks(struct vb_thread *thread, uint64_t *cookies)
{
	struct vb_message messages[16];
	int count;
	uint32_t alike;

	message_ring_publish(&thread->up, thread->up_fd);
	count = vb_thread_receive(thread, messages, 16, &alike);
	for (int i = 0; i < count; i++) {
		CHECK_EQUAL(messages[i].type, VB_ACK);
		cookies[i] = messages[i].cookie;
	}
	return count;
}

/* ---------------------------------------------------------------- requests */

/* Lengths only: nothing but the header is looked at. */
TEST(transfers_of_2_gib_are_refused)
{
	struct blk_limits limits = {.capacity = 1ull << 40};
	struct virtio_blk_outhdr header = {.type = htole32(VIRTIO_BLK_T_IN)};
	struct chain *chain = calloc(1, sizeof(*chain) + 2 * sizeof(*chain->iov));
	uint64_t lengths[] = {2147483136, 2147483648, 1ull << 39};
	struct blk_request request;
	char room;

	for (int i = 0; i < 3; i++) {
		chain->readable = chain->writable = 1;
		chain->readable_bytes = sizeof(header);
		chain->writable_bytes = lengths[i] + 1;
		chain->iov[0] = (struct iovec){&header, sizeof(header)};
		chain->iov[1] = (struct iovec){(void *)((uintptr_t)&room - lengths[i]), lengths[i] + 1};
		CHECK_EQUAL(blk_parse(chain, &limits, &request), 0);
		CHECK_EQUAL(request.length, lengths[i]);
		CHECK_EQUAL(request.status, i ? VIRTIO_BLK_S_IOERR : -1);
	}
	free(chain);
}

/* Without a thread, so that I/O ends exactly when the test says so. */
TEST(revocations_wait_for_what_they_overlap_and_began_before)
{
	struct vb_thread_options options = {.io_kind = VB_IO_THREADS};
	struct vb_thread *thread;
	struct vb_disk *disk = disk_new(1, 1 << 20);
	struct attachment *a;
	struct io_track io[3] = {{.offset = 0, .length = 4096}, {.offset = 8192, .length = 4096}, {.is_flush = true}};
	struct io_track later = {.offset = 0, .length = 4096};
	struct vb_message command = {.type = VB_REVOKE};
	uint64_t cookies[16];

	CHECK_EQUAL(thread_open(&options, &thread), 0);
	a = attachment_create(thread, disk);
	for (int i = 0; i < 3; i++)
		attachment_io_begins(a, &io[i]);
	command.cookie = 1;
	command.offset = 4096;
	command.length = 4096;
	attachment_revoke(a, &command); /* touches nothing in flight */
	CHECK_EQUAL(take_acks(thread, cookies), 1);
	CHECK_EQUAL(cookies[0], 1);
	command.cookie = 2;
	command.length = UINT64_MAX;
	attachment_revoke(a, &command); /* the second */
	command.cookie = 3;
	command.offset = 0;
	attachment_revoke(a, &command); /* both */
	command.type = VB_FLUSH_SET;
	command.cookie = 4;
	attachment_set_flush(a, &command);
	CHECK_EQUAL(take_acks(thread, cookies), 0);
	/* Mapped again meanwhile: that one counts for nobody. */
	attachment_io_begins(a, &later);
	attachment_io_ended(a, &later);
	attachment_io_ended(a, &io[0]);
	CHECK_EQUAL(take_acks(thread, cookies), 0);
	attachment_io_ended(a, &io[1]);
	CHECK_EQUAL(take_acks(thread, cookies), 2);
	CHECK_EQUAL(cookies[0] + cookies[1], 2 + 3);
	attachment_io_ended(a, &io[2]);
	CHECK_EQUAL(take_acks(thread, cookies), 1);
	CHECK_EQUAL(cookies[0], 4);
	CHECK_EQUAL(thread->owed, 0);
	attachment_destroy(a);
	thread_close(thread);
	vb_disk_unref(disk);
}

/* ---------------------------------------------------------------- ages of requests */

TEST(age_of_the_oldest_request_is_never_too_small)
{
	struct ages ages = {0};
	struct {
		uint64_t began;
		uint8_t half;
	} running[64];
	uint32_t count = 0;

	for (uint64_t now = 1; now < 20000; now++) {
		/* Many for a while, then few, then none. */
		if (count < 64 && random_below(1000) > now % 1000) {
			running[count].began = now;
			running[count++].half = ages_begin(&ages, now);
			if (count == 1)
				CHECK_EQUAL(ages_oldest(&ages), now);
		} else if (count) {
			uint32_t victim = (uint32_t)random_below(count);

			ages_end(&ages, running[victim].half);
			memmove(&running[victim], &running[victim + 1], (--count - victim) * sizeof(running[0]));
		}
		if (count)
			CHECK(ages_oldest(&ages) && ages_oldest(&ages) <= running[0].began);
		else
			CHECK_EQUAL(ages_oldest(&ages), 0);
	}
}

/* ---------------------------------------------------------------- polling */

/* As QEMU's iothreads: grows by a factor up to the limit, shrinks by a divisor, or to nothing. */
TEST(polling_adapts_by_its_factors)
{
	struct vb_thread thread = {.poll_max_ns = 32768, .poll_grow = 3};
	uint64_t poll_ns = 0;

	thread_adapt_polling(&thread, &poll_ns, 100);
	CHECK_EQUAL(poll_ns, 4000);
	thread_adapt_polling(&thread, &poll_ns, 4000); /* it was long enough */
	CHECK_EQUAL(poll_ns, 4000);
	thread_adapt_polling(&thread, &poll_ns, 4001);
	CHECK_EQUAL(poll_ns, 12000);
	thread_adapt_polling(&thread, &poll_ns, 32768);
	CHECK_EQUAL(poll_ns, 32768);
	thread.poll_shrink = 4;
	thread_adapt_polling(&thread, &poll_ns, 32769);
	CHECK_EQUAL(poll_ns, 8192);
	thread.poll_shrink = 0;
	thread_adapt_polling(&thread, &poll_ns, 32769);
	CHECK_EQUAL(poll_ns, 0);
	/* Nothing overflows. */
	thread = (struct vb_thread){.poll_max_ns = INT64_MAX, .poll_grow = INT64_MAX};
	poll_ns = 4000;
	thread_adapt_polling(&thread, &poll_ns, 5000);
	CHECK_EQUAL(poll_ns, INT64_MAX);
	/* No polling stays none. */
	thread = (struct vb_thread){.poll_max_ns = 0, .poll_grow = 2};
	poll_ns = 0;
	thread_adapt_polling(&thread, &poll_ns, 0);
	thread_adapt_polling(&thread, &poll_ns, 1);
	CHECK_EQUAL(poll_ns, 0);
}
