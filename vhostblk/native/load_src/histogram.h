/* Latencies in buckets that are at most 1/64 wide: one per tick below 64, then 64 per power of two. */
#pragma once
#include "../src/common.h"
#include "load.h"

#define SUB_BITS 6
#define SUB (1u << SUB_BITS)

static inline uint32_t histogram_bucket(uint64_t ticks)
{
	uint32_t shift, bucket;

	if (ticks < SUB)
		return (uint32_t)ticks;
	shift = 63u - (uint32_t)__builtin_clzll(ticks) - SUB_BITS;
	bucket = (shift << SUB_BITS) + (uint32_t)(ticks >> shift);
	return MIN(bucket, VB_LOAD_BUCKETS - 1u);
}

static inline uint64_t histogram_bound(uint32_t bucket)
{
	uint32_t shift;

	if (bucket < 2 * SUB)
		return bucket;
	shift = (bucket >> SUB_BITS) - 1;
	return (uint64_t)(bucket - (shift << SUB_BITS)) << shift;
}
