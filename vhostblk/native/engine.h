/*
 * engine.h: the whole border between Python and the engine.
 *
 * This file is both the C header and the cffi cdef (build.py drops the preprocessor lines), so it holds
 * declarations only. Functions return 0 or -errno unless they say otherwise, out-parameters come last, handles are
 * opaque, file descriptors passed in are borrowed: the engine never closes one it did not open.
 *
 * Two kinds of callers. "Control" is the one thread that owns an engine thread's handle (Python's asyncio loop).
 * "Engine" is the engine thread itself. A function without a "Context:" line may be called from control only.
 */
#pragma once
#include <stdint.h>

/* ---------------------------------------------------------------- what this build and this kernel can do */

/* 0 if io_uring works here; -ENOSYS, -EPERM, ... from the kernel, -ENOTSUP where it was compiled without liburing. */
int vb_io_uring_error(void);

/* ---------------------------------------------------------------- guest memory (memory.c) */

/*
 * An immutable, counted snapshot of the memory map of one front-end. Requests keep the snapshot they began with, so
 * control may unmap a region only when the count of every snapshot that holds it is down to control's own.
 *
 * vb_memory_create also puts the regions under the SIGBUS guard: an access to a page that the front-end has truncated
 * away reads zeroes from then on and makes vb_memory_faulted() non-zero, instead of killing the process. The guard is
 * the only process-wide state of the engine, because signal handlers are; installing it twice is harmless.
 */
struct vb_region {
	uint64_t gpa;  /* guest physical address: what descriptors hold */
	uint64_t uva;  /* address in the front-end: what SET_VRING_ADDR holds */
	uint64_t size; /* bytes */
	uint64_t hva;  /* address in this process */
};

struct vb_memory;

int vb_memory_create(const struct vb_region *regions, uint32_t count, struct vb_memory **ret);
void vb_memory_unref(struct vb_memory *memory);
uint32_t vb_memory_refs(const struct vb_memory *memory);
int vb_memory_faulted(const struct vb_memory *memory);

/* ---------------------------------------------------------------- the log of guest memory (memory_log.c) */

/*
 * A bitmap in memory that the front-end shares, for live migration: a bit for each 4096 bytes of guest physical memory
 * that were written. Its mapping is control's, and comes under the SIGBUS guard. Destroy it when every thread has answered
 * a VB_LOG_SET that came after the last one that named it.
 */
struct vb_memory_log;

int vb_memory_log_create(uint64_t address, uint64_t size, struct vb_memory_log **ret);
void vb_memory_log_destroy(struct vb_memory_log *log);
/* Non-zero: something was written beyond its end, or the front-end has truncated it, so it does not tell the truth.
 * Context: any. */
int vb_memory_log_lost(const struct vb_memory_log *log);
/* What was written, by its guest physical address, or by its address in this process. Context: any. */
void vb_memory_log_mark(struct vb_memory_log *log, uint64_t gpa, uint64_t length);
void vb_memory_log_mark_at(struct vb_memory_log *log, const struct vb_memory *memory, uint64_t hva, uint64_t length);

/* ---------------------------------------------------------------- disks (blk.c) */

/* What the engine knows of an export: shared by the threads that serve its queues; counted like memory. */
struct vb_disk_config {
	uint64_t id;           /* control's own number, echoed in messages */
	uint64_t capacity;     /* bytes, multiple of 512; requests beyond it fail with IOERR */
	uint32_t read_only;    /* writes fail with IOERR without reaching anybody */
	uint32_t max_segments; /* DISCARD and WRITE_ZEROES: more segments than this fail with UNSUPP */
	uint8_t serial[20];    /* VIRTIO_BLK_T_GET_ID, NUL-padded */
	uint32_t max_extents;  /* bound of each thread's extent map; older entries are evicted */
	uint32_t
		ask_after_errors; /* 1 << enum vb_op: when the I/O of such a request fails, control decides what becomes of
				    * it (VB_REQUEST_FAILED); of others, it ends with IOERR */
};

