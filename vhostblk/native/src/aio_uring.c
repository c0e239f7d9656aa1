/*
 * aio_uring.c: the io_uring half of aio.
 */
#include <errno.h>
#include <sched.h>
#include <stdlib.h>
#include "aio.h"

#ifndef VB_NO_URING
#include <liburing.h>
#include <sys/syscall.h>
#include <unistd.h>

/* Registered buffers of one ring; a number each for up to 1 GiB of guest memory. */
#define BUFFERS 512

/* The kernel lets the device begin when it has taken all of a submission. Small ones keep it busy meanwhile. */
#define SUBMIT_BATCH 8

/* Registered files of one ring. */
#define FILES 256

struct aio_uring {
	struct io_uring ring;
	uint32_t in_flight; /* prepared or submitted, not reaped */
	uint32_t depth;     /* no more than the completion queue holds */
	bool has_buffers;
	bool has_files;
	bool used[BUFFERS];
	bool used_files[FILES];
};

int vb_io_uring_error(void)
{
	struct io_uring ring;
	int error = io_uring_queue_init(2, &ring, 0);

	if (!error)
		io_uring_queue_exit(&ring);
	return error;
}

/* A new ring that does nothing yet, or one that works at once on a kernel too old for that. */
static int set_up(struct aio_uring *uring, uint32_t depth, bool *ret_disabled)
{
	static const unsigned flags[] = {
		/* A thread that submits looks at its completions soon: they need not interrupt it. Linux 5.19. */
		IORING_SETUP_R_DISABLED | IORING_SETUP_COOP_TASKRUN | IORING_SETUP_TASKRUN_FLAG,
		IORING_SETUP_R_DISABLED, /* Linux 5.10 */
		0,
	};
	int error = -EINVAL;

	for (unsigned i = 0; error == -EINVAL && i < sizeof(flags) / sizeof(*flags); i++) {
		struct io_uring_params params = {.flags = IORING_SETUP_CLAMP | flags[i]};

		error = io_uring_queue_init_params(depth, &uring->ring, &params);
		uring->depth = params.cq_entries;
		*ret_disabled = flags[i] & IORING_SETUP_R_DISABLED;
	}
	return error;
}

/* io_uring_register(2): liburing's functions for these two are not exported by its shared library before 2.4. */
static int register_in(struct io_uring *ring, unsigned what, const void *values, unsigned count)
{
	return syscall(SYS_io_uring_register, ring->ring_fd, what, values, count) < 0 ? -errno : 0;
}

/* From now on the ring does what this file asks of it, and nothing else, for good. What is in a ring is no system call,
 * so no filter of these sees it: somebody who has taken the process over would have sockets and files by this way. */
static int restrict_and_enable(struct io_uring *ring)
{
	struct io_uring_restriction allowed[] = {
		{.opcode = IORING_RESTRICTION_SQE_OP, .sqe_op = IORING_OP_READV},
		{.opcode = IORING_RESTRICTION_SQE_OP, .sqe_op = IORING_OP_READ_FIXED},
		{.opcode = IORING_RESTRICTION_SQE_OP, .sqe_op = IORING_OP_WRITEV},
		{.opcode = IORING_RESTRICTION_SQE_OP, .sqe_op = IORING_OP_WRITE_FIXED},
		{.opcode = IORING_RESTRICTION_SQE_OP, .sqe_op = IORING_OP_FSYNC},
		{.opcode = IORING_RESTRICTION_SQE_OP, .sqe_op = IORING_OP_ASYNC_CANCEL},
		{.opcode = IORING_RESTRICTION_SQE_FLAGS_ALLOWED, .sqe_flags = IOSQE_FIXED_FILE},
		{.opcode = IORING_RESTRICTION_REGISTER_OP, .register_op = IORING_REGISTER_BUFFERS_UPDATE},
		{.opcode = IORING_RESTRICTION_REGISTER_OP, .register_op = IORING_REGISTER_FILES_UPDATE},
	};
	int error = register_in(ring, IORING_REGISTER_RESTRICTIONS, allowed, sizeof(allowed) / sizeof(*allowed));

	return error ? error : register_in(ring, IORING_REGISTER_ENABLE_RINGS, NULL, 0);
}

