/*
 * Invariant: whatever is in guest memory, the engine gives back each chain it has popped once, and comes to rest.
 *
 * A libFuzzer target. The input is that of test_fuzz_split_ring.py and test_fuzz_packed_ring.py, whose corpora are its
 * seed:
 *
 *     byte 0      log2 of the queue size, modulo 8; packed: queue size - 1, modulo 128
 *     byte 1      1: EVENT_IDX, 2: INDIRECT_DESC, 4: no extent, control completes, 8: no extent, control retries once,
 *                 16: packed
 *     bytes 2-3   base, little-endian; packed: both places, the slot modulo the size
 *     the rest    guest memory from BASE on, up to MEMORY bytes: descriptors at BASE, the available ring (the driver's
 *                 event structure) at AVAIL, the used ring (the device's) at USED; what is left after that is what the
 *                 memory becomes after the first turn
 *
 * The engine takes its turns here, without a thread, so that each input has one outcome.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
#include "engine.h"
#include "src/queue.h"
#include "src/thread.h"

enum { BASE = 0x10000, MEMORY = 0x2000, AVAIL = 0x800, USED = 0xa00, DISK = 1 << 20, FENCE = 4096, TURNS = 200 };
#define UVA 0x7000000000ull

static struct vb_thread *thread;
static struct vb_disk *disk;
static struct vb_memory *memory;
static uint8_t *guest; /* MEMORY bytes between two inaccessible pages */
static int file;
static bool seen_broken; /* since the queue was started */