struct vb_disk;

int vb_disk_create(const struct vb_disk_config *config, struct vb_disk **ret);
void vb_disk_unref(struct vb_disk *disk);
/* Atomic; requests that start later see it. Shrinking: set it, then VB_REVOKE what is gone. */
void vb_disk_set_capacity(struct vb_disk *disk, uint64_t capacity);
/* Non-zero: every write that starts later is durable when it completes (writeback 0, or FLUSH not negotiated): by
 * RWF_DSYNC, or where the page cache is in between by an fdatasync behind it, which VB_FLUSH_SET must have allowed. */
void vb_disk_set_write_through(struct vb_disk *disk, int write_through);
/* Writes of the engine's that have ended, so that control's flush generations can count them. Grows before the guest is
 * told. Those that failed count: part of them may be in the file. */
uint64_t vb_disk_write_gen(const struct vb_disk *disk);
/* The end (bytes) of the write that reached furthest since this was last asked, or 0: nothing was written. What
 * vb_disk_write_gen has counted is in it. */
uint64_t vb_disk_take_highest_write(struct vb_disk *disk);

/* A map of what the engine has written. Memory is the caller's. */
struct vb_dirty_map {
	uint64_t words; /* address of (bits + 63) / 64 uint64_t, zero at first; used by the engine's functions alone */
	uint64_t bits;  /* what is written beyond the last one is not marked */
	uint32_t shift; /* bit n is for bytes n << shift and on */
};

struct vb_range {
	uint64_t offset;
	uint64_t length;
};

/* NULL: none. Writes that end are marked here before the guest is told, also those that failed. The map before may be
 * marked until every thread of the disk has answered a command that was sent later. */
void vb_disk_set_dirty_map(struct vb_disk *disk, const struct vb_dirty_map *map);
/* How many runs of set bits were stored, in bytes and in order; those bits are clear then. Begins at `*word`, 0 at
 * first, and stores where to go on: after the last call 0 are returned. max >= 32. */
uint32_t vb_dirty_map_take(const struct vb_dirty_map *map, uint64_t *word, struct vb_range *ranges, uint32_t max);
/* The errno of an fdatasync of the engine that has failed, or 0. It is set before anybody is told, and VB_IO_ERROR, which
 * tells control, may come late or not at all: so control looks here before it flushes. */
int vb_disk_flush_failed(const struct vb_disk *disk);

/* An entry of the extent map: this range of the disk is that range of a file, until it is revoked. */
enum vb_extent_flag {
	VB_EXTENT_READ = 1,    /* reads may use it */
	VB_EXTENT_WRITE = 2,   /* writes may use it */
	VB_EXTENT_ZERO = 4,    /* reads as zeroes; no file */
	VB_EXTENT_NULL = 8,    /* accepts anything, keeps nothing; without ZERO, leaves read buffers alone; no file */
	VB_EXTENT_INLINE = 16, /* the file never blocks (tmpfs): preadv/pwritev at once; long ones in the pool */
	VB_EXTENT_POOL = 32,   /* use the thread pool even where io_uring works (aio=threads) */
	VB_EXTENT_FIXED = 64,  /* O_DIRECT: io_uring fixed buffers pay, and no write is lost behind our back */
	VB_EXTENT_CACHED = 128 /* there is a page cache: reads may be in it, writes are copies into it and wait only
				* when too much of it is dirty */
};

struct vb_extent {
	uint64_t offset; /* on the disk, bytes */
	uint64_t length; /* bytes */
	uint64_t host_offset;
	int32_t fd;
	uint32_t flags;             /* enum vb_extent_flag */
	uint32_t request_alignment; /* requests that are not aligned to this miss; power of two, >= 1 */
	uint32_t memory_alignment;  /* nor those whose buffers' addresses or lengths are not aligned to this */
};

/* ---------------------------------------------------------------- queues (virtqueue.c) */

