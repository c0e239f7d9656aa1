/*
 * serve.c: what becomes of a request that passed the checks: served from the extent map, or handed to control.
 */
#include <errno.h>
#include <linux/virtio_blk.h>
#include "queue.h"
#include "sigbus.h"
#include "stats.h"

/* So many reads at most are not looked for in the page cache because others were not there. */
#define COLD_MAX 63

/* `flags`: what VB_REQUEST says beyond VB_REQUEST_RETRIED; `error`: with which errno it has failed, negative. */
static void hand_with_error(struct request *request, uint16_t flags, int error)
{
	struct queue *queue = request->queue;
	struct blk_request *blk = &request->blk;
	bool in_one_piece = (blk->op == VB_OP_READ || blk->op == VB_OP_WRITE) && blk->pieces == 1;
	struct vb_message message = {
		.type = VB_REQUEST,
		.flags = (uint16_t)(flags | (request->missed ? VB_REQUEST_RETRIED : 0)),
		.queue = queue->key,
		.cookie = request_cookie(request),
		.disk = queue->attachment->disk->config.id,
		.offset = blk->offset,
		.length = blk->length,
		.pointer = (uint64_t)(in_one_piece ? blk->data->iov_base : blk->data),
		.count = blk->pieces,
		.result = error,
		.aux = blk->type,
	};

	if (!request->missed)
		stat_add(queue->stats->misses, 1);
	request->missed = true;
	request->state = REQUEST_CONTROL;
	thread_post(queue->thread, &message);
}

static void hand_to_control(struct request *request, uint16_t flags)
{
	hand_with_error(request, flags, 0);
}

static void report_failure(struct request *request, int error)
{
	struct queue *queue = request->queue;
	struct vb_message message = {
		.type = VB_IO_ERROR,
		.queue = queue->key,
		.disk = queue->attachment->disk->config.id,
		.offset = request->blk.offset,
		.length = request->blk.length,
		.result = error,
		.aux = request->blk.type,
	};

	/* For the log only: never at the cost of a message that matters. */
	if (thread_room(queue->thread) > ROOM_RESERVE)
		thread_post(queue->thread, &message);
}

/* Part of a write that has failed may be in the file all the same. */
static void note_write(struct request *request)
{
	disk_wrote(request->queue->attachment->disk, request->blk.offset, request->blk.length);
}

/* Not inline: reads need none of its registers. */
__attribute__((noinline)) static void finish_write(struct request *request)
{
	note_write(request);
	request_complete(request, VIRTIO_BLK_S_OK, 0);
}

__attribute__((noinline)) static void fail_io(struct request *request, int error)
{
	if (request->blk.op == VB_OP_WRITE)
		note_write(request);
	if (request->queue->attachment->disk->config.ask_after_errors >> request->blk.op & 1) {
		if (request->queue->suspending) {
			request_suspend(request); /* it fails once more for whoever has the ring next, who can wait */
			return;
		}
		/* Many may fail at a time, and nobody has put room in the ring up aside for that. */
		request->op.result = error;
		request->state = REQUEST_FAILED;
		list_append(&request->queue->thread->failed, &request->in_line);
		return;
	}
	report_failure(request, error);
	request_complete(request, VIRTIO_BLK_S_IOERR, 0);
}

bool requests_ask_control(struct vb_thread *thread)
{
	bool any = false;

	while (!list_empty(&thread->failed) && thread_room(thread) > ROOM_RESERVE) {
		struct request *request = container_of(thread->failed.next, struct request, in_line);

		list_remove(&request->in_line);
		hand_with_error(request, VB_REQUEST_FAILED, (int)request->op.result);
		any = true;
	}
	return any;
}

static void finish_io(struct request *request, int64_t result)
{
	struct blk_request *blk = &request->blk;

	if (result < 0 || (uint64_t)result != blk->length)
		/* An extent that reaches beyond the end of its file is an error of whoever mapped it. */
		fail_io(request, result < 0 ? (int)result : -EIO);
	else if (blk->op == VB_OP_WRITE)
		finish_write(request);
	else
		request_complete(request, VIRTIO_BLK_S_OK, blk->op == VB_OP_READ ? blk->length : 0);
}

/* An acknowledgement that has waited for this is not seen before the end of the turn: what finish_io notes is there. */
void request_untrack(struct request *request)
{
	struct attachment *attachment = request->queue->attachment;
	struct extent_file *file = request->file;

	request->file = NULL;
	if (file && !--file->users && !file->extents)
		attachment_register_files(attachment);
	attachment_io_ended(attachment, &request->track);
}

