/* test_inflight.c: drivers that keep to no rule, on rings whose requests are tracked. */
#include <pthread.h>
#include "harness.h"
#include "src/virtqueue.h"

#define SIZE 4
#define DISK_SIZE (1u << 20)
#define ENDS 150 /* of the queue, in each test */

/* What is pushed and not shown occupies the ring as what is in flight does: a driver that offers more before it was shown
 * anything would have us remember more chains of a batch than a ring can have. */
TEST(chains_that_were_not_shown_to_the_driver_occupy_the_ring)
{
	static struct {
		_Alignas(16) struct vring_desc desc[SIZE];
		uint16_t avail[3 + SIZE];
		_Alignas(4) uint16_t used[3 + 4 * SIZE];
	} area;
	static _Alignas(8) uint8_t region[512];
	struct vb_region memory_region = {.gpa = 0, .uva = 4096, .size = sizeof(area), .hva = (uint64_t)&area};
	struct vb_queue_config config = {.size = SIZE,
		.desc_uva = 4096,
		.avail_uva = 4096 + offsetof(typeof(area), avail),
		.used_uva = 4096 + offsetof(typeof(area), used),
		.inflight = (uint64_t)region,
		.inflight_size = sizeof(region)};
	struct vb_memory *memory;
	struct virtqueue vq;
	struct chain *chain;

	for (uint16_t head = 0; head < SIZE; head++) {
		area.desc[head] = (struct vring_desc){.len = 1};
		area.avail[2 + head] = head;
	}
	CHECK_EQUAL(vb_memory_create(&memory_region, 1, &memory), 0);
	CHECK_EQUAL(virtqueue_init(&vq, memory, &config), 0);
	chain = virtqueue_new_chain(&vq);
	for (int round = 0; round < 20; round++) {
		area.avail[1] = (uint16_t)(area.avail[1] + SIZE);
		for (int i = 0; i < SIZE; i++) {
			CHECK_EQUAL(virtqueue_pop(&vq, memory, chain), 1);
			virtqueue_push(&vq, chain->head, 0, 0, 0);
		}
		/* One more than the driver may have. */
		area.avail[1]++;
		CHECK_EQUAL(virtqueue_pop(&vq, memory, chain), -VB_BROKEN_AVAIL_IDX);
		area.avail[1]--;
		virtqueue_publish(&vq);
	}
	CHECK_EQUAL(area.used[1], 20 * SIZE);
	free(chain);
	virtqueue_deinit(&vq);
	vb_memory_unref(memory);
}

/* ---------------------------------------------------------------- a driver that changes everything meanwhile */

static struct {
	struct stand *stand;
	pthread_t pthread;
	uint32_t stop;
	uint16_t ahead; /* how many chains it offers beyond those that were answered */
	bool scribbles; /* also over the ring and the region */
	uint8_t *statuses;
	bool broken;
	_Alignas(64) uint8_t region[4096];
} liar;

/* Any field of the ring or the region, some value that may even make sense. */
static void scribble(void)
{
	const struct driver_config *config = &liar.stand->driver.config;
	uint32_t ring = config->packed ? 16u * config->size + 8 : 26u * config->size + 16;
	bool tracked = random_below(2);
	uint16_t *ring_words = guest_at(&liar.stand->guest, liar.stand->driver.desc_at);
	uint16_t *words = tracked ? (uint16_t *)liar.region : ring_words;
	uint32_t count = (tracked ? 64 + 32u * config->size : ring) / 2;

	store_relaxed(&words[random_below(count)], (uint16_t)random_below(random_below(4) ? config->size + 2u : 65536));
}

/* Each byte of status says that a chain is done, earlier than the used ring does. */
static void *lie(void *opaque)
{
	struct vring_avail *avail = liar.stand->driver.avail;
	uint16_t size = liar.stand->driver.config.size, next = 0, idx = avail ? load_relaxed(&avail->idx) : 0;

	(void)opaque;
	while (!load_acquire(&liar.stop)) {
		if (avail && load_relaxed(&liar.statuses[next % size]) != 0xff) {
			store_relaxed(&liar.statuses[next++ % size], 0xff);
			store_release(&avail->idx, ++idx);
		}
		if (liar.scribbles && !random_below(50))
			scribble();
	}
	return NULL;
}

static void hear(struct engine *engine, const struct vb_message *m)
{
	if (m->type == VB_QUEUE_BROKEN)
		liar.broken = true;
	else if (m->type == VB_REQUEST)
		engine_tell(engine,
			(struct vb_message){.type = random_below(2) ? VB_COMPLETE : VB_RETRY, .cookie = m->cookie});
	else
		CHECK_EQUAL(m->type, VB_IO_ERROR);
}

