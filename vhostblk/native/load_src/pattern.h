/* What to ask next: operation, place and length, from one queue's seed. */
#pragma once
#include "../src/common.h"
#include "load.h"

struct pattern {
	uint64_t state; /* of the random numbers */
	uint64_t begin; /* sequential: this queue's part of the range, and where it is in it; bytes */
	uint64_t end;
	uint64_t at;
	uint64_t left;   /* requests to come */
	uint32_t writes; /* since the last flush */
	uint32_t only;   /* the one operation there is, or VB_LOAD_OPS */
	uint32_t total;  /* sum of weights */
	uint32_t starts; /* possible starts of a random request */
	bool fixed;      /* all of one length */
	const struct vb_load_options *options;
};

struct ask {
	uint64_t offset;
	uint32_t length;
	uint32_t op;
};

void pattern_init(struct pattern *pattern, const struct vb_load_options *options, uint32_t queue, uint32_t queues);

/* The rest of pattern_next(). */
bool pattern_next_slow(struct pattern *pattern, struct ask *ret);

static inline uint64_t pattern_random(struct pattern *pattern)
{
	uint64_t x = pattern->state;

	x ^= x >> 12;
	x ^= x << 25;
	x ^= x >> 27;
	pattern->state = x;
	return x * 0x2545f4914f6cdd1du;
}

/* 0 to below - 1. */
static inline uint64_t pattern_below(struct pattern *pattern, uint64_t below)
{
	return (uint64_t)((unsigned __int128)pattern_random(pattern) * below >> 64);
}

/* Choose the next request. False: there is none any more. Choosing does not take: pattern_take() does. */
static inline bool pattern_next(struct pattern *pattern, struct ask *ret)
{
	const struct vb_load_options *options = pattern->options;

	if (!pattern->left)
		return false;
	if (pattern->only == VB_LOAD_OPS || !pattern->fixed || !options->random || options->flush_every)
		return pattern_next_slow(pattern, ret);
	ret->op = pattern->only;
	ret->length = options->block_min;
	ret->offset = options->offset + pattern_below(pattern, pattern->starts) * options->block_min;
	return true;
}

/* The request is on its way. */
static inline void pattern_take(struct pattern *pattern, const struct ask *ask)
{
	pattern->left--;
	if (ask->op == VB_LOAD_FLUSH)
		pattern->writes = 0;
	else if (!pattern->options->random)
		pattern->at = ask->offset + ask->length;
	if (ask->op == VB_LOAD_WRITE)
		pattern->writes++;
}
