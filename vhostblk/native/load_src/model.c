#include <errno.h>
#include <stdlib.h>
#include "model.h"

#define SECTOR 512u
#define WORDS (SECTOR / 8)
#define UNKNOWN 0u
#define ZEROED 0xfffffffeu
#define ANYTHING 0xffffffffu /* discarded: the device may show what it likes (VIRTIO 1.2 §5.2.6.2) */
#define WRITER 0xffu

struct vb_load_model {
	uint64_t offset, size, seed;
	uint32_t block, stamp;
	uint32_t next;         /* the last generation given out */
	uint32_t *generations; /* of each block: what was written last, or one of the words above */
	uint8_t *busy;         /* of each block: WRITER, or the number of readers */
};

int vb_load_model_create(
	uint64_t offset, uint64_t size, uint32_t block, uint64_t seed, uint32_t stamp, struct vb_load_model **ret)
{
	struct vb_load_model *model;

	if (!size || block < SECTOR || block % SECTOR || offset % SECTOR || size % block)
		return -EINVAL;
	model = calloc(1, sizeof(*model));
	if (!model)
		return -ENOMEM;
	*model = (struct vb_load_model){.offset = offset, .size = size, .seed = seed, .block = block, .stamp = stamp};
	model->generations = calloc(size / block, sizeof(*model->generations));
	model->busy = calloc(size / block, 1);
	if (!model->generations || !model->busy) {
		vb_load_model_destroy(model);
		return -ENOMEM;
	}
	*ret = model;
	return 0;
}

void vb_load_model_destroy(struct vb_load_model *model)
{
	if (!model)
		return;
	free(model->generations);
	free(model->busy);
	free(model);
}

uint64_t vb_load_model_known(const struct vb_load_model *model)
{
	uint64_t known = 0;

	for (uint64_t i = 0; i < model->size / model->block; i++)
		known += model->generations[i] != UNKNOWN && model->generations[i] != ANYTHING;
	return known;
}

static uint64_t first_of(const struct vb_load_model *model, uint64_t offset)
{
	return (offset - model->offset) / model->block;
}

static uint64_t end_of(const struct vb_load_model *model, uint64_t offset, uint32_t length)
{
	return (offset - model->offset + length + model->block - 1) / model->block;
}

static bool lock_block(uint8_t *busy, bool exclusive)
{
	uint8_t now = load_relaxed(busy);

	do {
		if (exclusive ? now != 0 : now >= WRITER - 1)
			return false;
	} while (!__atomic_compare_exchange_n(
		busy, &now, exclusive ? WRITER : (uint8_t)(now + 1), false, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED));
	return true;
}

static void unlock_block(uint8_t *busy, bool exclusive)
{
	if (exclusive)
		store_release(busy, 0);
	else
		__atomic_fetch_sub(busy, 1, __ATOMIC_RELEASE);
}

bool model_lock(struct vb_load_model *model, uint64_t offset, uint32_t length, bool exclusive)
{
	uint64_t first = first_of(model, offset), end = end_of(model, offset, length);

	for (uint64_t i = first; i < end; i++)
		if (!lock_block(&model->busy[i], exclusive)) {
			while (i > first)
				unlock_block(&model->busy[--i], exclusive);
			return false;
		}
	return true;
}

void model_unlock(struct vb_load_model *model, uint64_t offset, uint32_t length, bool exclusive)
{
	uint64_t first = first_of(model, offset), end = end_of(model, offset, length);

	for (uint64_t i = first; i < end; i++)
		unlock_block(&model->busy[i], exclusive);
}

uint32_t model_next_generation(struct vb_load_model *model)
{
	uint32_t generation;

	do
		generation = __atomic_add_fetch(&model->next, 1, __ATOMIC_RELAXED);
	while (generation == UNKNOWN || generation >= ZEROED);
	return generation;
}

static void set(struct vb_load_model *model, uint64_t offset, uint32_t length, uint32_t generation)
{
	uint64_t end = end_of(model, offset, length);

	for (uint64_t i = first_of(model, offset); i < end; i++)
		store_relaxed(&model->generations[i], generation);
}

