/*
 * load.h: the border between Python and the load generator of `vhostblk bench`, the driver's half of a virtqueue in C.
 *
 * It is an extension of its own, because a daemon has no use for it. As in engine.h, this is both the C header and the
 * cffi cdef: declarations only; functions return 0 or -errno unless they say otherwise; out-parameters come last; file
 * descriptors and memory are borrowed. Every function may be called from one thread, control; the generator's threads
 * never call back. It knows nothing of vhost-user: control has set up memory, rings and eventfds.
 */
#pragma once
#include <stdint.h>

/* ---------------------------------------------------------------- what the disk must contain (model.c) */

/*
 * Of each block of a range of the disk: what a read must find there. Every 512 bytes written carry their offset, a
 * generation and a filling made of both and of the seed, so that a read can be checked also by another process, which
 * then accepts any generation. Shared by all threads: whoever wants to write a block finds nobody else there.
 */
struct vb_load_model;

/* All in bytes; block is the smallest unit that is ever written; stamp tells this run's generations from another's. */
int vb_load_model_create(
	uint64_t offset, uint64_t size, uint32_t block, uint64_t seed, uint32_t stamp, struct vb_load_model **ret);
void vb_load_model_destroy(struct vb_load_model *model);
/* Blocks whose content is known, because they were written or zeroed successfully and not discarded since. */
uint64_t vb_load_model_known(const struct vb_load_model *model);
/* What a sector at this offset holds after a write with this generation. */
void vb_load_model_sector(const struct vb_load_model *model, uint64_t offset, uint64_t generation, void *sector);

/* ---------------------------------------------------------------- a run */

enum vb_load_op { VB_LOAD_READ, VB_LOAD_WRITE, VB_LOAD_FLUSH, VB_LOAD_DISCARD, VB_LOAD_WRITE_ZEROES, VB_LOAD_OPS };

struct vb_load_options {
	uint64_t offset;    /* of the range used, bytes; multiple of 512 */
	uint64_t size;      /* of the range used, bytes; a multiple of block_min */
	uint32_t block_min; /* bytes of a request: a multiple of block_min, uniformly up to block_max */
	uint32_t block_max;
	uint32_t weights[5];  /* of each vb_load_op; their sum must not be 0 */
	uint32_t random;      /* 0: each queue goes through its part of the range, and starts again */
	uint32_t once;        /* sequential only: end after one pass */
	uint32_t flush_every; /* a flush after so many writes of a queue; 0: never */
	uint32_t unmap;       /* set the flag UNMAP of WRITE_ZEROES */
	uint32_t segments;    /* descriptors for the data of a read or write */
	uint32_t depth;       /* requests in flight per queue */
	uint32_t batch;       /* requests put into the ring before the device is shown them; 0: a sensible number */
	uint32_t indirect;    /* each request is a table of its own; VIRTIO_F_INDIRECT_DESC was negotiated */
	uint32_t event_idx;   /* VIRTIO_F_EVENT_IDX was negotiated */
	uint32_t packed;      /* VIRTIO_F_RING_PACKED was negotiated; then rings must be new */
	uint32_t sleep;       /* wait for calls when there is nothing to do; 0: poll the used ring */
	uint32_t threads;     /* queue i is driven by thread i modulo threads */
	uint64_t rate;        /* requests per second of all threads; 0: as many as possible */
	uint64_t requests;    /* of all queues, then it ends; 0: until it is told to */
	uint32_t no_ramp;     /* begin in phase MEASURE */
	uint64_t seed;
	struct vb_load_model *model; /* writes carry, and reads are compared with, what it says; or NULL */
	uint32_t known_only;         /* blocks the model does not know: 1: are not compared, 0: carry any generation */
	uint32_t skip_unknown;       /* `once` leaves out blocks the model does not know */
};

struct vb_load_ring {
	uint64_t desc; /* addresses in this process */
	uint64_t avail;
	uint64_t used;
	uint32_t size;
	int32_t kick_fd;
	int32_t call_fd;    /* non-blocking; nobody else reads it */
	uint64_t slots;     /* memory for the requests, vb_load_slots_size() bytes, aligned to 4096: in this process */
	uint64_t slots_gpa; /* ... and for the device */
};

/* Bytes of guest memory each queue's requests need. */
uint64_t vb_load_slots_size(const struct vb_load_options *options);
/* Entries a ring must have at least. */
uint32_t vb_load_ring_entries(const struct vb_load_options *options);

enum vb_load_phase {
	VB_LOAD_RAMP,    /* submits; what it counts is not the result */
	VB_LOAD_MEASURE, /* submits */
	VB_LOAD_DRAIN,   /* waits for what is in flight */
	VB_LOAD_ABANDON, /* leaves everything as it is */
	VB_LOAD_PHASES
};

