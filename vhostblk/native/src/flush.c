/*
 * flush.c: one fdatasync of a disk at a time.
 *
 * Why: the kernel tells of writes that it lost to one fdatasync of an open file, once. Of two that overlap one may fail
 * and the other succeed, though both would have to make the lost write durable. So each disk has a line, shared by its
 * threads: a flush that comes while an fdatasync is in flight waits, and everybody who waits shares the next one.
 *
 * Theory of operation: fdatasyncs are numbered as they begin. Who joins the line takes a ticket, the number of the next
 * one to begin, and is served when that one has ended. Each fdatasync is done by the thread of one of those who wait
 * for it; when it ends, the threads that have others in the line are woken: those look whether their tickets have come
 * up, and if somebody still waits the first thread to take the lock begins the next one.
 *
 * After a failure nobody can say what was lost, so all who are in the line fail, and nobody joins it any more: control
 * answers flushes. It excludes itself from the line by taking back the right to flush, see VB_FLUSH_SET.
 *
 * The lock is held for a few instructions, by flushes only.
 */
#include "flush.h"
#include <sys/eventfd.h>
#include "queue.h"

void flush_line_init(struct flush_line *line)
{
	*line = (struct flush_line){0};
	pthread_mutex_init(&line->lock, NULL);
	list_init(&line->watchers);
}

void flush_line_deinit(struct flush_line *line)
{
	pthread_mutex_destroy(&line->lock);
}

bool flush_line_enter(struct flush_line *line, int fd)
{
	bool enters;

	pthread_mutex_lock(&line->lock);
	enters = !line->holders || line->fd == fd;
	if (enters) {
		line->fd = fd;
		line->holders++;
	}
	pthread_mutex_unlock(&line->lock);
	return enters;
}

void flush_line_leave(struct flush_line *line)
{
	pthread_mutex_lock(&line->lock);
	line->holders--;
	pthread_mutex_unlock(&line->lock);
}

/* Under the lock. */
static void watch(struct attachment *a)
{
	if (!a->watches_flushes)
		list_append(&a->disk->line.watchers, &a->flush_watcher);
	a->watches_flushes = true;
}

/* Under the lock. */
static void unwatch(struct attachment *a)
{
	if (a->watches_flushes)
		list_remove(&a->flush_watcher);
	a->watches_flushes = false;
}

/* Under the lock: begin the next fdatasync if none is in flight, otherwise be told when it has ended. */
static bool lead_or_watch(struct attachment *a)
{
	struct flush_line *line = &a->disk->line;
	bool leads = line->begun == line->ended;

	line->begun += leads;
	if (!leads)
		watch(a);
	return leads;
}

static void lead(struct request *request)
{
	request->state = REQUEST_ENGINE;
	request->op = (struct aio_op){.kind = VB_IO_FDATASYNC, .buffer = -1, .file = -1, .fd = request->op.fd};
	aio_start(request->queue->thread->aio, &request->op);
}

void flush_join(struct request *request, int fd)
{
	struct attachment *a = request->queue->attachment;
	struct flush_line *line = &a->disk->line;
	bool leads = false;
	int error;

	request->op.fd = fd;
	pthread_mutex_lock(&line->lock);
	error = (int)a->disk->flush_failed;
	request->ticket = line->begun + 1;
	if (!error)
		leads = lead_or_watch(a);
	pthread_mutex_unlock(&line->lock);
	if (error) {
		request_flushed(request, -error);
		return;
	}
	request->state = REQUEST_LINE;
	list_append(&a->flushes, &request->in_line);
	if (leads)
		lead(request);
}

void flush_leave(struct request *request)
{
	struct attachment *a = request->queue->attachment;

	list_remove(&request->in_line);
	if (!list_empty(&a->flushes))
		return;
	pthread_mutex_lock(&a->disk->line.lock);
	unwatch(a);
	pthread_mutex_unlock(&a->disk->line.lock);
}

/* Serve those whose tickets have come up. */
static void settle(struct attachment *a)
{
	struct flush_line *line = &a->disk->line;
	bool leads = false;
	uint64_t ended;
	int error;

	if (list_empty(&a->flushes))
		return;
	pthread_mutex_lock(&line->lock);
	error = (int)a->disk->flush_failed;
	ended = line->ended;
	unwatch(a);
	if (!error && container_of(a->flushes.prev, struct request, in_line)->ticket > ended)
		leads = lead_or_watch(a);
	pthread_mutex_unlock(&line->lock);
	list_for_each (node, following, &a->flushes) {
		struct request *request = container_of(node, struct request, in_line);

		if (!error && request->ticket > ended)
			break;
		list_remove(&request->in_line);
		request_flushed(request, -error);
	}
	if (leads)
		lead(container_of(a->flushes.next, struct request, in_line));
}

void flush_ended(struct request *leader)
{
	struct attachment *a = leader->queue->attachment;
	struct flush_line *line = &a->disk->line;
	int64_t result = leader->op.result;

	pthread_mutex_lock(&line->lock);
	if (result < 0)
		store_release(&a->disk->flush_failed, (uint32_t)-result);
	line->ended++;
	/* Under the lock: none of them can leave its thread, nor can the thread end, before it has had the lock, too. */
	list_for_each (node, following, &line->watchers) {
		struct attachment *other = container_of(node, struct attachment, flush_watcher);

		unwatch(other);
		if (other != a) {
			store_release(&other->thread->flush_ended, 1);
			eventfd_write(other->thread->down_fd, 1);
		}
	}
	pthread_mutex_unlock(&line->lock);
	settle(a);
}

void flush_look(struct vb_thread *thread)
{
	/* Before the look, so that what ends during it is looked at again. */
	store_relaxed(&thread->flush_ended, 0);
	list_for_each (node, following, &thread->attachments)
		settle(container_of(node, struct attachment, link));
}
