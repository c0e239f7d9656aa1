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

void stats_finish(struct vb_queue_stats *stats, enum vb_op op, uint64_t requests, uint64_t bytes, bool failed,
	uint64_t latency_ns)
{
	struct vb_op_stats *s = &stats->op[op];

	stat_add(s->requests, requests);
	stat_add(s->bytes, bytes);
	stat_add(s->errors, failed ? requests : 0);
	stat_add(s->latency_ns, latency_ns * requests);
	stat_add(s->latency[latency_bucket(latency_ns)], requests);
	if (latency_ns > s->latency_max_ns)
		store_relaxed(&s->latency_max_ns, latency_ns);
}

void stats_batch_finish(struct stats_batch *batch, struct vb_queue_stats *stats, uint64_t latency_ns)
{
	while (batch->ops) {
		enum vb_op op = (enum vb_op)__builtin_ctz(batch->ops);

		stats_finish(stats, op, batch->op[op].requests, batch->op[op].bytes, false, latency_ns);
		batch->op[op].requests = batch->op[op].bytes = 0;
		batch->ops &= batch->ops - 1;
	}
}
