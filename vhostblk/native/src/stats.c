/*
 * stats.c: counters and latency histograms.
 *
 * Latency buckets: below 4 ns one per nanosecond, from there four per power of two. The exponent and the two bits
 * below the leading one are the bucket's number.
 */
#include "stats.h"

static uint32_t latency_bucket(uint64_t ns)
{
	uint32_t exponent, bucket;

	if (ns < 4)
		return (uint32_t)ns;
	exponent = 63u - (uint32_t)__builtin_clzll(ns);
	bucket = (exponent - 1) * 4 + (uint32_t)(ns >> (exponent - 2) & 3);
	return MIN(bucket, VB_LATENCY_BUCKETS - 1u);
}

uint64_t vb_latency_bound(uint32_t bucket)
{
	if (bucket < 4)
		return bucket;
	return (uint64_t)(4 + bucket % 4) << (bucket / 4 - 1);
}

void stats_finish(struct vb_queue_stats *stats, enum vb_op op, uint64_t bytes, bool failed, uint64_t latency_ns)
{
	struct vb_op_stats *s = &stats->op[op];

	stat_add(s->requests, 1);
	stat_add(s->bytes, failed ? 0 : bytes);
	stat_add(s->errors, failed);
	stat_add(s->latency_ns, latency_ns);
	stat_add(s->latency[latency_bucket(latency_ns)], 1);
	if (latency_ns > s->latency_max_ns)
		store_relaxed(&s->latency_max_ns, latency_ns);
}