int aio_uring_create(uint32_t depth, struct aio_uring **ret)
{
	struct aio_uring *uring = calloc(1, sizeof(*uring));
	bool disabled;
	int error;

	if (!uring)
		return -ENOMEM;
	error = set_up(uring, depth, &disabled);
	if (error) {
		free(uring);
		return error;
	}
	/* Linux 5.19; without it nothing is registered. */
	uring->has_buffers = !io_uring_register_buffers_sparse(&uring->ring, BUFFERS);
	uring->has_files = !io_uring_register_files_sparse(&uring->ring, FILES);
	error = disabled ? restrict_and_enable(&uring->ring) : 0;
	if (error) {
		aio_uring_destroy(uring);
		return error;
	}
	*ret = uring;
	return 0;
}

void aio_uring_destroy(struct aio_uring *uring)
{
	if (uring)
		io_uring_queue_exit(&uring->ring);
	free(uring);
}

int aio_uring_fd(const struct aio_uring *uring)
{
	return uring->ring.ring_fd;
}

static void prepare(struct io_uring_sqe *sqe, const struct aio_op *op)
{
	unsigned length = op->buffer >= 0 ? (unsigned)op->iov->iov_len : 0;

	if (op->kind == VB_IO_READ && op->buffer >= 0)
		io_uring_prep_read_fixed(sqe, op->fd, op->iov->iov_base, length, op->offset, op->buffer);
	else if (op->kind == VB_IO_READ)
		io_uring_prep_readv(sqe, op->fd, op->iov, aio_batch(op), op->offset);
	else if (op->buffer >= 0)
		io_uring_prep_write_fixed(sqe, op->fd, op->iov->iov_base, length, op->offset, op->buffer);
	else
		io_uring_prep_writev(sqe, op->fd, op->iov, aio_batch(op), op->offset);
	if (op->flags & AIO_DSYNC)
		sqe->rw_flags = RWF_DSYNC;
	if (op->file >= 0) {
		sqe->fd = op->file;
		sqe->flags |= IOSQE_FIXED_FILE;
	}
}

bool aio_uring_start(struct aio_uring *uring, struct aio_op *op)
{
	struct io_uring_sqe *sqe;

	if (uring->in_flight == uring->depth)
		return false;
	sqe = io_uring_get_sqe(&uring->ring);
	if (!sqe) {
		aio_uring_flush(uring);
		sqe = io_uring_get_sqe(&uring->ring);
		if (!sqe)
			return false;
	}
	if (op->kind == VB_IO_FDATASYNC)
		io_uring_prep_fsync(sqe, op->fd, IORING_FSYNC_DATASYNC);
	else
		prepare(sqe, op);
	io_uring_sqe_set_data(sqe, op);
	uring->in_flight++;
	if (io_uring_sq_ready(&uring->ring) >= SUBMIT_BATCH)
		aio_uring_flush(uring);
	return true;
}

void aio_uring_flush(struct aio_uring *uring)
{
	/* One bad entry ends a submission early, hence the loop. An error (-EAGAIN, -EBUSY) leaves the entries where
	 * they are, and aio_uring_refused() says so. */
	for (int tries = 0; io_uring_sq_ready(&uring->ring) && tries < 100; tries++)
		if (io_uring_submit(&uring->ring) < 0)
			sched_yield();
}

bool aio_uring_refused(const struct aio_uring *uring)
{
	return io_uring_sq_ready(&uring->ring);
}

/* Completions, or work of the kernel that becomes some when the thread enters it. */
static bool may_reap(const struct aio_uring *uring)
{
	return io_uring_cq_ready(&uring->ring) || load_relaxed(uring->ring.sq.kflags) & IORING_SQ_TASKRUN;
}

bool aio_uring_pending(const struct aio_uring *uring)
{
	return may_reap(uring) || io_uring_sq_ready(&uring->ring);
}

void aio_uring_cancel(struct aio_uring *uring, struct aio_op *op)
{
	struct io_uring_sqe *sqe;

	/* Only what the kernel has can be found there. */
	aio_uring_flush(uring);
	sqe = uring->in_flight < uring->depth ? io_uring_get_sqe(&uring->ring) : NULL;
	if (!sqe)
		return;
	io_uring_prep_cancel(sqe, op, 0);
	io_uring_sqe_set_data(sqe, NULL);
	uring->in_flight++;
}

