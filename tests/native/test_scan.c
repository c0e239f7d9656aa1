/* test_scan.c: looking through memory reads what it is about, and nothing beside it. */
#include "harness.h"

TEST(blocks_are_zeroes_if_all_their_bytes_are)
{
	for (uint32_t round = 0; round < 4000; round++) {
		uint64_t length = 1 + random_below(700), first = 1 + random_below(300), block = 1 + random_below(300);
		uint64_t count = 1, number = 0;
		uint8_t *data = calloc(1, length), *kinds, *expected; /* of these sizes: ASan sees any byte beyond */

		if (length > first)
			count += (length - first + block - 1) / block;
		kinds = malloc(count);
		expected = malloc(count);
		for (uint32_t i = random_below(4); i-- > 0;)
			data[random_below((uint32_t)length)] = 1 << random_below(8);
		for (uint64_t at = 0, end = MIN(first, length); at < length; number++) {
			expected[number] = 1;
			for (; at < end; at++)
				expected[number] &= !data[at];
			end = MIN(end + block, length);
		}
		CHECK_EQUAL(number, count);
		vb_zero_blocks((uint64_t)data, length, first, block, kinds);
		CHECK(!memcmp(kinds, expected, count));
		free(data);
		free(kinds);
		free(expected);
	}
}

TEST(numbers_are_counted_as_far_as_they_go_on_alike)
{
	for (uint32_t round = 0; round < 4000; round++) {
		uint64_t count = random_below(100), first = random_below(1000), step = random_below(3) * 512;
		uint64_t *numbers = malloc(count * sizeof(*numbers)), expected = count;

		for (uint64_t at = 0; at < count; at++)
			numbers[at] = first + at * step;
		if (count && random_below(2)) {
			expected = random_below((uint32_t)count);
			numbers[expected] ^= 1ull << random_below(64);
		}
		CHECK_EQUAL(vb_count_steps((uint64_t)numbers, count, first, step), expected);
		free(numbers);
	}
}