void model_written(struct vb_load_model *model, uint64_t offset, uint32_t length, uint32_t generation)
{
	set(model, offset, length, generation);
}

void model_zeroed(struct vb_load_model *model, uint64_t offset, uint32_t length)
{
	set(model, offset, length, ZEROED);
}

void model_discarded(struct vb_load_model *model, uint64_t offset, uint32_t length)
{
	set(model, offset, length, ANYTHING);
}

bool model_knows(const struct vb_load_model *model, uint64_t offset)
{
	uint32_t generation = load_relaxed(&model->generations[first_of(model, offset)]);

	return generation != UNKNOWN && generation != ANYTHING;
}

/* Every bit of the result depends on every bit of the arguments. */
static uint64_t mix(uint64_t a, uint64_t b, uint64_t c)
{
	uint64_t x = a * 0x9e3779b97f4a7c15u;

	x = (x ^ x >> 32 ^ b) * 0xd6e8feb86659fd93u;
	x = (x ^ x >> 32 ^ c) * 0xd6e8feb86659fd93u;
	return x ^ x >> 32;
}

/* Word 0 says where the sector belongs, word 1 which write it was; the others follow from both and from the seed. */
static void make_sector(const struct vb_load_model *model, uint64_t offset, uint64_t generation, uint64_t *words)
{
	uint64_t base = mix(model->seed, offset, generation);

	for (uint64_t i = 2; i < WORDS; i++)
		words[i] = base + i * 0x9e3779b97f4a7c15u;
	words[0] = offset;
	words[1] = generation;
}

void vb_load_model_sector(const struct vb_load_model *model, uint64_t offset, uint64_t generation, void *sector)
{
	uint64_t words[WORDS];

	make_sector(model, offset, generation, words);
	memcpy(sector, words, SECTOR);
}

static uint64_t stamped(const struct vb_load_model *model, uint32_t generation)
{
	return (uint64_t)model->stamp << 32 | generation;
}

void model_fill(const struct vb_load_model *model, uint64_t offset, uint32_t generation, void *to, uint32_t length)
{
	for (uint32_t done = 0; done < length; done += SECTOR)
		make_sector(model, offset + done, stamped(model, generation), (uint64_t *)((char *)to + done));
}

static bool differs(uint64_t offset, const uint64_t *expected, const void *found, struct vb_load_error *error)
{
	const uint8_t *a = (const uint8_t *)expected, *b = found;
	uint32_t at = 0;

	if (!memcmp(a, b, SECTOR))
		return false;
	while (at < SECTOR - 1 && a[at] == b[at])
		at++;
	error->offset = offset;
	error->at = at;
	memcpy(error->expected, a, SECTOR);
	memcpy(error->sector, b, SECTOR);
	return true;
}

bool model_check(const struct vb_load_model *model, uint64_t offset, const void *from, uint32_t length, bool known_only,
	uint64_t *compared, struct vb_load_error *error)
{
	static const uint64_t zeroes[WORDS];
	uint64_t words[WORDS];

	for (uint32_t done = 0; done < length; done += SECTOR) {
		const char *found = (const char *)from + done;
		uint32_t generation = load_relaxed(&model->generations[first_of(model, offset + done)]);
		const uint64_t *expected = words;
		uint64_t whole;

		if (generation == ANYTHING || (generation == UNKNOWN && known_only))
			continue;
		if (generation == ZEROED) {
			expected = zeroes;
		} else {
			whole = stamped(model, generation);
			if (generation == UNKNOWN)
				memcpy(&whole, found + 8, 8);
			make_sector(model, offset + done, whole, words);
		}
		*compared += SECTOR;
		if (differs(offset + done, expected, found, error)) {
			error->expected_generation =
				generation == UNKNOWN || generation == ZEROED ? 0 : stamped(model, generation);
			error->expected_zero = generation == ZEROED;
			return false;
		}
	}
	return true;
}