void request_io_done(struct aio_op *op)
{
	struct request *request = container_of(op, struct request, op);

	if (op->kind == VB_IO_FDATASYNC) {
		flush_ended(request);
	} else if (request->queue->suspending && (op->result == -ECANCELED || request->flush_after)) {
		request_untrack(request);
		request_suspend(request);
	} else if (request->flush_after && op->result == (int64_t)request->blk.length) {
		flush_join(request, op->fd);
	} else {
		request_untrack(request);
		finish_io(request, op->result);
	}
}

void request_flushed(struct request *request, int error)
{
	request_untrack(request);
	finish_io(request, error ? error : (int64_t)request->blk.length);
}

/* The range that the engine touches from now on, and whether it flushes: control can wait for both to end. */
static void track_io(struct request *request, bool is_flush)
{
	request->track.offset = request->blk.offset;
	request->track.length = request->blk.length;
	request->track.is_flush = is_flush;
	attachment_io_begins(request->queue->attachment, &request->track);
}

static bool may_flush(const struct attachment *attachment, int fd)
{
	return attachment->flush_fd == fd && !load_relaxed(&attachment->disk->flush_failed);
}

static bool is_aligned(const struct blk_request *blk, const struct vb_extent *extent)
{
	uint64_t host_offset = extent->host_offset + (blk->offset - extent->offset), bits = 0;

	if ((host_offset | blk->length) & (extent->request_alignment - 1))
		return false;
	if (extent->memory_alignment == 1)
		return true;
	for (uint32_t i = 0; i < blk->pieces; i++)
		bits |= (uint64_t)blk->data[i].iov_base | blk->data[i].iov_len;
	return !(bits & (extent->memory_alignment - 1));
}

static void start_io(struct request *request)
{
	track_io(request, request->flush_after);
	if (request->file)
		request->file->users++;
	aio_start(request->queue->thread->aio, &request->op);
}

/* Whether it is short, and the queue has not had its share of this turn; counts it, if so. */
static bool may_run(struct request *request)
{
	struct queue *queue = request->queue;

	if (request->blk.length > INLINE_MAX || queue->work >= QUEUE_WORK)
		return false;
	queue->work += (uint32_t)(request->blk.length / 4096);
	return true;
}

/* Do it here and now, if that is all right for others; otherwise let the pool do it. */
static void run_or_start(struct request *request)
{
	if (may_run(request)) {
		aio_run(&request->op);
		finish_io(request, request->op.result);
	} else {
		start_io(request);
	}
}

/* Most reads from a page cache are found there; looking costs a system call, so after each that is not, more and more
 * are not looked for. */
static void read_cached(struct request *request)
{
	struct attachment *a = request->queue->attachment;

	if (a->cold || !may_run(request)) {
		a->cold -= !!a->cold;
		start_io(request);
	} else if (aio_try_read(&request->op)) {
		a->cold_next = 0;
		finish_io(request, request->op.result);
	} else {
		a->cold = a->cold_next = (uint8_t)MIN(a->cold_next * 2 + 1, COLD_MAX);
		start_io(request);
	}
}

/* io_uring has a worker thread for each write into the page cache of most file systems. We copy by ourselves where only
 * this disk waits if the kernel makes us wait (too much is dirty); where the thread serves others, too, a pool does. */
static void write_cached(struct request *request)
{
	struct vb_thread *thread = request->queue->thread;

	request->op.flags |= AIO_POOL | AIO_BRIEF;
	if (thread->attached == 1 && !request->flush_after)
		run_or_start(request);
	else
		start_io(request);
}

static void serve_zeroes(struct request *request)
{
	request->flush_after = false;
	request->op = (struct aio_op){
		.iov = request->blk.data,
		.pieces = request->blk.pieces,
		.kind = AIO_ZEROES,
		.flags = AIO_POOL,
		.buffer = -1,
		.file = -1,
	};
	run_or_start(request);
}