/* The whole ring is available, as single descriptors and in chains. */
static void write_packed_ring(void)
{
	struct driver *d = &liar.stand->driver;
	struct vring_packed_desc *desc = guest_at(&liar.stand->guest, d->desc_at);

	memset(liar.region, 0, sizeof(liar.region));
	for (uint16_t i = 0; i < d->config.size; i++)
		desc[i] = (struct vring_packed_desc){driver_gpa(d, &liar.statuses[i]), 1 + random_below(16), i,
			1 << VRING_PACKED_DESC_F_AVAIL | random_below(4)};
}

/* A ring of chains, each a header and a status; or, every other one, a status alone, which fails at once. */
static void write_ring(uint32_t kind)
{
	struct driver *d = &liar.stand->driver;
	uint16_t size = d->config.size;

	memset(d->avail, 0, 6 + 2u * size);
	memset(d->used, 0, 6 + 8u * size);
	memset(liar.region, 0, sizeof(liar.region));
	memset(liar.statuses, 0xff, size);
	for (uint16_t i = 0; i < size; i++) {
		uint64_t status = driver_gpa(d, &liar.statuses[i]);
		bool fails = kind == 1 || (kind == 2 && i % 2);

		d->desc[i] = (struct vring_desc){status, 1, VRING_DESC_F_WRITE, 0};
		if (!fails && i + 1 < size)
			d->desc[i] = (struct vring_desc){
				driver_gpa(d, driver_status(d, 0)) - 16, 16, VRING_DESC_F_NEXT, (uint16_t)(i + 1)};
		d->avail->ring[i] = i;
	}
	d->avail->idx = liar.ahead;
}

static void start_anyhow(void)
{
	struct driver *d = &liar.stand->driver;
	struct vb_queue_config config = driver_queue_config(d);
	struct vb_message start = {
		.type = VB_QUEUE_START, .queue = 1, .disk = (uint64_t)liar.stand->disk, .pointer = (uint64_t)&config};
	int result;

	d->engine = liar.stand->engine;
	d->disk = liar.stand->disk;
	d->key = 1;
	result = engine_command(d->engine, start).result;
	d->runs = !result;
	/* What it says of requests in flight may be nonsense. */
	CHECK(!result || (liar.scribbles && (result == -EBADMSG || result == -EINVAL)));
}

static void stop_anyhow(void)
{
	struct engine *engine = liar.stand->engine;
	struct vb_message stop = {.type = VB_QUEUE_STOP, .queue = 1, .flags = (uint16_t)random_below(2)};

	if (liar.stand->driver.runs)
		CHECK_EQUAL(engine_command(engine, stop).result, 0);
	liar.stand->driver.runs = false;
}

static void lie_about_rings(bool scribbles, bool packed)
{
#ifdef __has_feature
#if __has_feature(thread_sanitizer)
	skip("the engine and this driver race, which is what this is about");
#endif
#endif
	for (uint16_t size = 2; size <= 64; size *= 2) {
		struct driver_config config = {.size = size,
			.packed = packed,
			.data_bytes = 512,
			.event_idx = size % 3 == 1,
			.no_kick_fd = true,
			.inflight = liar.region,
			.inflight_size = sizeof(liar.region)};

		memset(&liar, 0, sizeof(liar));
		liar.scribbles = scribbles;
		liar.stand = stand_new(VB_IO_THREADS, 100000, DISK_SIZE, &config);
		liar.stand->engine->on_message = hear;
		disk_map(liar.stand->engine, liar.stand->disk,
			whole_file(-1, DISK_SIZE, VB_EXTENT_READ | VB_EXTENT_ZERO));
		liar.statuses = guest_at(&liar.stand->guest, guest_alloc(&liar.stand->guest, size, 64));
		for (int end = 0; end < ENDS / 6; end++) {
			uint64_t long_enough = now_ns() + 3000000;

			liar.ahead = (uint16_t)(1 + random_below(size));
			if (packed && random_below(2))
				write_packed_ring();
			else if (!packed && (!scribbles || random_below(2)))
				write_ring(random_below(3));
			liar.broken = false;
			store_release(&liar.stop, 0);
			CHECK_EQUAL(pthread_create(&liar.pthread, NULL, lie, NULL), 0);
			start_anyhow();
			while (!liar.broken && now_ns() < long_enough)
				engine_pump(liar.stand->engine, 1);
			stop_anyhow();
			store_release(&liar.stop, 1);
			pthread_join(liar.pthread, NULL);
		}
		stand_delete(liar.stand);
	}
}

TEST(driver_that_offers_chains_before_it_is_shown_that_there_is_room_harms_only_itself)
{
	lie_about_rings(false, false);
}

TEST(driver_that_writes_where_it_likes_harms_only_itself)
{
	lie_about_rings(true, false);
	lie_about_rings(true, true);
}
