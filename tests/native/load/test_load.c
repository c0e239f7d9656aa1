/* The generator against a device that checks what it is asked, and one that breaks the rules. */
#include <poll.h>
#include <time.h>
#include "device.h"
#include "src/common.h"
#include "test.h"

#define DEADLINE 40000000000ull

static struct vb_load_options defaults(void)
{
	return (struct vb_load_options){
		.size = DISK_BYTES,
		.block_min = 4096,
		.block_max = 4096,
		.weights = {1, 0, 0, 0, 0},
		.random = 1,
		.segments = 1,
		.depth = 16,
		.indirect = 1,
		.event_idx = 1,
		.threads = 1,
		.requests = 5000,
		.no_ramp = 1,
		.seed = 7,
	};
}

/* Wait until all threads have ended by themselves. */
static void wait_for_end(struct vb_load *load)
{
	uint64_t end = now_ns() + DEADLINE;

	while (vb_load_running(load)) {
		const struct timespec delay = {.tv_nsec = 1000000};

		CHECK(now_ns() < end);
		nanosleep(&delay, NULL);
	}
}

struct outcome {
	struct vb_load_stats sums;
	struct vb_load_error error;
	uint64_t counted; /* in histograms */
};

static struct outcome run(struct device *device, const struct vb_load_options *options)
{
	struct outcome outcome = {0};
	struct vb_load *load;

	CHECK_EQUAL(vb_load_create(options, device->rings, device->count, &load), 0);
	wait_for_end(load);
	for (uint32_t i = 0; i < options->threads; i++) {
		const struct vb_load_stats *stats = vb_load_stats(load, i, VB_LOAD_MEASURE);

		CHECK(stats->end >= stats->begin && stats->begin);
		outcome.sums.kicks += stats->kicks;
		outcome.sums.calls += stats->calls;
		outcome.sums.compared += stats->compared;
		for (uint32_t op = 0; op < VB_LOAD_OPS; op++) {
			outcome.sums.op[op].requests += stats->op[op].requests;
			outcome.sums.op[op].bytes += stats->op[op].bytes;
			for (uint32_t bucket = 0; bucket < VB_LOAD_BUCKETS; bucket++)
				outcome.counted += vb_load_histogram(load, i, VB_LOAD_MEASURE, op)[bucket];
		}
	}
	outcome.error = *vb_load_error(load);
	CHECK(outcome.error.failure || !vb_load_in_flight(load));
	vb_load_destroy(load);
	return outcome;
}

static uint64_t requests_of(const struct outcome *outcome)
{
	uint64_t sum = 0;

	for (int op = 0; op < VB_LOAD_OPS; op++)
		sum += outcome->sums.op[op].requests;
	return sum;
}

static struct outcome run_well(struct vb_load_options options, uint32_t queues)
{
	struct device device;
	struct outcome outcome;

	device_init(&device, &options, queues, NONE);
	outcome = run(&device, &options);
	device_deinit(&device);
	CHECK_EQUAL(outcome.error.failure, VB_LOAD_OK);
	if (options.requests)
		CHECK_EQUAL(requests_of(&outcome), options.requests);
	CHECK_EQUAL(outcome.counted, requests_of(&outcome));
	CHECK_EQUAL(device.requests[VIRTIO_BLK_T_IN], outcome.sums.op[VB_LOAD_READ].requests);
	CHECK_EQUAL(device.requests[VIRTIO_BLK_T_OUT], outcome.sums.op[VB_LOAD_WRITE].requests);
	CHECK_EQUAL(device.kicks, outcome.sums.kicks);
	return outcome;
}

TEST(every_request_comes_back_whatever_the_layout)
{
	for (uint32_t i = 0; i < 32; i++) {
		struct vb_load_options options = defaults();

		options.indirect = i & 1;
		options.event_idx = !!(i & 2);
		options.sleep = !!(i & 4);
		options.segments = i & 8 ? 3 : 1;
		options.threads = i & 16 ? 2 : 1;
		options.block_max = 16384;
		options.depth = 10;
		options.weights[VB_LOAD_WRITE] = options.weights[VB_LOAD_FLUSH] = 1;
		options.weights[VB_LOAD_DISCARD] = options.weights[VB_LOAD_WRITE_ZEROES] = 1;
		run_well(options, 3);
	}
}

/* Each side sleeps unless the other has told it not to: a lost notification ends at the deadline. */
TEST(two_sleepers_do_not_miss_each_other)
{
	for (uint32_t depth = 1; depth <= 4; depth += 3) {
		struct vb_load_options options = defaults();

		options.sleep = 1;
		options.depth = depth;
		options.requests = 20000;
		run_well(options, 1);
		options.event_idx = 0;
		run_well(options, 1);
	}
}

