/*
 * dirty.c: maps of what was written.
 *
 * Theory of operation: engine threads only set bits, control only takes them, each by one atomic operation on a word, so
 * that none is lost or seen twice. Pair [D1]: the data of a write are in the file before its bits are set, and control
 * takes the bits before it reads the data. So whoever takes a bit sees the data, or the bit comes once more. This needs a
 * read-modify-write also where the bit is set already: a look at it could be done before the data are there for others.
 */
#include "dirty.h"

#define WORD_BITS 64

/* The bits [first, last] of one word. */
static uint64_t mask_of(uint64_t first, uint64_t last)
{
	return (~0ull >> (WORD_BITS - 1 - (last - first))) << first;
}

void dirty_map_mark(const struct vb_dirty_map *map, uint64_t offset, uint64_t length)
{
	uint64_t *words = (uint64_t *)map->words;
	uint64_t first = offset >> map->shift, end = ((offset + length - 1) >> map->shift) + 1;

	end = MIN(end, map->bits);
	while (first < end) {
		uint64_t next = MIN((first / WORD_BITS + 1) * WORD_BITS, end);

		__atomic_fetch_or(&words[first / WORD_BITS], mask_of(first % WORD_BITS, (next - 1) % WORD_BITS),
			__ATOMIC_ACQ_REL); /* [D1] */
		first = next;
	}
}

void dirty_raise(uint64_t *highest, uint64_t end)
{
	uint64_t seen = load_relaxed(highest);

	while (seen < end &&
		!__atomic_compare_exchange_n(highest, &seen, end, true, __ATOMIC_RELEASE, __ATOMIC_RELAXED))
		;
}

/* The runs of one word, the first of which may go on with the last run of the word before. */
static uint32_t add_runs(uint64_t word, uint64_t first, struct vb_range *runs, uint32_t count)
{
	while (word) {
		uint32_t start = (uint32_t)__builtin_ctzll(word);
		uint64_t rest = word >> start;
		uint32_t length = ~rest ? (uint32_t)__builtin_ctzll(~rest) : WORD_BITS;

		if (count && runs[count - 1].offset + runs[count - 1].length == first + start)
			runs[count - 1].length += length;
		else
			runs[count++] = (struct vb_range){first + start, length};
		if (start + length == WORD_BITS)
			break;
		word = rest >> length << (start + length);
	}
	return count;
}

uint32_t vb_dirty_map_take(const struct vb_dirty_map *map, uint64_t *word, struct vb_range *ranges, uint32_t max)
{
	uint64_t *words = (uint64_t *)map->words;
	uint64_t count_words = (map->bits + WORD_BITS - 1) / WORD_BITS;
	uint32_t count = 0;

	/* A word has no more runs than every other bit. */
	for (; *word < count_words && max - count >= WORD_BITS / 2; (*word)++)
		if (load_relaxed(&words[*word]))
			count = add_runs(__atomic_exchange_n(&words[*word], 0, __ATOMIC_ACQ_REL), /* [D1] */
				*word * WORD_BITS, ranges, count);
	for (uint32_t i = 0; i < count; i++) {
		ranges[i].offset <<= map->shift;
		ranges[i].length <<= map->shift;
	}
	return count;
}
