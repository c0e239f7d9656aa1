/*
 * Since when the oldest request in flight has been so, without a list of them: they are in two halves, of which one is
 * older than the other. When the last one of the older half ends, the younger half is the older one from then on. So what
 * is told is not later than the truth, and earlier by not more than the older half took to come together: by nothing
 * when a request was alone, by about one latency under load. export/ages.py is its twin.
 */
#pragma once
#include "common.h"

struct ages {
	uint64_t since_ns[2]; /* when the first of this half began */
	uint32_t count[2];
	uint8_t older; /* which half; not empty, unless both are */
};

/* Gives the half that the request is in, for ages_end. */
static inline uint8_t ages_begin(struct ages *ages, uint64_t now)
{
	uint8_t half = ages->count[ages->older] ? ages->older ^ 1 : ages->older;

	if (!ages->count[half]++)
		ages->since_ns[half] = now;
	return half;
}

static inline void ages_end(struct ages *ages, uint8_t half)
{
	if (!--ages->count[half] && half == ages->older && ages->count[half ^ 1])
		ages->older ^= 1;
}

/* 0: none is in flight. */
static inline uint64_t ages_oldest(const struct ages *ages)
{
	return ages->count[ages->older] ? ages->since_ns[ages->older] : 0;
}