#define MUST(condition)                                                                                                \
	do {                                                                                                           \
		if (!(condition)) {                                                                                    \
			fprintf(stderr, "line %d: %s is not so\n", __LINE__, #condition);                              \
			abort();                                                                                       \
		}                                                                                                      \
	} while (0)

static void set_up(void)
{
	struct vb_thread_options options = {.io_kind = VB_IO_THREADS};
	struct vb_disk_config config = {.capacity = DISK, .max_segments = 4, .serial = "serial", .max_extents = 16};
	struct vb_region region = {.gpa = BASE, .uva = UVA, .size = MEMORY};

	guest = mmap(NULL, MEMORY + 2 * FENCE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	guest += FENCE;
	mprotect(guest, MEMORY, PROT_READ | PROT_WRITE);
	region.hva = (uint64_t)guest;
	file = memfd_create("fuzz", MFD_CLOEXEC);
	MUST(!ftruncate(file, DISK));
	MUST(!thread_open(&options, &thread));
	MUST(!vb_disk_create(&config, &disk));
	MUST(!vb_memory_create(&region, 1, &memory));
}

static void send(struct vb_message message)
{
	MUST(vb_thread_send(thread, &message, 1) == 1);
}

/* Play control: complete or retry what comes. Returns whether the command with this cookie was answered. */
static bool answer(uint64_t cookie, bool retry, struct vb_message *ack)
{
	struct vb_message messages[64];
	bool acked = false;
	uint32_t alike;
	int count;

	while ((count = vb_thread_receive(thread, messages, 64, &alike))) {
		for (int i = 0; i < count; i++) {
			struct vb_message *m = &messages[i];

			if (m->type == VB_ACK && m->cookie == cookie) {
				*ack = *m;
				acked = true;
			} else if (m->type == VB_QUEUE_BROKEN) {
				seen_broken = true;
			} else if (m->type == VB_REQUEST) {
				bool again = retry && !m->flags;

				send((struct vb_message){.type = again ? VB_RETRY : VB_COMPLETE,
					.cookie = m->cookie,
					.length = m->length});
			}
		}
	}
	return acked;
}

static struct vb_message command(struct vb_message message, bool retry)
{
	static uint64_t cookie;
	struct vb_message ack;

	message.cookie = ++cookie;
	send(message);
	for (int turn = 0; turn < TURNS; turn++) {
		thread_turn(thread);
		if (answer(cookie, retry, &ack))
			return ack;
	}
	MUST(!"answered within a bounded number of turns");
	return message;
}

static void attach(int flags)
{
	struct vb_extent extent = {.length = DISK,
		.fd = file,
		.flags = VB_EXTENT_READ | VB_EXTENT_WRITE | VB_EXTENT_INLINE,
		.request_alignment = 1,
		.memory_alignment = 1};

	command((struct vb_message){.type = VB_DISK_ATTACH, .disk = (uint64_t)disk}, false);
	command((struct vb_message){.type = VB_MEMORY_SET, .disk = (uint64_t)disk, .pointer = (uint64_t)memory}, false);
	if (!(flags & 12))
		command(
			(struct vb_message){
				.type = VB_MAP, .disk = (uint64_t)disk, .pointer = (uint64_t)&extent, .count = 1},
			false);
}

static uint64_t answered(const struct vb_queue_stats *stats)
{
	uint64_t count = 0;

	for (int op = 0; op < VB_OPS; op++)
		count += stats->op[op].requests;
	return count;
}

/* Each chain was popped once, and answered once. One without a place for its status is popped and broken. */
static void check_base(const struct vb_queue_config *config, const struct vb_queue_stats *stats, uint32_t base)
{
	uint64_t popped = (uint16_t)(base - config->base), count = answered(stats);

	MUST(stats->hits + stats->misses == count);
	if (!config->packed) {
		MUST((uint16_t)(count - popped) == 0 || (uint16_t)(popped - count) == 1);
		return;
	}
	MUST((base & 0x7fff) < config->size && (base >> 16 & 0x7fff) < config->size);
	MUST((base >> 16) == (base & 0xffff) || seen_broken);
}

static void run_queue_on(int exponent, int flags, uint16_t base, const uint8_t *second, size_t second_size)
{
	static struct vb_queue_stats stats;
	struct vb_queue_config config = {.disk = disk,
		.stats = &stats,
		.desc_uva = UVA,
		.avail_uva = UVA + AVAIL,
		.used_uva = UVA + USED,
		.size = 1u << exponent % 8,
		.base = base,
		.packed = flags >> 4 & 1,
		.enabled = 1,
		.event_idx = flags & 1,
		.indirect = flags >> 1 & 1,
		.kick_fd = -1,
		.call_fd = -1,
		.err_fd = -1};
	struct vb_message ack;

	if (config.packed) {
		config.size = 1u + (uint32_t)exponent % 128;
		base = (uint16_t)((base & 0x8000) | (base & 0x7fff) % config.size);
		config.base = base | (uint32_t)base << 16;
	}
	memset(&stats, 0, sizeof(stats));
	seen_broken = false;
	ack = command((struct vb_message){.type = VB_QUEUE_START, .disk = (uint64_t)disk, .pointer = (uint64_t)&config},
		flags & 8);
	MUST(!ack.result);
	for (int turn = 0; thread_turn(thread) && turn < TURNS; turn++)
		answer(0, flags & 8, &ack);
	memcpy(guest, second, second_size);
	for (int turn = 0; thread_turn(thread) && turn < TURNS; turn++)
		answer(0, flags & 8, &ack);
	ack = command((struct vb_message){.type = VB_QUEUE_STOP}, flags & 8);
	MUST(!ack.result);
	MUST(!stats.in_flight);
	check_base(&config, &stats, (uint32_t)ack.aux);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	size_t first, second;

	if (size < 4)
		return 0;
	if (!thread)
		set_up();
	first = MIN(size - 4, (size_t)MEMORY);
	second = MIN(size - 4 - first, (size_t)MEMORY);
	memset(guest, 0, MEMORY);
	memcpy(guest, data + 4, first);
	attach(data[1]);
	run_queue_on(data[0], data[1], (uint16_t)(data[2] | data[3] << 8), data + 4 + first, second);
	MUST(!command((struct vb_message){.type = VB_MEMORY_SET, .disk = (uint64_t)disk}, false).result);
	MUST(!command((struct vb_message){.type = VB_DISK_DETACH, .disk = (uint64_t)disk}, false).result);
	MUST(vb_memory_refs(memory) == 1);
	MUST(!thread->owed);
	return 0;
}
