/*
 * A virtqueue that ends before any of its stores, for tests.inflight: the engine's own code, with a hook before each
 * store to memory that somebody else sees. Ending is a jump out of it: what was stored stays, all else is forgotten.
 */
#include <errno.h>
#include <setjmp.h>
#include <stdlib.h>
#include "src/virtqueue.h"

#define ENDED (-1000)

struct model {
	struct virtqueue vq;
	struct vb_memory *memory;
	struct chain *chain;
	jmp_buf end;
};

static struct model *running;
static uint64_t stores_left; /* 0: as many as it likes */

void vb_store_hook(void)
{
	if (running && stores_left && !--stores_left)
		longjmp(running->end, 1);
}

void model_end_before(uint64_t store)
{
	stores_left = store;
}

uint64_t model_stores_left(void)
{
	return stores_left;
}

void model_destroy(struct model *m)
{
	virtqueue_deinit(&m->vq);
	free(m->chain);
	vb_memory_unref(m->memory);
	free(m);
}

static int start(struct model *m, const struct vb_queue_config *config)
{
	int result;

	if (setjmp(m->end))
		return ENDED;
	running = m;
	result = virtqueue_init(&m->vq, m->memory, config);
	return result;
}

/* 0 or -errno, or ENDED; *ret only with 0. */
int model_create(
	const struct vb_region *region, const struct vb_queue_config *config, struct model **ret, uint32_t *replays)
{
	struct model *m = calloc(1, sizeof(*m));
	int result = vb_memory_create(region, 1, &m->memory);

	if (!result)
		result = start(m, config);
	running = NULL;
	if (result) {
		model_destroy(m);
		return result;
	}
	m->chain = virtqueue_new_chain(&m->vq);
	*replays = virtqueue_replays(&m->vq);
	*ret = m;
	return 0;
}

/* A head; -1: there is none; -100 - enum vb_broken; or ENDED. */
int model_pop(struct model *m, uint16_t *slots, uint16_t *entry)
{
	int result;

	if (setjmp(m->end)) {
		running = NULL;
		return ENDED;
	}
	running = m;
	result = virtqueue_pop(&m->vq, m->memory, m->chain);
	running = NULL;
	*slots = m->chain->slots;
	*entry = m->chain->entry;
	return result > 0 ? m->chain->head : result ? result - 100 : -1;
}

int model_push(struct model *m, uint16_t head, uint16_t slots, uint16_t entry, uint32_t written)
{
	if (setjmp(m->end)) {
		running = NULL;
		return ENDED;
	}
	running = m;
	virtqueue_push(&m->vq, head, slots, entry, written);
	running = NULL;
	return 0;
}

int model_publish(struct model *m)
{
	if (setjmp(m->end)) {
		running = NULL;
		return ENDED;
	}
	running = m;
	virtqueue_publish(&m->vq);
	running = NULL;
	return 0;
}

uint32_t model_base(const struct model *m)
{
	return virtqueue_base(&m->vq);
}

uint64_t model_config_size(void)
{
	return sizeof(struct vb_queue_config);
}

void model_fill_config(struct vb_queue_config *config, uint64_t desc, uint64_t avail, uint64_t used, uint32_t size,
	uint32_t base, uint32_t packed, uint64_t inflight, uint64_t inflight_size)
{
	*config = (struct vb_queue_config){
		.desc_uva = desc,
		.avail_uva = avail,
		.used_uva = used,
		.size = size,
		.base = base,
		.indirect = 1,
		.packed = (uint8_t)packed,
		.inflight = inflight,
		.inflight_size = inflight_size,
	};
}