static void serve_from_file(struct request *request, const struct vb_extent *extent)
{
	struct blk_request *blk = &request->blk;
	struct extent_file *file = extent_file(&request->queue->attachment->map, extent);
	bool write = blk->op == VB_OP_WRITE;
	bool durable = write && load_relaxed(&request->queue->attachment->disk->write_through);
	bool fixed = extent->flags & VB_EXTENT_FIXED && blk->pieces == 1;
	bool pool = extent->flags & (VB_EXTENT_POOL | VB_EXTENT_INLINE);
	bool written_back = !(extent->flags & (VB_EXTENT_FIXED | VB_EXTENT_INLINE));

	/* RWF_DSYNC asks for writeback errors as fdatasync does: of two at a time one may take the error of the other.
	 * Where there is writeback a write is durable by the line of flushes, which many share at a time. */
	request->flush_after = durable && written_back;
	if (request->flush_after && !may_flush(request->queue->attachment, extent->fd)) {
		hand_to_control(request, VB_REQUEST_NEEDS_FLUSH);
		return;
	}
	request->op = (struct aio_op){
		.iov = blk->data,
		.pieces = blk->pieces,
		.kind = write ? VB_IO_WRITE : VB_IO_READ,
		.flags = (uint8_t)((durable && !written_back ? AIO_DSYNC : 0) | (pool ? AIO_POOL : 0)),
		.buffer = (int16_t)(fixed ? memory_use_buffer(request->memory, blk->data) : -1),
		.file = (int16_t)(file ? file->number : -1),
		.fd = extent->fd,
		.offset = extent->host_offset + (blk->offset - extent->offset),
	};
	if (request->op.file >= 0)
		request->file = file;
	if (extent->flags & VB_EXTENT_INLINE)
		run_or_start(request);
	else if (!(extent->flags & VB_EXTENT_CACHED) || extent->flags & VB_EXTENT_POOL)
		start_io(request);
	else if (write)
		write_cached(request);
	else
		read_cached(request);
}

static void serve_transfer(struct request *request)
{
	struct attachment *attachment = request->queue->attachment;
	struct blk_request *blk = &request->blk;
	bool write = blk->op == VB_OP_WRITE;
	const struct vb_extent *extent =
		extent_map_find(&attachment->map, blk->offset, blk->length, write ? VB_EXTENT_WRITE : VB_EXTENT_READ);

	if (!blk->length)
		request_complete(request, VIRTIO_BLK_S_OK, 0);
	else if (!extent)
		hand_to_control(request, 0);
	else if (!is_aligned(blk, extent))
		hand_to_control(request, VB_REQUEST_UNALIGNED);
	else if (extent->flags & VB_EXTENT_ZERO && !write)
		serve_zeroes(request);
	else if (extent->flags & VB_EXTENT_NULL)
		finish_io(request, (int64_t)blk->length);
	else if (extent->flags & VB_EXTENT_ZERO)
		hand_to_control(request, 0);
	else
		serve_from_file(request, extent);
}

static void serve_flush(struct request *request)
{
	int fd = request->queue->attachment->flush_fd;

	if (fd == VB_FLUSH_NOTHING) {
		request_complete(request, VIRTIO_BLK_S_OK, 0);
	} else if (fd < 0 || !may_flush(request->queue->attachment, fd)) {
		hand_to_control(request, 0);
	} else {
		/* All that the driver may count on (VIRTIO 1.2 §5.2.6.2) has completed, so it is in the file. */
		track_io(request, true);
		flush_join(request, fd);
	}
}

static void serve_id(struct request *request)
{
	const uint8_t *serial = request->queue->attachment->disk->config.serial;
	uint64_t done = 0;

	for (uint32_t i = 0; i < request->blk.pieces && done < VIRTIO_BLK_ID_BYTES; i++) {
		struct iovec *piece = &request->blk.data[i];
		size_t n = MIN(piece->iov_len, VIRTIO_BLK_ID_BYTES - done);

		memcpy(piece->iov_base, serial + done, n);
		done += n;
	}
	request_complete(request, VIRTIO_BLK_S_OK, done);
}

void request_serve(struct request *request)
{
	struct queue *queue = request->queue;

	request->state = REQUEST_ENGINE;
	request->file = NULL;
	/* The data of a write could be the zeroes of memory that was truncated: do not let it reach the disk. */
	if (queue->thread->faults != sigbus_faults())
		thread_check_faults(queue->thread);
	if (queue->dead) {
		request_complete(request, VIRTIO_BLK_S_IOERR, 0);
		return;
	}
	if (request->blk.status >= 0) {
		if (request->blk.status == VIRTIO_BLK_S_IOERR)
			report_failure(request, request->blk.incomplete ? -EFAULT : -EINVAL);
		request_complete(request, request->blk.status, 0);
		return;
	}
	switch (request->blk.op) {
	case VB_OP_READ:
	case VB_OP_WRITE:
		serve_transfer(request);
		break;
	case VB_OP_FLUSH:
		serve_flush(request);
		break;
	case VB_OP_GET_ID:
		serve_id(request);
		break;
	default:
		hand_to_control(request, 0);
	}
}
