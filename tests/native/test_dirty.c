/* test_dirty.c: what the engine remembers of where it has written. */
#include <fcntl.h>
#include "harness.h"
#include "src/dirty.h"

#define THREADS 3
#define TOKENS 5
#define REGION (64u << 10) /* of the disk, per token: nobody else writes there */
#define SIZE ((uint64_t)THREADS * TOKENS * REGION)
#define RW (VB_EXTENT_READ | VB_EXTENT_WRITE)

static struct vb_dirty_map *map_new(uint64_t size, uint32_t shift)
{
	struct vb_dirty_map *map = calloc(1, sizeof(*map));

	map->bits = (size + (1ull << shift) - 1) >> shift;
	map->words = (uint64_t)calloc((map->bits + 63) / 64, 8);
	map->shift = shift;
	return map;
}

static void map_delete(struct vb_dirty_map *map)
{
	free((void *)map->words);
	free(map);
}

/* Take everything, a few ranges at a time; counts how often each sector was in one. Returns the number of ranges. */
static uint32_t take(const struct vb_dirty_map *map, uint8_t *sectors)
{
	struct vb_range ranges[40];
	uint32_t count, total = 0, max = 32 + random_below(8);
	uint64_t word = 0;

	while ((count = vb_dirty_map_take(map, &word, ranges, max))) {
		CHECK(count <= max);
		for (uint32_t i = 0; i < count; i++)
			for (uint64_t at = ranges[i].offset; at < ranges[i].offset + ranges[i].length; at += 512)
				sectors[at / 512]++;
		total += count;
	}
	return total;
}

TEST(dirty_map_does_as_an_array_does)
{
	for (int round = 0; round < 3000; round++) {
		uint32_t shift = 9 + random_below(4), sectors = 1 + random_below(2000);
		uint32_t grain = 1u << (shift - 9), bits = (sectors + grain - 1) / grain;
		uint8_t *found = calloc(bits * grain + 1, 1), *expected = calloc(bits * grain + 1, 1);
		struct vb_dirty_map *map = map_new(sectors * 512ull, shift);

		for (uint32_t writes = random_below(20); writes; writes--) {
			uint32_t first = random_below(sectors), count = 1 + random_below(sectors);

			/* Some reach beyond the map: the disk has just grown. */
			dirty_map_mark(map, first * 512ull, count * 512ull);
			for (uint32_t i = first / grain; i < bits && i * grain < first + count; i++)
				memset(expected + i * grain, 1, grain);
		}
		take(map, found);
		CHECK(!memcmp(found, expected, bits * grain));
		CHECK_EQUAL(take(map, found), 0);
		map_delete(map);
		free(found);
		free(expected);
	}
}

TEST(runs_do_not_end_where_words_do)
{
	static uint8_t found[1024];
	struct vb_dirty_map *map = map_new(1024 * 512, 9);

	dirty_map_mark(map, 63 * 512, 130 * 512);
	CHECK_EQUAL(take(map, found), 1);
	dirty_map_mark(map, 0, 1024 * 512);
	CHECK_EQUAL(take(map, found), 1);
	map_delete(map);
}

/* ---------------------------------------------------------------- by the engine */

static struct {
	struct engine *engines[THREADS];
	struct driver drivers[THREADS];
	struct guest guest;
	struct vb_disk *disk;
	struct vb_dirty_map *map;
	int fd, io_errors;
	uint64_t highest;
	uint8_t taken[SIZE / 512], written[SIZE / 512];
	int done[THREADS], asked[THREADS];
} rig;

static void note(struct engine *engine, const struct vb_message *m)
{
	(void)engine;
	CHECK_EQUAL(m->type, VB_IO_ERROR);
	rig.io_errors++;
}

static void rig_up(int fd, uint32_t flags, uint32_t shift)
{
	struct driver_config config = {.size = 16, .data_bytes = REGION};

	memset(&rig, 0, sizeof(rig));
	guest_init(&rig.guest);
	rig.disk = disk_new(1, SIZE);
	rig.fd = fd;
	rig.map = map_new(SIZE, shift);
	vb_disk_set_dirty_map(rig.disk, rig.map);
	for (uint32_t i = 0; i < THREADS; i++) {
		rig.engines[i] = engine_new(VB_IO_AUTO, 0);
		rig.engines[i]->on_message = note;
		disk_attach(rig.engines[i], rig.disk, rig.guest.memory);
		disk_map(rig.engines[i], rig.disk, whole_file(fd, SIZE, RW | flags));
		driver_init(&rig.drivers[i], &rig.guest, &config);
		CHECK(rig.drivers[i].tokens >= TOKENS);
		driver_start(&rig.drivers[i], rig.engines[i], rig.disk, 1);
	}
}

static void rig_down(void)
{
	for (int i = 0; i < THREADS; i++) {
		driver_stop(&rig.drivers[i]);
		disk_detach(rig.engines[i], rig.disk);
		engine_delete(rig.engines[i]);
		driver_deinit(&rig.drivers[i]);
	}
	map_delete(rig.map);
	vb_disk_unref(rig.disk);
	guest_deinit(&rig.guest);
	close(rig.fd);
}

/* Every thread has answered a command that is later than all that was done before. */
static void settle(void)
{
	struct vb_message nothing = {.type = VB_REVOKE, .disk = (uint64_t)rig.disk};

	for (int i = 0; i < THREADS; i++)
		CHECK_EQUAL(engine_command(rig.engines[i], nothing).result, 0);
}