enum vb_load_failure {
	VB_LOAD_OK,
	VB_LOAD_STATUS,    /* a request failed: op, offset, length, found = status */
	VB_LOAD_MISMATCH,  /* wrong data: offset of the sector, expected and found */
	VB_LOAD_USED_IDX,  /* more was used than is in flight: expected = in flight, found */
	VB_LOAD_USED_ID,   /* a chain that is not in flight: found = id */
	VB_LOAD_NO_STATUS, /* completed without a status: op, offset, length, found = the byte */
	VB_LOAD_OS         /* found = errno */
};

/* What went wrong first. Any failure ends the run. */
struct vb_load_error {
	uint32_t failure;
	uint32_t op;
	uint32_t queue;
	uint32_t length;
	uint64_t offset;
	uint64_t found;
	uint64_t expected_generation; /* MISMATCH: 0: any, else what was written last; */
	uint32_t expected_zero;       /* MISMATCH: 1: the block was zeroed */
	uint32_t at;                  /* MISMATCH: first byte of the sector that differs */
	uint8_t expected[512];
	uint8_t sector[512]; /* MISMATCH: what was read */
};

/* 64 buckets per power of two: each is at most 1/64 wide (1.6 %). The unit is a tick of the clock. */
#define VB_LOAD_BUCKETS 2496

struct vb_load_op_stats {
	uint64_t requests;
	uint64_t bytes;
	uint64_t latency_ticks; /* sum */
	uint64_t latency_max;   /* ticks */
};

/* Counted by one thread, in one phase. */
struct vb_load_stats {
	struct vb_load_op_stats op[5];
	uint64_t begin;      /* ticks */
	uint64_t end;        /* ticks; 0: not over */
	uint64_t busy_ticks; /* spent on requests, from seeing completions to having shown the device new ones */
	uint64_t batches;    /* how often there were completions */
	uint64_t kicks;
	uint64_t calls;
	uint64_t sleeps;
	uint64_t cpu_user_us; /* of the thread */
	uint64_t cpu_system_us;
	uint64_t compared; /* bytes */
};

struct vb_load;

/* -EINVAL: options that contradict each other; -ENOMEM, and what threads and epoll return. The rings must be unused, or
 * left by another run; the threads start at once. */
int vb_load_create(
	const struct vb_load_options *options, const struct vb_load_ring *rings, uint32_t count, struct vb_load **ret);
/* Go to a later phase. */
void vb_load_set_phase(struct vb_load *load, uint32_t phase);
uint32_t vb_load_phase(const struct vb_load *load);
/* Threads that have not ended: all end by themselves after DRAIN, ABANDON, a failure, or as many requests as wanted. */
uint32_t vb_load_running(const struct vb_load *load);
/* Becomes readable when a thread has ended. */
int vb_load_fd(const struct vb_load *load);
/* Requests in flight, all queues. */
uint64_t vb_load_in_flight(const struct vb_load *load);
/* What thread i counted in a phase; may be read at any time, and grows. NULL: no such thread. */
const struct vb_load_stats *vb_load_stats(const struct vb_load *load, uint32_t thread, uint32_t phase);
/* Its histogram of an operation: VB_LOAD_BUCKETS numbers. */
const uint64_t *vb_load_histogram(const struct vb_load *load, uint32_t thread, uint32_t phase, uint32_t op);
const struct vb_load_error *vb_load_error(const struct vb_load *load);
/* Waits for the threads: go to DRAIN or ABANDON before. */
void vb_load_destroy(struct vb_load *load);

/* ---------------------------------------------------------------- clock and buckets */

/* Ticks now; how many a second has, as measured by vb_load_calibrate (which takes 20 ms); is it the processor's counter? */
uint64_t vb_load_ticks(void);
double vb_load_calibrate(void);
int vb_load_clock_is_tsc(void);
/* Ticks that a look at the clock takes: the least average of several. */
double vb_load_clock_cost(void);
uint32_t vb_load_bucket(uint64_t ticks);
/* The least value of a bucket. */
uint64_t vb_load_bucket_bound(uint32_t bucket);

/* ---------------------------------------------------------------- an echo (echo.c) */

/*
 * The device's half of a ring at its simplest: a thread that completes every chain at once with status OK, touching
 * nothing but rings, descriptors and status. The generator against it shows what the generator itself costs.
 */
struct vb_load_echo;

int vb_load_echo_create(const struct vb_load_ring *rings, uint32_t count, struct vb_load_echo **ret);
void vb_load_echo_destroy(struct vb_load_echo *echo);