enum vb_op {
	VB_OP_READ,
	VB_OP_WRITE,
	VB_OP_FLUSH,
	VB_OP_DISCARD,
	VB_OP_WRITE_ZEROES,
	VB_OP_GET_ID,
	VB_OP_OTHER,
	VB_OPS
};

/* Latency buckets are logarithmic: one per nanosecond below 4 ns, then four per power of two, so each is at most a
 * quarter wide. The last one has everything beyond. vb_latency_bound() is the one definition. */
#define VB_LATENCY_BUCKETS 160

struct vb_op_stats {
	uint64_t requests;
	uint64_t bytes;
	uint64_t errors;
	uint64_t latency_ns; /* sum */
	uint64_t latency_max_ns;
	uint64_t latency[VB_LATENCY_BUCKETS];
};

/* Written by one engine thread, read by anyone; every field only grows, except in_flight and oldest_ns. Memory is the caller's, so
 * that it can live in a shared page. */
struct vb_queue_stats {
	struct vb_op_stats op[VB_OPS];
	uint64_t kicks;            /* notifications received */
	uint64_t calls;            /* notifications sent */
	uint64_t calls_suppressed; /* not sent because EVENT_IDX or NO_INTERRUPT said so */
	uint64_t hits;             /* served by the engine alone */
	uint64_t misses;           /* handed to control at least once */
	uint64_t in_flight;
	uint64_t invalid[VB_OPS]; /* of the errors: refused because they broke a rule, never tried */
	uint64_t last_ns;         /* CLOCK_MONOTONIC, when a request was answered last; 0: none was */
	uint64_t oldest_ns;       /* the same, no request in flight was taken before that; 0: none is in flight */
};

/* Lower bound of a bucket, ns. Context: any. */
uint64_t vb_latency_bound(uint32_t bucket);

struct vb_queue_config {
	struct vb_disk *disk;
	struct vb_queue_stats *stats; /* may be shared with readers; must outlive the queue */
	/* Addresses as the front-end gave them; resolved here, and again on VB_MEMORY_SET. Packed: the descriptor, driver
	 * and device areas. */
	uint64_t desc_uva;
	uint64_t avail_uva;
	uint64_t used_uva;
	uint32_t size;  /* 1..32768, a power of two unless it is packed */
	uint32_t index; /* the guest's number of the queue, for logs */
	/* Where it goes on. Split: the next available index. Packed: the slot of the next available descriptor, bit 15 its
	 * wrap counter; above, the same of the next used one. It begins with 0x80008000. */
	uint32_t base;
	uint8_t enabled;
	uint8_t event_idx; /* VIRTIO_F_EVENT_IDX negotiated */
	uint8_t indirect;  /* VIRTIO_F_INDIRECT_DESC negotiated */
	uint8_t packed;    /* VIRTIO_F_RING_PACKED negotiated */
	int32_t kick_fd;   /* -1: none was given, look at the ring every 50 us, while idle down to every ms */
	int32_t call_fd;   /* -1: the driver polls */
	int32_t err_fd;    /* -1: none */
	/* Where requests in flight are tracked, in this process: the queue's part of the region, aligned to 8; 0:
	 * nowhere. What it says is in flight is served first. */
	uint64_t inflight;
	uint64_t inflight_size; /* bytes */
	uint8_t logged;         /* what is written to the ring is marked, if there is a log: see VB_QUEUE_LOG */
	uint64_t log_gpa;       /* where the used ring is for the log */
};