TEST(polling_asks_for_no_calls)
{
	struct vb_load_options options = defaults();

	/* Past the wrap of the ring's indices, where a forgotten event would fire. */
	options.requests = 150000;
	options.depth = 32;
	CHECK_EQUAL(run_well(options, 1).sums.calls, 0);
}

TEST(sequential_pass_touches_every_block_once)
{
	struct vb_load_options options = defaults();
	struct outcome outcome;

	options.random = 0;
	options.once = 1;
	options.requests = 0;
	options.weights[VB_LOAD_READ] = 0;
	options.weights[VB_LOAD_WRITE] = 1;
	options.flush_every = 16;
	outcome = run_well(options, 3);
	CHECK_EQUAL(outcome.sums.op[VB_LOAD_WRITE].bytes, DISK_BYTES);
	CHECK_EQUAL(outcome.sums.op[VB_LOAD_FLUSH].requests, 3 * (85 / 16));
}

static struct vb_load_options mixed_and_verified(struct vb_load_model **model)
{
	struct vb_load_options options = defaults();

	options.block_min = 512;
	options.block_max = 8192;
	CHECK_EQUAL(vb_load_model_create(0, DISK_BYTES, 512, 7, 1, model), 0);
	options.model = *model;
	options.known_only = 1;
	options.threads = 2;
	options.weights[VB_LOAD_WRITE] = 3;
	options.weights[VB_LOAD_DISCARD] = options.weights[VB_LOAD_WRITE_ZEROES] = 1;
	return options;
}

TEST(verified_mixture_of_everything_is_right)
{
	struct vb_load_model *model;
	struct vb_load_options options = mixed_and_verified(&model);
	struct outcome outcome = run_well(options, 4);

	CHECK(outcome.sums.compared > DISK_BYTES);
	CHECK(vb_load_model_known(model) > 1000);
	vb_load_model_destroy(model);
}

static struct outcome run_badly(struct vb_load_options options, enum misdeed misdeed)
{
	struct device device;
	struct outcome outcome;

	device_init(&device, &options, 1, misdeed);
	outcome = run(&device, &options);
	device_deinit(&device);
	return outcome;
}

TEST(lost_write_is_found_at_its_place)
{
	struct vb_load_model *model;
	struct vb_load_options options = mixed_and_verified(&model);
	struct outcome outcome;

	options.threads = 1;
	options.block_max = 512;
	options.size = 16384;
	options.weights[VB_LOAD_DISCARD] = options.weights[VB_LOAD_WRITE_ZEROES] = 0;
	vb_load_model_destroy(model);
	CHECK_EQUAL(vb_load_model_create(0, 16384, 512, 7, 1, &model), 0);
	options.model = model;
	outcome = run_badly(options, LOSE_WRITES);
	CHECK_EQUAL(outcome.error.failure, VB_LOAD_MISMATCH);
	CHECK(outcome.error.offset < 16384);
	/* The generation is what was written last; what is there is older, or was never written. */
	CHECK(outcome.error.expected_generation >> 32 == 1);
	CHECK(memcmp(outcome.error.expected, outcome.error.sector, 512) != 0);
	vb_load_model_destroy(model);
}

TEST(another_process_finds_a_flipped_byte)
{
	struct vb_load_options options = defaults();
	struct device device;
	struct outcome outcome;

	options.random = 0;
	options.once = 1;
	options.requests = 0;
	options.weights[VB_LOAD_READ] = 0;
	options.weights[VB_LOAD_WRITE] = 1;
	options.segments = 3;
	CHECK_EQUAL(vb_load_model_create(0, DISK_BYTES, 4096, 7, 1, &options.model), 0);
	device_init(&device, &options, 1, NONE);
	outcome = run(&device, &options);
	CHECK_EQUAL(outcome.error.failure, VB_LOAD_OK);
	vb_load_model_destroy(options.model);

	/* It knows the seed, but no generation, and reads in other pieces. */
	CHECK_EQUAL(vb_load_model_create(0, DISK_BYTES, 8192, 7, 2, &options.model), 0);
	options.weights[VB_LOAD_READ] = 1;
	options.weights[VB_LOAD_WRITE] = 0;
	options.block_min = options.block_max = 8192;
	options.depth = 8;
	outcome = run(&device, &options);
	CHECK_EQUAL(outcome.error.failure, VB_LOAD_OK);
	CHECK_EQUAL(outcome.sums.compared, DISK_BYTES);
	device.disk[777 * 512 + 100] ^= 1;
	outcome = run(&device, &options);
	CHECK_EQUAL(outcome.error.failure, VB_LOAD_MISMATCH);
	CHECK_EQUAL(outcome.error.offset, 777 * 512);
	CHECK_EQUAL(outcome.error.at, 100);
	CHECK_EQUAL(outcome.error.sector[100] ^ outcome.error.expected[100], 1);
	device_deinit(&device);
	vb_load_model_destroy(options.model);
}

