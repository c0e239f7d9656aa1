/*
 * commands.c: what control asks of an engine thread. Each command is answered by one VB_ACK, at once or when what it
 * asks for has come true; completions and retries of requests are not answered.
 */
#include <errno.h>
#include "queue.h"
#include "thread.h"

/* Commands between two looks at the queues. */
#define COMMAND_BATCH 256

static struct attachment *find_attachment(struct vb_thread *thread, uint64_t disk)
{
	list_for_each (node, following, &thread->attachments) {
		struct attachment *a = container_of(node, struct attachment, link);

		if ((uint64_t)a->disk == disk)
			return a;
	}
	return NULL;
}

static struct queue *find_queue(struct vb_thread *thread, uint32_t key)
{
	for (uint32_t i = 0; i < thread->slots; i++)
		if (thread->queues[i] && thread->queues[i]->key == key)
			return thread->queues[i];
	return NULL;
}

static int attach(struct vb_thread *thread, const struct vb_message *command)
{
	struct attachment *a;

	if (find_attachment(thread, command->disk))
		return -EEXIST;
	a = attachment_create(thread, (struct vb_disk *)command->disk);
	if (!a)
		return -ENOMEM;
	list_append(&thread->attachments, &a->link);
	store_release(&thread->attached, thread->attached + 1);
	return 0;
}

static int detach(struct vb_thread *thread, struct attachment *a)
{
	if (a->queues || a->retired || !list_empty(&a->in_flight) || !list_empty(&a->barriers))
		return -EBUSY;
	list_remove(&a->link);
	attachment_destroy(a);
	store_release(&thread->attached, thread->attached - 1);
	return 0;
}

static int map(struct attachment *a, const struct vb_message *command)
{
	const struct vb_extent *extents = (const struct vb_extent *)command->pointer;

	for (uint32_t i = 0; i < command->count; i++)
		if (!extent_valid(&extents[i]))
			return -EINVAL;
	extent_map_insert_all(&a->map, extents, command->count);
	attachment_register_files(a);
	return 0;
}

static void set_memory(struct vb_thread *thread, struct attachment *a, const struct vb_message *command)
{
	int error = attachment_set_memory(a, command);

	if (error) {
		thread_ack(thread, command, error, 0);
		return;
	}
	for (uint32_t i = 0; i < thread->slots; i++)
		if (thread->queues[i] && thread->queues[i]->attachment == a)
			queue_move(thread->queues[i]);
}

static void set_log(struct vb_thread *thread, struct attachment *a, const struct vb_message *command)
{
	a->log = (struct vb_memory_log *)command->pointer;
	a->data_log = command->flags & 1 ? a->log : NULL;
	a->log_fd = command->result;
	for (uint32_t i = 0; i < thread->slots; i++)
		if (thread->queues[i] && thread->queues[i]->attachment == a)
			queue_set_log(thread->queues[i]);
}

static void run_disk_command(struct vb_thread *thread, struct attachment *a, const struct vb_message *command)
{
	const struct vb_queue_config *config = (const struct vb_queue_config *)command->pointer;
	uint64_t aux = 0;
	int result = 0;

	switch (command->type) {
	case VB_DISK_DETACH:
		result = detach(thread, a);
		break;
	case VB_MEMORY_SET:
		set_memory(thread, a, command);
		return;
	case VB_FLUSH_SET:
		result = attachment_set_flush(a, command);
		if (!result)
			return;
		break;
	case VB_MAP:
		result = map(a, command);
		break;
	case VB_REVOKE:
		attachment_revoke(a, command);
		return;
	case VB_LOG_SET:
		set_log(thread, a, command);
		break;
	case VB_QUEUE_START:
		result = find_queue(thread, command->queue) ? -EEXIST : queue_start(a, command->queue, config);
		if (!result)
			aux = virtqueue_replays(&find_queue(thread, command->queue)->vq);
		break;
	}
	thread_ack(thread, command, result, aux);
}

static void run_queue_command(struct vb_thread *thread, struct queue *queue, const struct vb_message *command)
{
	int result = 0;

	switch (command->type) {
	case VB_QUEUE_STOP:
		if (!queue->stopping) {
			queue_stop(queue, command);
			return;
		}
		result = -EALREADY;
		break;
	case VB_QUEUE_ENABLE:
		queue->enabled = command->flags & 1;
		queue_wake(queue);
		break;
	case VB_QUEUE_LOG:
		queue->logged = command->flags & 1;
		queue->config.log_gpa = command->offset;
		queue_set_log(queue);
		break;
	case VB_QUEUE_FD:
		result = queue_set_fd(queue, (enum vb_queue_fd)command->aux, command->result);
		queue_wake(queue);
		break;
	}
	thread_ack(thread, command, result, 0);
}

static void run_request_command(struct vb_thread *thread, const struct vb_message *command)
{
	struct request *request = request_find(thread, command->cookie);

	if (!request)
		return; /* control's mistake: there is nobody to tell */
	if (request->queue->suspending && (command->type == VB_RETRY || command->result == VB_SUSPENDED))
		request_suspend(request);
	else if (command->type == VB_RETRY)
		request_serve(request);
	else
		request_complete(request, command->result, command->length);
}

static void run_command(struct vb_thread *thread, const struct vb_message *command)
{
	struct attachment *attachment;
	struct queue *queue;

	switch (command->type) {
	case VB_DISK_ATTACH:
		thread_ack(thread, command, attach(thread, command), 0);
		break;
	case VB_DISK_DETACH:
	case VB_MEMORY_SET:
	case VB_FLUSH_SET:
	case VB_MAP:
	case VB_REVOKE:
	case VB_LOG_SET:
	case VB_QUEUE_START:
		attachment = find_attachment(thread, command->disk);
		if (attachment)
			run_disk_command(thread, attachment, command);
		else
			thread_ack(thread, command, -ENOENT, 0);
		break;
	case VB_QUEUE_STOP:
	case VB_QUEUE_ENABLE:
	case VB_QUEUE_FD:
	case VB_QUEUE_LOG:
		queue = find_queue(thread, command->queue);
		if (queue)
			run_queue_command(thread, queue, command);
		else
			thread_ack(thread, command, -ENOENT, 0);
		break;
	case VB_COMPLETE:
	case VB_RETRY:
		run_request_command(thread, command);
		break;
	default:
		thread_ack(thread, command, -EINVAL, 0);
	}
}

bool thread_run_commands(struct vb_thread *thread)
{
	struct vb_message command;
	int done = 0;

	while (done < COMMAND_BATCH && thread_room(thread) >= ROOM_PER_COMMAND &&
		message_ring_take(&thread->down, &command, 1)) {
		run_command(thread, &command);
		done++;
	}
	return done;
}