/* Why a queue was declared broken (VB_QUEUE_BROKEN.result). */
enum vb_broken {
	VB_BROKEN_AVAIL_IDX = 1, /* more is available than the ring has room for */
	VB_BROKEN_HEAD,          /* a head outside the descriptor table */
	VB_BROKEN_CHAIN_LOOP,    /* more descriptors than a chain may have */
	VB_BROKEN_CHAIN_NEXT,    /* a next index outside its table */
	VB_BROKEN_INDIRECT,      /* indirect table: not negotiated, nested, continued, empty, or of a wrong size */
	VB_BROKEN_ADDRESS,       /* the status byte, or an indirect table, is outside guest memory */
	VB_BROKEN_ORDER,         /* a readable descriptor behind a writable one */
	VB_BROKEN_NO_STATUS,     /* nowhere to put the status byte */
	VB_BROKEN_RING_ADDRESS,  /* the rings themselves are outside guest memory or misaligned */
	VB_BROKEN_MEMORY_FAULT,  /* the memory file was truncated under us */
	VB_BROKEN_LOG            /* vb_memory_log_lost */
};

/* ---------------------------------------------------------------- threads and their messages (engine.c) */

/*
 * An engine thread and control exchange fixed-size messages through two single-producer single-consumer rings: commands
 * and completions go down, acknowledgements and requests come up. One order per direction, no lock, and an eventfd only
 * for a side that sleeps. `cookie` is chosen by whoever asks and echoed by whoever answers.
 */
enum vb_message_type {
	/*
	 * Control -> engine. Each is answered by one VB_ACK with its cookie, unless it says otherwise.
	 */

	/* disk: serve it here; its extent map is empty. */
	VB_DISK_ATTACH = 1,
	/* disk: forget it. -EBUSY: there are queues, or unanswered commands, of it. */
	VB_DISK_DETACH,
	/* disk, pointer = vb_memory (or 0): acknowledged when nothing in flight uses the old one. flags & 1: register
	 * the regions as io_uring fixed buffers if limits allow, those that the old one did not have when that is gone;
	 * ACK.aux = how many pieces are. -EBUSY: the one before is not acknowledged yet. Running queues move
	 * their rings over, or break (always, if there is no memory). */
	VB_MEMORY_SET,
	/* disk, result = fd that FLUSH may fdatasync, VB_FLUSH_MISS (as after DISK_ATTACH) or VB_FLUSH_NOTHING:
	 * acknowledged when no flush of the old fd is in flight on this thread. The threads of a disk do one fdatasync
	 * at a time, because the kernel tells of a lost write once; so they must have the same fd, and control, before
	 * it flushes or closes that file itself, sets MISS on all of them and waits. -EBUSY: one of them may still
	 * flush another file; nothing has changed. Once an fdatasync has failed, all flushes of this disk go to
	 * control, whatever is set here: see vb_disk_flush_failed. */
	VB_FLUSH_SET,
	/* disk, pointer = vb_extent[count]: copied; each replaces what it overlaps. A request is a hit when one extent
	 * has all of it; extents that continue each other, also in the file, become one. -EINVAL: nothing was mapped.
	 */
	VB_MAP,
	/* disk, offset, length: forgotten at once; acknowledged when no I/O of the engine's touches it any more. */
	VB_REVOKE,
	/* queue, disk, pointer = vb_queue_config: copied. -EFAULT: the rings are not in memory; -EINVAL: the size or the base;
	 * -EPERM: nobody can wait for that kick fd; -EBADMSG: what is in `inflight` was not written for this ring. The
	 * call fd is signalled once. ACK.aux = requests that somebody else has left in flight, and that are served
	 * again. */
	VB_QUEUE_START,
	/* queue: pop no more; acknowledged when drained, ACK.aux = vb_queue_config.base to go on from. flags & 1: what
	 * nobody is at is not begun, and stays in flight in `inflight` for whoever starts the ring next; what the kernel
	 * is at is waited for, and control answers what it has, maybe with VB_SUSPENDED. Without `inflight` as ever. */
	VB_QUEUE_STOP,
	/* queue, flags = 0 or 1: whether to pop. */
	VB_QUEUE_ENABLE,
	/* queue, aux = enum vb_queue_fd, result = fd or -1: acknowledged when the old one is out of use. A new call fd
	 * is signalled once, because something may have been missed. */
	VB_QUEUE_FD,
	/* cookie = the request's, result = virtio-blk status, length = data bytes written to the guest. No ACK. */
	VB_COMPLETE,
	/* cookie = the request's: the extent map can serve it now. No ACK. */
	VB_RETRY,
	/* disk, pointer = vb_memory_log (or 0), result = an eventfd that is signalled after pages were marked, or -1:
	 * in use when acknowledged, and the one before out of use. flags & 1: what is written to buffers is marked. */
	VB_LOG_SET,
	/* queue, flags = 0 or 1: whether what is written to its ring is marked; offset = where its used ring is for the
	 * log (guest physical). */
	VB_QUEUE_LOG,

