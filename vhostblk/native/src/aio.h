/*
 * Asynchronous file I/O: io_uring where the kernel lets us, a pool of threads elsewhere and for what io_uring would
 * only hand to its own workers. Used by each engine thread and by vb_io. Knows nothing of guests.
 *
 * An operation belongs to aio from aio_start until aio_reap gives it back. Short transfers are continued, so a result
 * smaller than asked for means the end of the file.
 */
#pragma once
#include <sys/uio.h>
#include "../engine.h"
#include "common.h"

enum aio_flag {
	AIO_DSYNC = 1, /* a write that is durable when it completes */
	AIO_POOL = 2,  /* use the thread pool even where io_uring works */
	AIO_BRIEF = 4 /* in the pool: a copy that seldom waits, so that one thread does many before a second is woken */
};

/* A kind besides those of enum vb_io_op: fill the vector with zeroes; no file. With AIO_POOL only. */
#define AIO_ZEROES (VB_IO_WRITE_MANY + 1)

struct aio_op {
	struct aio_op *next; /* aio's, and then the list that aio_reap returns */
	union {
		struct iovec *iov; /* pieces not yet transferred; changed during the operation, as it was afterwards */
		const struct vb_io_part *parts; /* of *_MANY */
	};
	uint32_t pieces; /* or parts */
	uint8_t kind;    /* enum vb_io_op, or AIO_ZEROES */
	uint8_t flags;   /* enum aio_flag */
	int16_t buffer;  /* number of the registered buffer that has the one piece, or -1 */
	int16_t file;    /* number of the registered file that fd is, or -1 */
	int32_t fd;
	int32_t mode;     /* FALLOCATE */
	uint64_t offset;  /* in the file; advances */
	uint64_t length;  /* FALLOCATE */
	int64_t result;   /* bytes transferred so far; at the end that, or -errno */
	uint64_t trimmed; /* bytes already cut off the front of *iov */
	bool unwanted;    /* see aio_cancel */
	uint8_t lane;     /* see aio_lanes.h */
};

struct aio;

/* kind is an enum vb_io_kind; depth is how many operations io_uring may have at once, the others queue up here; workers is
 * how many of a file the pool may have begun at once. */
int aio_create(uint32_t kind, uint32_t depth, uint32_t workers, struct aio **ret);
/* Nothing may be in flight. */
void aio_destroy(struct aio *aio);
/* Readable, level-triggered, when aio_reap or aio_flush have something to do. */
int aio_fd(const struct aio *aio);
enum vb_io_kind aio_kind(const struct aio *aio);

/* Takes effect with the next aio_flush. */
void aio_start(struct aio *aio, struct aio_op *op);
void aio_flush(struct aio *aio);
/* Whether aio_reap would return something, without asking the kernel. */
bool aio_pending(const struct aio *aio);
/* What has finished, as a list; NULL when nothing has. */
struct aio_op *aio_reap(struct aio *aio);

/*
 * Nobody wants it any more: if it has not begun it will not begin, and if the kernel lets go of it so do we. aio_reap
 * gives it back all the same, with -ECANCELED if it was not done. aio_sweep takes effect for many: call it after the last.
 */
void aio_cancel(struct aio *aio, struct aio_op *op);
void aio_sweep(struct aio *aio);

/* Do it here and now: result in op->result. Context: any thread. */
void aio_run(struct aio_op *op);

/* Read what is in the page cache, without waiting for a device. True: it is done, as after aio_run. False: aio_start
 * does the rest. Context: any thread. */
bool aio_try_read(struct aio_op *op);

/* Registered ("fixed") buffers, at most AIO_BUFFER_MAX bytes each: number >= 0 or -errno. */
#define AIO_BUFFER_MAX (1ull << 30)
int aio_register_buffer(struct aio *aio, uint64_t address, uint64_t length);
void aio_unregister_buffer(struct aio *aio, int number);

/* Registered ("fixed") files: number >= 0 or -errno. A registered file stays open until it is unregistered. */
int aio_register_file(struct aio *aio, int fd);
void aio_unregister_file(struct aio *aio, int number);

/* For the parts of aio. */

/* Take note of what one system call or completion said (bytes, or -errno). True: the operation has finished. */
bool aio_advance(struct aio_op *op, int64_t result);

/* Move what is unwanted from one list to the front of another; returns where the first one ends now. */
struct aio_op **aio_sweep_list(struct aio_op **list, struct aio_op **swept);

/* What the next system call may be asked to do. */
static inline uint32_t aio_batch(const struct aio_op *op)
{
	return MIN(op->pieces, 1024u); /* IOV_MAX */
}

struct aio_uring;

int aio_uring_create(uint32_t depth, struct aio_uring **ret);
void aio_uring_destroy(struct aio_uring *uring);
int aio_uring_fd(const struct aio_uring *uring);
/* False: the ring is full, the operation is still the caller's. */
bool aio_uring_start(struct aio_uring *uring, struct aio_op *op);
void aio_uring_flush(struct aio_uring *uring);
/* Ask the kernel to let go of it; it may not, and it may not even be asked. */
void aio_uring_cancel(struct aio_uring *uring, struct aio_op *op);
/* Whether there is something that the kernel did not take. */
bool aio_uring_refused(const struct aio_uring *uring);
bool aio_uring_pending(const struct aio_uring *uring);
/* One completion: the operation and what the kernel said; NULL: there is none. */
struct aio_op *aio_uring_reap(struct aio_uring *uring, int64_t *result);
int aio_uring_register_buffer(struct aio_uring *uring, uint64_t address, uint64_t length);
void aio_uring_unregister_buffer(struct aio_uring *uring, int number);
int aio_uring_register_file(struct aio_uring *uring, int fd);
void aio_uring_unregister_file(struct aio_uring *uring, int number);

struct aio_pool;

int aio_pool_create(uint32_t workers, struct aio_pool **ret);
void aio_pool_destroy(struct aio_pool *pool);
int aio_pool_fd(const struct aio_pool *pool);
/* Readable when aio_pool_flush has something to do though nothing was started. */
int aio_pool_timer_fd(const struct aio_pool *pool);
void aio_pool_start(struct aio_pool *pool, struct aio_op *op);
void aio_pool_flush(struct aio_pool *pool);
/* Those that are unwanted, and that no thread has begun; the owner has them again. */
struct aio_op *aio_pool_sweep(struct aio_pool *pool);
bool aio_pool_pending(const struct aio_pool *pool);
struct aio_op *aio_pool_reap(struct aio_pool *pool);
