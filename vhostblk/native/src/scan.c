/*
 * scan.c: looking through memory. Which blocks are nothing but zeroes, how far numbers go on in the same way.
 */
#include <string.h>
#include "../engine.h"
#include "common.h"

static uint64_t word_at(const char *bytes)
{
	uint64_t word;

	memcpy(&word, bytes, sizeof(word));
	return word;
}

static bool is_zero(const char *bytes, uint64_t length)
{
	uint64_t at = 0;

	/* Most data show at one of their ends what they are. */
	if (!length || bytes[0] || bytes[length - 1])
		return !length;
	for (; length - at >= 64; at += 64) {
		uint64_t found = 0;

		for (uint64_t word = 0; word < 64; word += 8)
			found |= word_at(bytes + at + word);
		if (found)
			return false;
	}
	for (; at < length; at++)
		if (bytes[at])
			return false;
	return true;
}

void vb_zero_blocks(uint64_t address, uint64_t length, uint64_t first, uint64_t block, uint8_t *kinds)
{
	const char *bytes = (const char *)address;
	uint64_t size = MIN(first, length);

	while (length) {
		*kinds++ = is_zero(bytes, size);
		bytes += size;
		length -= size;
		size = MIN(block, length);
	}
}

uint64_t vb_count_steps(uint64_t address, uint64_t count, uint64_t first, uint64_t step)
{
	const uint64_t *numbers = (const uint64_t *)address;
	uint64_t alike = 0;

	while (alike < count && numbers[alike] == first) {
		first += step;
		alike++;
	}
	return alike;
}