	/*
	 * Engine -> control.
	 */

	/* queue and cookie of the command, result = 0 or -errno. */
	VB_ACK = 64,
	/* A request the engine cannot serve. queue, disk, cookie, aux = VIRTIO_BLK_T_*, offset and length in bytes,
	 * pointer = the data (IN, OUT, count 1), vb_iov[count] (IN, OUT), or vb_segment[count] (DISCARD, WRITE_ZEROES;
	 * offset is 0 then), valid until VB_COMPLETE or VB_RETRY. flags: enum vb_request_flag; result = -errno with
	 * VB_REQUEST_FAILED. */
	VB_REQUEST,
	/* queue, disk, result = enum vb_broken: the err_fd is signalled, the queue waits for a stop. What was popped
	 * before is still completed, unless the rings are gone (RING_ADDRESS, MEMORY_FAULT). */
	VB_QUEUE_BROKEN,
	/* queue, disk, result = -errno (-EINVAL: the driver asked for nonsense), aux = VIRTIO_BLK_T_*, offset, length:
	 * the engine failed a request with IOERR. For the log; dropped when the ring is nearly full. */
	VB_IO_ERROR
};

enum { VB_FLUSH_MISS = -1, VB_FLUSH_NOTHING = -2 };
/* VB_COMPLETE.result, for a queue that stops with flags & 1: the request is not done, and stays in flight. */
enum { VB_SUSPENDED = -1 };
enum vb_request_flag {
	VB_REQUEST_RETRIED = 1,     /* it was given back by VB_RETRY once already */
	VB_REQUEST_UNALIGNED = 2,   /* an extent has its range, but it is not aligned enough: do not map, serve */
	VB_REQUEST_NEEDS_FLUSH = 4, /* an extent has its range, but it must be durable: VB_FLUSH_SET, or serve */
	VB_REQUEST_FAILED = 8,      /* the engine has tried, and failed: vb_disk_config.ask_after_errors */
	VB_REQUEST_FAULTED = 16 /* OUT: front-ends have truncated memory. Ask vb_memory_faulted whether this one has */
};
enum vb_queue_fd { VB_QUEUE_KICK, VB_QUEUE_CALL, VB_QUEUE_ERR };

struct vb_message {
	uint16_t type;
	uint16_t flags;
	uint32_t queue; /* control's key of a queue, unique on its thread */
	uint64_t cookie;
	uint64_t disk; /* struct vb_disk * downwards, vb_disk_config.id upwards */
	uint64_t offset;
	uint64_t length;
	uint64_t pointer;
	uint32_t count;
	int32_t result;
	uint64_t aux;
};

struct vb_iov {
	uint64_t address; /* in this process */
	uint64_t length;
};

struct vb_segment {      /* of DISCARD and WRITE_ZEROES, validated against the capacity */
	uint64_t offset; /* bytes */
	uint64_t length; /* bytes */
	uint64_t flags;  /* bit 0: unmap */
};

enum vb_io_kind { VB_IO_AUTO, VB_IO_URING, VB_IO_THREADS };

struct vb_thread_options {
	const char *name;     /* at most 15 characters are shown by ps */
	uint64_t poll_max_ns; /* how long to look for work before sleeping; adapts below this; 0: sleep at once */
	uint64_t poll_grow;   /* what that grows by when it was too short: a factor; 0: 2 */
	uint64_t poll_shrink; /* a divisor: what it shrinks by when the wait was longer than poll_max_ns; 0: to 0 */
	uint32_t io_kind;     /* enum vb_io_kind; AUTO falls back to threads where io_uring is forbidden */
	uint32_t workers;     /* of the thread pool, started when first needed; 0: a sensible number */
};

