/*
 * aio.c: chooses between io_uring and the thread pool, and continues short transfers.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/timerfd.h>
#include <unistd.h>
#include "aio.h"

/* When io_uring has refused a submission it is tried again after that. */
#define RETRY_NS 1000000

/* One system call of many parts. For larger writes the kernel looks for larger pages, which takes it up to four times
 * as long. */
#define MANY_BYTES (1ull << 20)
#define MANY_PIECES 64

struct aio {
	struct aio_uring *uring; /* NULL: the pool does everything */
	struct aio_pool *pool;
	int epoll_fd;
	int retry_fd; /* a timer: the kernel would not take what it was given */
	bool retry_due;
	/* Operations that found the ring full, in order. */
	struct aio_op *backlog;
	struct aio_op **backlog_end;
	struct aio_op *swept; /* unwanted, and not begun */
};

static int watch(struct aio *aio, int fd)
{
	struct epoll_event event = {.events = EPOLLIN};

	return epoll_ctl(aio->epoll_fd, EPOLL_CTL_ADD, fd, &event) ? -errno : 0;
}

static int aio_init(struct aio *aio, uint32_t kind, uint32_t depth, uint32_t workers)
{
	int error;

	aio->backlog_end = &aio->backlog;
	aio->retry_fd = -1;
	aio->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	if (aio->epoll_fd < 0)
		return -errno;
	error = aio_pool_create(workers, &aio->pool);
	if (!error)
		error = watch(aio, aio_pool_fd(aio->pool));
	if (!error)
		error = watch(aio, aio_pool_timer_fd(aio->pool));
	if (error || kind == VB_IO_THREADS)
		return error;
	error = aio_uring_create(depth, &aio->uring);
	if (error)
		return kind == VB_IO_AUTO ? 0 : error;
	error = watch(aio, aio_uring_fd(aio->uring));
	if (error)
		return error;
	aio->retry_fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
	return aio->retry_fd < 0 ? -errno : watch(aio, aio->retry_fd);
}

int aio_create(uint32_t kind, uint32_t depth, uint32_t workers, struct aio **ret)
{
	struct aio *aio = calloc(1, sizeof(*aio));
	int error;

	if (!aio)
		return -ENOMEM;
	error = aio_init(aio, kind, depth, workers);
	if (error) {
		aio_destroy(aio);
		return error;
	}
	*ret = aio;
	return 0;
}

void aio_destroy(struct aio *aio)
{
	aio_uring_destroy(aio->uring);
	aio_pool_destroy(aio->pool);
	if (aio->epoll_fd >= 0)
		close(aio->epoll_fd);
	if (aio->retry_fd >= 0)
		close(aio->retry_fd);
	free(aio);
}

int aio_fd(const struct aio *aio)
{
	return aio->epoll_fd;
}

enum vb_io_kind aio_kind(const struct aio *aio)
{
	return aio->uring ? VB_IO_URING : VB_IO_THREADS;
}

void aio_start(struct aio *aio, struct aio_op *op)
{
	/* fallocate always blocks; io_uring would hand it to a worker of its own. It knows no operations of many. */
	if (!aio->uring || op->flags & AIO_POOL || op->kind >= VB_IO_FALLOCATE) {
		aio_pool_start(aio->pool, op);
	} else if (aio->backlog || !aio_uring_start(aio->uring, op)) {
		op->next = NULL;
		*aio->backlog_end = op;
		aio->backlog_end = &op->next;
	}
}

static void start_backlog(struct aio *aio)
{
	while (aio->backlog) {
		struct aio_op *op = aio->backlog, *next = op->next;

		if (!aio_uring_start(aio->uring, op))
			return;
		aio->backlog = next;
		if (!next)
			aio->backlog_end = &aio->backlog;
	}
}

/* Nothing may be in flight whose end would bring the owner back, so a timer does. */
static void retry_soon(struct aio *aio)
{
	struct itimerspec soon = {.it_value.tv_nsec = RETRY_NS};

	aio->retry_due = !timerfd_settime(aio->retry_fd, 0, &soon, NULL);
}

/* The kernel has taken it: a timer that nobody waits for would keep the owner awake. */
static void retry_never(struct aio *aio)
{
	struct itimerspec never = {0};

	aio->retry_due = !!timerfd_settime(aio->retry_fd, 0, &never, NULL);
}

static void retry_comes(struct aio *aio)
{
	uint64_t ignored;

	/* Before it is due there is nothing to read, and it stays due. */
	if (read(aio->retry_fd, &ignored, sizeof(ignored)) > 0)
		aio->retry_due = false;
}

