/* test_suspend.c: queues that stop with requests in flight. */
#include "harness.h"

#define SIZE (1u << 20)

static _Alignas(4096) uint8_t region[8192];

static struct vb_message collected[64];
static int collected_count;

static void collect(struct engine *engine, const struct vb_message *m)
{
	(void)engine;
	CHECK_EQUAL(m->type, VB_REQUEST);
	collected[collected_count++] = *m;
}

static void answer(struct engine *engine, int number, int status)
{
	engine_tell(
		engine, (struct vb_message){.type = VB_COMPLETE, .cookie = collected[number].cookie, .result = status});
}

static int reaped(struct driver *driver)
{
	int count = 0;

	while (driver_reap(driver, NULL) >= 0)
		count++;
	return count;
}

/* Control has eight: one is answered, one comes back to be tried again, the rest are left. */
static void stop_while_control_has_them(bool packed)
{
	struct driver_config config = {.size = 16,
		.data_bytes = 512,
		.indirect = true,
		.packed = packed,
		.inflight = region,
		.inflight_size = sizeof(region)};
	struct stand *s = stand_new(VB_IO_AUTO, 0, SIZE, &config);
	uint64_t stop;
	struct vb_message ack;

	memset(region, 0, sizeof(region));
	collected_count = 0;
	s->engine->on_message = collect;
	for (uint16_t token = 0; token < 8; token++)
		driver_add(&s->driver, token, VIRTIO_BLK_T_IN, token, 512);
	driver_publish(&s->driver);
	driver_start(&s->driver, s->engine, s->disk, 1);
	engine_until(s->engine, collected_count == 8);
	stop = engine_send(s->engine, (struct vb_message){.type = VB_QUEUE_STOP, .queue = 1, .flags = 1});
	answer(s->engine, 0, VIRTIO_BLK_S_OK);
	engine_tell(s->engine, (struct vb_message){.type = VB_RETRY, .cookie = collected[1].cookie});
	for (int i = 2; i < 8; i++)
		answer(s->engine, i, VB_SUSPENDED);
	ack = engine_wait(s->engine, stop);
	CHECK_EQUAL(ack.result, 0);
	s->driver.runs = false;
	s->driver.config.start = (uint32_t)ack.aux;
	CHECK_EQUAL(reaped(&s->driver), 1);
	/* Whoever has the ring next has seven to do, before all others. */
	collected_count = 0;
	driver_start(&s->driver, s->engine, s->disk, 2);
	engine_until(s->engine, collected_count == 7);
	for (int i = 0; i < 7; i++) {
		CHECK_EQUAL(collected[i].offset, 512u * (uint32_t)(i + 1));
		answer(s->engine, i, VIRTIO_BLK_S_OK);
	}
	driver_stop(&s->driver);
	CHECK_EQUAL(reaped(&s->driver), 7);
	stand_delete(s);
}

TEST(requests_that_control_has_stay_in_flight)
{
	stop_while_control_has_them(false);
}

TEST(requests_that_control_has_stay_in_flight_in_a_packed_ring)
{
	stop_while_control_has_them(true);
}

/* The kernel and the pool have them: what is done is done, the rest comes again, and each comes once. */
static void stop_again_and_again(enum vb_io_kind kind, uint32_t flags, bool packed)
{
	struct driver_config config = {.size = 64,
		.data_bytes = 4096,
		.indirect = true,
		.packed = packed,
		.inflight = region,
		.inflight_size = sizeof(region)};
	struct stand *s = stand_new(kind, 0, SIZE, &config);
	int fd = file_new(true, SIZE), done = 0, left = 0;

	memset(region, 0, sizeof(region));
	disk_map(s->engine, s->disk, whole_file(fd, SIZE, flags | VB_EXTENT_READ | VB_EXTENT_WRITE));
	for (uint32_t round = 0; round < 30; round++) {
		struct vb_message ack;
		int now;

		for (uint16_t token = 0; token < 32; token++)
			driver_add(&s->driver, token, token % 2 ? VIRTIO_BLK_T_OUT : VIRTIO_BLK_T_IN, token * 8u, 4096);
		driver_publish(&s->driver);
		driver_start(&s->driver, s->engine, s->disk, 2 * round + 1);
		ack = engine_command(
			s->engine, (struct vb_message){.type = VB_QUEUE_STOP, .queue = 2 * round + 1, .flags = 1});
		CHECK_EQUAL(ack.result, 0);
		s->driver.runs = false;
		s->driver.config.start = (uint32_t)ack.aux;
		now = reaped(&s->driver);
		driver_start(&s->driver, s->engine, s->disk, 2 * round + 2);
		for (uint64_t end = now_ns() + DEADLINE; now < 32; now += reaped(&s->driver))
			CHECK(now_ns() < end);
		driver_stop(&s->driver);
		done += now;
		left += reaped(&s->driver);
	}
	CHECK_EQUAL(done, 30 * 32);
	CHECK_EQUAL(left, 0);
	stand_delete(s);
	close(fd);
}

TEST(queue_that_stops_with_io_in_the_kernel_loses_nothing)
{
	stop_again_and_again(VB_IO_AUTO, 0, false);
	stop_again_and_again(VB_IO_AUTO, 0, true);
}

TEST(queue_that_stops_with_io_in_the_pool_loses_nothing)
{
	stop_again_and_again(VB_IO_THREADS, 0, false);
	stop_again_and_again(VB_IO_AUTO, VB_EXTENT_POOL, true);
}