TEST(misdeeds_are_told_apart)
{
	struct vb_load_options options = defaults();
	struct outcome outcome;

	CHECK_EQUAL(run_badly(options, FORGET_STATUS).error.failure, VB_LOAD_NO_STATUS);
	CHECK_EQUAL(run_badly(options, FOREIGN_HEAD).error.failure, VB_LOAD_USED_ID);
	CHECK_EQUAL(run_badly(options, RUN_AHEAD).error.failure, VB_LOAD_USED_IDX);
	options.weights[VB_LOAD_READ] = 0;
	options.weights[VB_LOAD_WRITE] = 1;
	options.offset = 8192;
	options.size = 4096;
	outcome = run_badly(options, FAIL_WRITES);
	CHECK_EQUAL(outcome.error.failure, VB_LOAD_STATUS);
	CHECK_EQUAL(outcome.error.found, VIRTIO_BLK_S_IOERR);
	CHECK_EQUAL(outcome.error.op, VB_LOAD_WRITE);
	CHECK_EQUAL(outcome.error.offset, 8192);
}

TEST(what_does_not_come_back_can_be_abandoned)
{
	for (uint32_t sleep = 0; sleep < 2; sleep++) {
		struct vb_load_options options = defaults();
		struct device device;
		struct vb_load *load;

		options.sleep = sleep;
		device_init(&device, &options, 1, ABSENT);
		CHECK_EQUAL(vb_load_create(&options, device.rings, 1, &load), 0);
		while (vb_load_in_flight(load) < options.depth)
			cpu_relax();
		vb_load_set_phase(load, VB_LOAD_DRAIN);
		CHECK_EQUAL(vb_load_running(load), 1);
		vb_load_set_phase(load, VB_LOAD_ABANDON);
		wait_for_end(load);
		CHECK_EQUAL(vb_load_in_flight(load), options.depth);
		vb_load_destroy(load);
		device_deinit(&device);
	}
}

TEST(contradicting_options_are_refused)
{
	struct vb_load_options good = defaults(), bad;
	struct device device;
	struct vb_load *load;

	device_init(&device, &good, 1, NONE);
#define REFUSED(change)                                                                                                \
	do {                                                                                                           \
		bad = good;                                                                                            \
		bad.change;                                                                                            \
		CHECK_EQUAL(vb_load_create(&bad, device.rings, 1, &load), -22);                                        \
	} while (0)
	REFUSED(depth = 0);
	REFUSED(depth = RING_ENTRIES + 1);
	REFUSED(threads = 2);
	REFUSED(segments = 0);
	REFUSED(block_min = 100);
	REFUSED(block_max = 5000);
	REFUSED(size = 0);
	REFUSED(size = 4097);
	REFUSED(weights[0] = 0);
	REFUSED(skip_unknown = 1);
	bad = good;
	bad.indirect = 0;
	bad.depth = RING_ENTRIES / 3 + 1;
	CHECK_EQUAL(vb_load_create(&bad, device.rings, 1, &load), -22);
	device_deinit(&device);
}

TEST(buckets_are_narrow_and_in_order)
{
	CHECK_EQUAL(vb_load_bucket(0), 0);
	CHECK_EQUAL(vb_load_bucket_bound(0), 0);
	for (uint32_t bucket = 1; bucket < VB_LOAD_BUCKETS; bucket++) {
		uint64_t bound = vb_load_bucket_bound(bucket), before = vb_load_bucket_bound(bucket - 1);

		CHECK_EQUAL(vb_load_bucket(bound), bucket);
		CHECK_EQUAL(vb_load_bucket(bound - 1), bucket - 1);
		CHECK(bound > before && (bound - before - 1) * 64 <= before);
	}
	CHECK_EQUAL(vb_load_bucket(UINT64_MAX), VB_LOAD_BUCKETS - 1);
}

TEST(echo_answers_everything)
{
	struct vb_load_options options = defaults();
	struct device device;
	struct vb_load_echo *echo;

	options.requests = 200000;
	device_init(&device, &options, 2, ABSENT);
	CHECK_EQUAL(vb_load_echo_create(device.rings, 2, &echo), 0);
	CHECK_EQUAL(run(&device, &options).sums.op[VB_LOAD_READ].requests, 200000);
	vb_load_echo_destroy(echo);
	device_deinit(&device);
}