void aio_flush(struct aio *aio)
{
	aio_pool_flush(aio->pool);
	if (!aio->uring)
		return;
	start_backlog(aio);
	aio_uring_flush(aio->uring);
	if (aio_uring_refused(aio->uring) == aio->retry_due)
		return;
	if (aio->retry_due)
		retry_never(aio);
	else
		retry_soon(aio);
}

void aio_cancel(struct aio *aio, struct aio_op *op)
{
	op->unwanted = true;
	if (aio->uring && !(op->flags & AIO_POOL) && op->kind != VB_IO_FALLOCATE)
		aio_uring_cancel(aio->uring, op);
}

struct aio_op **aio_sweep_list(struct aio_op **list, struct aio_op **swept)
{
	struct aio_op **link = list;

	while (*link) {
		struct aio_op *op = *link;

		if (!op->unwanted) {
			link = &op->next;
			continue;
		}
		*link = op->next;
		op->next = *swept;
		*swept = op;
	}
	return link;
}

void aio_sweep(struct aio *aio)
{
	struct aio_op *swept = aio_pool_sweep(aio->pool), *next;

	aio->backlog_end = aio_sweep_list(&aio->backlog, &swept);
	for (; swept; swept = next) {
		next = swept->next;
		swept->result = -ECANCELED;
		swept->next = aio->swept;
		aio->swept = swept;
	}
}

bool aio_pending(const struct aio *aio)
{
	return aio->swept || aio_pool_pending(aio->pool) || (aio->uring && aio_uring_pending(aio->uring));
}

/*
 * The kernel would rather not do it now, or its ring cannot: a thread that may block can. What nobody has cancelled
 * was to be done by a worker of the ring's, and no more of them may be started (RLIMIT_NPROC, pids.max).
 */
static bool refused(const struct aio_op *op, int64_t result)
{
	return !(op->flags & AIO_POOL) &&
	       (result == -EAGAIN || result == -EINTR || (result == -ECANCELED && !op->unwanted));
}

/* Give the first piece its original extent again. */
static void restore_piece(struct aio_op *op)
{
	op->iov->iov_base = (char *)op->iov->iov_base - op->trimmed;
	op->iov->iov_len += op->trimmed;
	op->trimmed = 0;
}

/* An unwanted one that would be tried again, or go on. */
static void abandon(struct aio_op *op)
{
	if (op->trimmed)
		restore_piece(op);
	op->result = -ECANCELED;
}

struct aio_op *aio_reap(struct aio *aio)
{
	struct aio_op *finished = aio_pool_pending(aio->pool) ? aio_pool_reap(aio->pool) : NULL, *op;
	int64_t result;

	while ((op = aio->swept)) {
		aio->swept = op->next;
		op->next = finished;
		finished = op;
	}
	if (!aio->uring)
		return finished;
	if (aio->retry_due)
		retry_comes(aio);
	while ((op = aio_uring_reap(aio->uring, &result))) {
		bool again = refused(op, result);

		if (again && !op->unwanted)
			op->flags |= AIO_POOL;
		else if (!again)
			again = !aio_advance(op, result);
		if (again && !op->unwanted) {
			aio_start(aio, op);
			continue;
		}
		if (again)
			abandon(op);
		op->next = finished;
		finished = op;
	}
	return finished;
}

/* Go on behind `bytes`; pieces of length 0 are skipped too. */
static void skip(struct aio_op *op, uint64_t bytes)
{
	op->offset += bytes;
	while (op->pieces && bytes >= op->iov->iov_len) {
		bytes -= op->iov->iov_len;
		if (op->trimmed)
			restore_piece(op);
		op->iov++;
		op->pieces--;
	}
	if (bytes) {
		op->iov->iov_base = (char *)op->iov->iov_base + bytes;
		op->iov->iov_len -= bytes;
		op->trimmed += bytes;
	}
}

bool aio_advance(struct aio_op *op, int64_t result)
{
	bool transfer = op->kind == VB_IO_READ || op->kind == VB_IO_WRITE || op->kind == AIO_ZEROES;

	if (result > 0 && transfer) {
		op->result += result;
		skip(op, (uint64_t)result);
		/* What a registered buffer could not do in one go continues as usual. */
		op->buffer = -1;
		if (op->pieces)
			return false;
	} else if (result < 0) {
		op->result = result;
	} else if (op->kind == VB_IO_WRITE && op->pieces) {
		op->result = -EIO; /* a write that makes no progress never will */
	}
	if (op->trimmed)
		restore_piece(op);
	return true;
}

