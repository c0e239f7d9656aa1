#include "model.h"
#include "pattern.h"

void pattern_init(struct pattern *pattern, const struct vb_load_options *options, uint32_t queue, uint32_t queues)
{
	uint64_t blocks = options->size / options->block_min;
	uint64_t longest = options->block_max / options->block_min;

	*pattern = (struct pattern){
		.state = (options->seed + queue) * 0x9e3779b97f4a7c15u | 1,
		.begin = options->offset + blocks * queue / queues * options->block_min,
		.end = options->offset + blocks * (queue + 1) / queues * options->block_min,
		.left = options->requests ? options->requests / queues + (queue < options->requests % queues)
					  : UINT64_MAX,
		.only = VB_LOAD_OPS,
		.starts = (uint32_t)(blocks - longest + 1),
		.fixed = longest == 1,
		.options = options,
	};
	pattern->at = pattern->begin;
	for (uint32_t op = 0; op < VB_LOAD_OPS; op++)
		pattern->total += options->weights[op];
	for (uint32_t op = 0; op < VB_LOAD_OPS; op++)
		if (options->weights[op] == pattern->total)
			pattern->only = op;
	/* The first numbers of nearby seeds look alike. */
	for (int i = 0; i < 16; i++)
		pattern_random(pattern);
}

static uint32_t choose_op(struct pattern *pattern)
{
	const uint32_t *weights = pattern->options->weights;
	uint64_t dice;
	uint32_t op = 0;

	if (pattern->options->flush_every && pattern->writes >= pattern->options->flush_every)
		return VB_LOAD_FLUSH;
	if (pattern->only != VB_LOAD_OPS)
		return pattern->only;
	dice = pattern_below(pattern, pattern->total);
	while (dice >= weights[op])
		dice -= weights[op++];
	return op;
}

static void skip_unknown(struct pattern *pattern)
{
	const struct vb_load_options *options = pattern->options;

	while (pattern->at < pattern->end && !model_knows(options->model, pattern->at))
		pattern->at += options->block_min;
}

bool pattern_next_slow(struct pattern *pattern, struct ask *ret)
{
	const struct vb_load_options *options = pattern->options;
	uint64_t length = options->block_min;

	*ret = (struct ask){.op = choose_op(pattern)};
	if (ret->op == VB_LOAD_FLUSH)
		return true;
	if (!pattern->fixed)
		length *= 1 + pattern_below(pattern, options->block_max / options->block_min);
	if (options->random) {
		ret->offset = options->offset + pattern_below(pattern, pattern->starts) * options->block_min;
	} else {
		if (options->skip_unknown)
			skip_unknown(pattern);
		if (pattern->at >= pattern->end) {
			if (options->once || pattern->begin == pattern->end) {
				pattern->left = 0;
				return false;
			}
			pattern->at = pattern->begin;
		}
		ret->offset = pattern->at;
		length = MIN(length, pattern->end - pattern->at);
	}
	ret->length = (uint32_t)length;
	return true;
}
