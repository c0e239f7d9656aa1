/* test_rest.c: queues that have nothing to do while others of their thread do. */
#include "harness.h"
#include "src/queue.h"
#include "src/thread.h"

#define DISK_SIZE (1u << 20)
#define QUIET 40

static struct driver_config small = {.size = 16, .data_bytes = 4096, .event_idx = true};

struct rig {
	struct engine *engine;
	struct guest guest;
	struct vb_disk *disk;
	struct driver busy, quiet[QUIET];
};

static void rig_init(struct rig *rig, uint64_t poll_ns)
{
	struct vb_extent extent = whole_file(-1, DISK_SIZE, VB_EXTENT_NULL | VB_EXTENT_READ | VB_EXTENT_WRITE);

	rig->engine = engine_new(VB_IO_THREADS, poll_ns);
	rig->disk = disk_new(1, DISK_SIZE);
	guest_init(&rig->guest);
	disk_attach(rig->engine, rig->disk, rig->guest.memory);
	disk_map(rig->engine, rig->disk, extent);
	for (uint32_t i = 0; i < QUIET; i++) {
		driver_init(&rig->quiet[i], &rig->guest, &small);
		driver_start(&rig->quiet[i], rig->engine, rig->disk, 2 + i);
	}
	driver_init(&rig->busy, &rig->guest, &small);
	driver_start(&rig->busy, rig->engine, rig->disk, 1);
}

static void rig_deinit(struct rig *rig)
{
	driver_stop(&rig->busy);
	driver_deinit(&rig->busy);
	for (uint32_t i = 0; i < QUIET; i++) {
		driver_stop(&rig->quiet[i]);
		driver_deinit(&rig->quiet[i]);
	}
	disk_detach(rig->engine, rig->disk);
	engine_delete(rig->engine);
	vb_disk_unref(rig->disk);
	guest_deinit(&rig->guest);
}

static void ask(struct driver *driver)
{
	driver_add(driver, 0, VIRTIO_BLK_T_IN, 0, 4096);
	driver_publish(driver);
}

static bool answered(struct driver *driver)
{
	return driver_reap(driver, NULL) == 0;
}

/* One request of the busy queue, so that its thread always has something to do. */
static void keep_busy(struct rig *rig)
{
	uint64_t end = now_ns() + DEADLINE;

	ask(&rig->busy);
	while (!answered(&rig->busy))
		CHECK(now_ns() < end);
}

/* Whether the driver would have to kick for its next chain: the device waits for that. */
static bool wants_kick(const struct driver *driver)
{
	uint16_t event = load_relaxed((uint16_t *)&driver->used->ring[driver->config.size]);

	return vring_need_event(event, (uint16_t)(driver->published + 1), driver->published);
}

TEST(queues_that_rest_are_heard_while_another_keeps_the_thread_busy)
{
	struct rig rig;
	uint64_t kicks;

	rig_init(&rig, 1000000000);
	for (int round = 0; round < 3; round++) {
		for (uint32_t i = 0; i < QUIET; i++) {
			uint64_t end = now_ns() + DEADLINE;

			/* It has worked, in the rounds after the first, and goes to rest again. */
			while (!wants_kick(&rig.quiet[i])) {
				keep_busy(&rig);
				CHECK(now_ns() < end);
			}
			kicks = load_relaxed(&rig.quiet[i].stats->kicks);
			ask(&rig.quiet[i]);
			while (!answered(&rig.quiet[i])) {
				keep_busy(&rig);
				CHECK(now_ns() < end);
			}
			CHECK_EQUAL(load_relaxed(&rig.quiet[i].stats->kicks), kicks + 1);
		}
	}
	rig_deinit(&rig);
}

TEST(queues_wake_each_other_from_sleep_in_any_order)
{
	struct rig rig;

	rig_init(&rig, 0);
	for (int round = 0; round < 2000; round++) {
		struct driver *one = &rig.quiet[random_below(QUIET)], *other = &rig.quiet[random_below(QUIET)];

		ask(one);
		if (other != one)
			ask(other);
		while (!answered(one))
			CHECK(driver_wait(one, 20000));
		while (other != one && !answered(other))
			CHECK(driver_wait(other, 20000));
	}
	rig_deinit(&rig);
}