static int64_t fill_with_zeroes(const struct aio_op *op)
{
	int64_t filled = 0;

	for (uint32_t i = 0; i < op->pieces; i++) {
		memset(op->iov[i].iov_base, 0, op->iov[i].iov_len);
		filled += (int64_t)op->iov[i].iov_len;
	}
	return filled;
}

/* The calls that know no vectors are shorter by a tenth, which is what a file in memory is worth. */
static ssize_t read_once(const struct aio_op *op)
{
	if (op->pieces == 1)
		return pread(op->fd, op->iov->iov_base, op->iov->iov_len, (off_t)op->offset);
	return preadv(op->fd, op->iov, (int)aio_batch(op), (off_t)op->offset);
}

static ssize_t write_once(const struct aio_op *op)
{
	if (op->flags & AIO_DSYNC)
		return pwritev2(op->fd, op->iov, (int)aio_batch(op), (off_t)op->offset, RWF_DSYNC);
	if (op->pieces == 1)
		return pwrite(op->fd, op->iov->iov_base, op->iov->iov_len, (off_t)op->offset);
	return pwritev(op->fd, op->iov, (int)aio_batch(op), (off_t)op->offset);
}

static int64_t run_once(struct aio_op *op)
{
	int64_t result;

	switch (op->kind) {
	case VB_IO_READ:
		result = read_once(op);
		break;
	case VB_IO_WRITE:
		result = write_once(op);
		break;
	case VB_IO_FDATASYNC:
		result = fdatasync(op->fd);
		break;
	case AIO_ZEROES:
		return fill_with_zeroes(op);
	case VB_IO_FALLOCATE:
		result = fallocate(op->fd, op->mode, (off_t)op->offset, (off_t)op->length);
		break;
	default:
		return -EINVAL;
	}
	return result < 0 ? -errno : result;
}

/* Parts that follow each other in their file are one system call. */
static int64_t run_many(const struct aio_op *op)
{
	const struct vb_io_part *part = op->parts, *end = part + op->pieces;
	uint64_t begun = 0; /* bytes of *part that are done */
	int64_t done = 0;

	while (part < end) {
		struct iovec pieces[MANY_PIECES];
		struct aio_op call = {
			.iov = pieces,
			.kind = op->kind == VB_IO_READ_MANY ? VB_IO_READ : VB_IO_WRITE,
			.buffer = -1,
			.file = -1,
			.fd = part->fd,
			.offset = part->offset + begun,
		};
		uint64_t wanted = 0;

		do {
			uint64_t length = MIN(part->length - begun, MANY_BYTES - wanted);

			pieces[call.pieces++] = (struct iovec){(char *)part->address + begun, length};
			wanted += length;
			begun += length;
			if (begun < part->length)
				break;
			begun = 0;
			part++;
		} while (part < end && wanted < MANY_BYTES && call.pieces < MANY_PIECES && part->fd == call.fd &&
			 part->offset == call.offset + wanted);
		aio_run(&call);
		if (call.result < 0)
			return call.result;
		done += call.result;
		if ((uint64_t)call.result < wanted)
			break;
	}
	return done;
}

void aio_run(struct aio_op *op)
{
	int64_t result;

	if (op->kind == VB_IO_READ_MANY || op->kind == VB_IO_WRITE_MANY) {
		op->result = run_many(op);
		return;
	}
	do {
		result = run_once(op);
	} while (result == -EINTR || !aio_advance(op, result));
}

bool aio_try_read(struct aio_op *op)
{
	ssize_t result;

	do {
		result = preadv2(op->fd, op->iov, (int)aio_batch(op), (off_t)op->offset, RWF_NOWAIT);
		/* Whatever the reason, and whether it is one: who may wait will find out. Not even 0 says that the file
		 * ends here: Linux 5.9 and 5.10 may mean that they would have to wait, see preadv2(2). */
		if (result <= 0)
			return false;
	} while (!aio_advance(op, result));
	return true;
}

int aio_register_buffer(struct aio *aio, uint64_t address, uint64_t length)
{
	return aio->uring ? aio_uring_register_buffer(aio->uring, address, length) : -EOPNOTSUPP;
}

void aio_unregister_buffer(struct aio *aio, int number)
{
	aio_uring_unregister_buffer(aio->uring, number);
}

int aio_register_file(struct aio *aio, int fd)
{
	return aio->uring ? aio_uring_register_file(aio->uring, fd) : -EOPNOTSUPP;
}

void aio_unregister_file(struct aio *aio, int number)
{
	aio_uring_unregister_file(aio->uring, number);
}