static void write_somewhere(int thread, uint16_t token)
{
	uint32_t region = ((uint32_t)thread * TOKENS + token) * (REGION / 512);
	uint32_t first = random_below(REGION / 512), count = 1 + random_below(REGION / 512 - first);

	memset(rig.taken + region, 0, REGION / 512);
	memset(rig.written + region, 0, REGION / 512);
	memset(rig.written + region + first, 1, count);
	rig.highest = MAX(rig.highest, (uint64_t)(region + first + count) * 512);
	driver_add(&rig.drivers[thread], token, VIRTIO_BLK_T_OUT, region + first, count * 512);
	rig.asked[thread]++;
}

/* What is dirty in the token's region is exactly what was written there last. */
static void check_region(int thread, uint16_t token)
{
	uint32_t region = ((uint32_t)thread * TOKENS + token) * (REGION / 512), grain = 1u << (rig.map->shift - 9);

	for (uint32_t i = region; i < region + REGION / 512; i += grain) {
		bool expected = false;

		for (uint32_t j = i; j < i + grain; j++)
			expected |= rig.written[j];
		CHECK_EQUAL(!!rig.taken[i], expected);
	}
}

static void exchange_map(void)
{
	struct vb_dirty_map *old = rig.map;

	rig.map = map_new(SIZE, old->shift);
	vb_disk_set_dirty_map(rig.disk, rig.map);
	take(old, rig.taken);
	settle();
	take(old, rig.taken);
	map_delete(old);
}

static void under_load(uint32_t flags, uint32_t shift, int writes, bool exchange)
{
	uint64_t end = now_ns() + DEADLINE, highest = 0;
	int total = 0;

	rig_up(file_new(false, SIZE), flags, shift);
	for (int i = 0; i < THREADS; i++) {
		for (uint16_t token = 0; token < TOKENS; token++)
			write_somewhere(i, token);
		driver_publish(&rig.drivers[i]);
	}
	while (total < THREADS * writes) {
		CHECK(now_ns() < end);
		for (int i = 0; i < THREADS; i++) {
			int token;

			while ((token = driver_reap(&rig.drivers[i], NULL)) >= 0) {
				CHECK_EQUAL(*driver_status(&rig.drivers[i], (uint16_t)token), VIRTIO_BLK_S_OK);
				/* It was marked before the driver could know. */
				take(rig.map, rig.taken);
				check_region(i, (uint16_t)token);
				total++;
				if (rig.asked[i] < writes)
					write_somewhere(i, (uint16_t)token);
			}
			driver_publish(&rig.drivers[i]);
		}
		highest = MAX(highest, vb_disk_take_highest_write(rig.disk));
		if (exchange && random_below(3) == 0)
			exchange_map();
		engine_pump(rig.engines[0], 0);
	}
	CHECK_EQUAL(take(rig.map, rig.taken), 0);
	CHECK_EQUAL(MAX(highest, vb_disk_take_highest_write(rig.disk)), rig.highest);
	CHECK_EQUAL(vb_disk_take_highest_write(rig.disk), 0);
	CHECK_EQUAL(vb_disk_write_gen(rig.disk), total);
	rig_down();
}

TEST(writes_are_marked_before_their_drivers_know_inline)
{
	under_load(VB_EXTENT_INLINE, 9, 2000, false);
}

TEST(writes_are_marked_before_their_drivers_know_page_cache)
{
	under_load(VB_EXTENT_CACHED, 12, 1000, false);
}

TEST(writes_are_marked_before_their_drivers_know_uring)
{
	under_load(0, 16, 1000, false);
}

TEST(nothing_is_lost_when_the_map_is_exchanged_under_load)
{
	under_load(VB_EXTENT_INLINE, 12, 1500, true);
	under_load(0, 9, 700, true);
}

TEST(failed_writes_are_marked_all_the_same)
{
	int fd = open("/dev/full", O_RDWR | O_CLOEXEC);

	CHECK(fd >= 0);
	rig_up(fd, 0, 9);
	write_somewhere(1, 2);
	driver_publish(&rig.drivers[1]);
	engine_until(rig.engines[1], driver_reap(&rig.drivers[1], NULL) == 2);
	CHECK_EQUAL(*driver_status(&rig.drivers[1], 2), VIRTIO_BLK_S_IOERR);
	engine_until(rig.engines[1], rig.io_errors == 1);
	take(rig.map, rig.taken);
	check_region(1, 2);
	CHECK_EQUAL(vb_disk_take_highest_write(rig.disk), rig.highest);
	CHECK_EQUAL(vb_disk_write_gen(rig.disk), 1);
	rig_down();
}

TEST(a_disk_without_a_map_marks_nowhere)
{
	rig_up(file_new(false, SIZE), VB_EXTENT_INLINE, 9);
	vb_disk_set_dirty_map(rig.disk, NULL);
	write_somewhere(0, 0);
	driver_publish(&rig.drivers[0]);
	engine_until(rig.engines[0], driver_reap(&rig.drivers[0], NULL) == 0);
	CHECK_EQUAL(take(rig.map, rig.taken), 0);
	CHECK_EQUAL(vb_disk_take_highest_write(rig.disk), rig.highest);
	rig_down();
}