struct aio_op *aio_uring_reap(struct aio_uring *uring, int64_t *result)
{
	struct io_uring_cqe *cqe;
	struct aio_op *op;

	do {
		if (!may_reap(uring) || io_uring_peek_cqe(&uring->ring, &cqe))
			return NULL;
		op = io_uring_cqe_get_data(cqe);
		*result = cqe->res;
		io_uring_cqe_seen(&uring->ring, cqe);
		uring->in_flight--;
	} while (!op); /* the answer to a cancellation: what was cancelled has its own */
	return op;
}

static int update_buffer(struct aio_uring *uring, int number, void *address, uint64_t length)
{
	struct iovec iov = {address, length};
	int updated = io_uring_register_buffers_update_tag(&uring->ring, (unsigned)number, &iov, NULL, 1);

	return updated < 0 ? updated : 0;
}

/* A number that is not in use, or -ENOSPC. */
static int vacant(const bool *used, int count)
{
	for (int number = 0; number < count; number++)
		if (!used[number])
			return number;
	return -ENOSPC;
}

int aio_uring_register_buffer(struct aio_uring *uring, uint64_t address, uint64_t length)
{
	int number = uring->has_buffers ? vacant(uring->used, BUFFERS) : -EOPNOTSUPP, error;

	if (number < 0)
		return number;
	error = update_buffer(uring, number, (void *)address, length);
	if (error)
		return error;
	uring->used[number] = true;
	return number;
}

void aio_uring_unregister_buffer(struct aio_uring *uring, int number)
{
	update_buffer(uring, number, NULL, 0);
	uring->used[number] = false;
}

int aio_uring_register_file(struct aio_uring *uring, int fd)
{
	int number = uring->has_files ? vacant(uring->used_files, FILES) : -EOPNOTSUPP, updated;

	if (number < 0)
		return number;
	updated = io_uring_register_files_update(&uring->ring, (unsigned)number, &fd, 1);
	if (updated < 0)
		return updated;
	uring->used_files[number] = true;
	return number;
}

void aio_uring_unregister_file(struct aio_uring *uring, int number)
{
	int nothing = -1;

	io_uring_register_files_update(&uring->ring, (unsigned)number, &nothing, 1);
	uring->used_files[number] = false;
}

#else /* built without liburing: as on a kernel without io_uring */

int vb_io_uring_error(void)
{
	return -ENOTSUP;
}

int aio_uring_create(uint32_t depth, struct aio_uring **ret)
{
	(void)depth;
	(void)ret;
	return -ENOTSUP;
}

void aio_uring_destroy(struct aio_uring *uring)
{
	(void)uring;
}

int aio_uring_fd(const struct aio_uring *uring)
{
	(void)uring;
	return -1;
}

bool aio_uring_start(struct aio_uring *uring, struct aio_op *op)
{
	(void)uring;
	(void)op;
	return false;
}

void aio_uring_flush(struct aio_uring *uring)
{
	(void)uring;
}

void aio_uring_cancel(struct aio_uring *uring, struct aio_op *op)
{
	(void)uring;
	(void)op;
}

bool aio_uring_refused(const struct aio_uring *uring)
{
	(void)uring;
	return false;
}

bool aio_uring_pending(const struct aio_uring *uring)
{
	(void)uring;
	return false;
}

struct aio_op *aio_uring_reap(struct aio_uring *uring, int64_t *result)
{
	(void)uring;
	(void)result;
	return NULL;
}

int aio_uring_register_buffer(struct aio_uring *uring, uint64_t address, uint64_t length)
{
	(void)uring;
	(void)address;
	(void)length;
	return -EOPNOTSUPP;
}

void aio_uring_unregister_buffer(struct aio_uring *uring, int number)
{
	(void)uring;
	(void)number;
}

int aio_uring_register_file(struct aio_uring *uring, int fd)
{
	(void)uring;
	(void)fd;
	return -EOPNOTSUPP;
}

void aio_uring_unregister_file(struct aio_uring *uring, int number)
{
	(void)uring;
	(void)number;
}

#endif
