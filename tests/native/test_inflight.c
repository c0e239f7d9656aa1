/* test_inflight.c: drivers that keep to no rule, on rings whose requests are tracked. */
#include "harness.h"
#include "src/virtqueue.h"

#define SIZE 4

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