struct vb_thread;

int vb_thread_create(const struct vb_thread_options *options, struct vb_thread **ret);
/* Ends and joins it. Every disk must be detached: -EBUSY, and nothing happens, otherwise. */
int vb_thread_destroy(struct vb_thread *thread);
/* An eventfd that becomes readable when messages wait; vb_thread_receive clears it. */
int vb_thread_fd(const struct vb_thread *thread);
/* How many of the messages were taken (all, unless the ring is full: keep the rest and try again after a receive). */
int vb_thread_send(struct vb_thread *thread, const struct vb_message *messages, uint32_t count);
/* How many messages were stored; 0 when there are none, and then the eventfd is armed again. Every page of what is to be
 * written was touched: what was truncated before reads as zeroes, and VB_REQUEST_FAULTED says so. `alike`: whether all
 * are VB_REQUESTs of one disk, as they are most often. */
int vb_thread_receive(struct vb_thread *thread, struct vb_message *messages, uint32_t max, uint32_t *alike);
/* enum vb_io_kind that it ended up with. */
int vb_thread_io_kind(const struct vb_thread *thread);

/* ---------------------------------------------------------------- file I/O for the block layer (aio.c) */

/* The same file I/O the engine threads use, for requests that Python serves: one per event loop. */
enum vb_io_op { VB_IO_READ, VB_IO_WRITE, VB_IO_FDATASYNC, VB_IO_FALLOCATE, VB_IO_READ_MANY, VB_IO_WRITE_MANY };

/* A part of READ_MANY and WRITE_MANY, which one thread does in their order until one fails, or its file ends early. */
struct vb_io_part {
	uint64_t offset; /* in the file */
	uint64_t address;
	uint64_t length; /* not 0 */
	int32_t fd;
	uint32_t unused;
};

struct vb_io_request {
	uint64_t cookie;
	uint64_t offset;
	uint64_t length; /* READ, WRITE: the sum of the vector */
	uint64_t iov;    /* struct vb_iov[niov], *_MANY: vb_io_part[niov], which must live until the result is reaped */
	uint32_t niov;
	int32_t fd;     /* not of *_MANY */
	uint32_t op;    /* enum vb_io_op */
	uint32_t flags; /* WRITE: 1 = RWF_DSYNC. FALLOCATE: the mode */
};

struct vb_io_result {
	uint64_t cookie;
	int64_t result; /* bytes moved: less than asked only at the end of the file; or -errno */
};

struct vb_io;

int vb_io_create(uint32_t kind, uint32_t depth, uint32_t workers, struct vb_io **ret);
/* Waits for what is in flight. */
void vb_io_destroy(struct vb_io *io);
int vb_io_fd(const struct vb_io *io);
int vb_io_kind(const struct vb_io *io);
/* How many were taken. */
int vb_io_submit(struct vb_io *io, const struct vb_io_request *requests, uint32_t count);
/* How many results were stored. The fd promises nothing until a call has returned fewer than `max`. */
int vb_io_reap(struct vb_io *io, struct vb_io_result *results, uint32_t max);
/* Cuts `length` bytes into blocks, of which the first has `first` (> 0) bytes, the last may be a part of one, and all others
 * have `block` (> 0); each has a byte in `kinds` then: 1 if it is all zeroes, else 0. */
void vb_zero_blocks(uint64_t address, uint64_t length, uint64_t first, uint64_t block, uint8_t *kinds);
/* Of `count` numbers of 64 bits, so many from the first on are `first`, `first + step`, and so on (modulo 2^64). */
uint64_t vb_count_steps(uint64_t address, uint64_t count, uint64_t first, uint64_t step);
