/*
 * disk.c: disks and their attachments to threads.
 *
 * Theory of operation of revocation: every I/O that the engine begins by itself gets a sequence number, and so does
 * every barrier (VB_REVOKE, VB_FLUSH_SET). A barrier waits for the I/O with smaller numbers that it matches: it counts
 * them when it comes, and each that ends counts one down. What begins later is not its business, because it has been
 * let in by an extent that was mapped after the revocation.
 */
#include <errno.h>
#include <stdlib.h>
#include "disk.h"
#include "thread.h"

int vb_disk_create(const struct vb_disk_config *config, struct vb_disk **ret)
{
	struct vb_disk *disk;

	if (config->capacity % 512)
		return -EINVAL;
	disk = aligned_alloc(64, sizeof(*disk));
	if (!disk)
		return -ENOMEM;
	*disk = (struct vb_disk){.refs = 1, .config = *config, .capacity = config->capacity};
	flush_line_init(&disk->line);
	*ret = disk;
	return 0;
}

struct vb_disk *disk_ref(struct vb_disk *disk)
{
	__atomic_fetch_add(&disk->refs, 1, __ATOMIC_RELAXED);
	return disk;
}

void vb_disk_unref(struct vb_disk *disk)
{
	if (!disk || __atomic_sub_fetch(&disk->refs, 1, __ATOMIC_ACQ_REL))
		return;
	flush_line_deinit(&disk->line);
	free(disk);
}

void vb_disk_set_capacity(struct vb_disk *disk, uint64_t capacity)
{
	store_relaxed(&disk->capacity, capacity);
}

void vb_disk_set_write_through(struct vb_disk *disk, int write_through)
{
	store_relaxed(&disk->write_through, (uint32_t) !!write_through);
}

uint64_t vb_disk_write_gen(const struct vb_disk *disk)
{
	return load_acquire(&disk->write_gen);
}

uint64_t vb_disk_take_highest_write(struct vb_disk *disk)
{
	return load_relaxed(&disk->highest_write) ? __atomic_exchange_n(&disk->highest_write, 0, __ATOMIC_ACQ_REL) : 0;
}

void disk_note_write(struct vb_disk *disk, uint64_t offset, uint64_t length)
{
	const struct vb_dirty_map *dirty = load_acquire(&disk->dirty);

	if (dirty)
		dirty_map_mark(dirty, offset, length);
	dirty_raise(&disk->highest_write, offset + length);
}

void vb_disk_set_dirty_map(struct vb_disk *disk, const struct vb_dirty_map *map)
{
	store_release(&disk->dirty, map);
}

int vb_disk_flush_failed(const struct vb_disk *disk)
{
	return (int)load_acquire(&disk->flush_failed);
}

struct attachment *attachment_create(struct vb_thread *thread, struct vb_disk *disk)
{
	struct attachment *a = calloc(1, sizeof(*a));

	if (!a)
		return NULL;
	a->thread = thread;
	a->disk = disk_ref(disk);
	a->flush_fd = VB_FLUSH_MISS;
	a->log_fd = -1;
	extent_map_init(&a->map, disk->config.max_extents);
	list_init(&a->in_flight);
	list_init(&a->barriers);
	list_init(&a->flushes);
	return a;
}

static void memory_use_destroy(struct attachment *a, struct memory_use *use)
{
	for (uint32_t i = 0; i < use->pieces; i++)
		if (use->fixed[i].number >= 0)
			aio_unregister_buffer(a->thread->aio, use->fixed[i].number);
	vb_memory_unref(use->memory);
	free(use->fixed);
	free(use);
}

void attachment_destroy(struct attachment *a)
{
	if (a->memory)
		memory_use_destroy(a, a->memory);
	if (a->flush_fd >= 0)
		flush_line_leave(&a->disk->line);
	extent_map_remove(&a->map, 0, UINT64_MAX);
	attachment_register_files(a);
	extent_map_deinit(&a->map);
	vb_disk_unref(a->disk);
	free(a);
}

static bool barrier_matches(const struct barrier *b, const struct io_track *track)
{
	if (track->sequence > b->sequence)
		return false;
	if (b->command.type == VB_FLUSH_SET)
		return track->is_flush;
	return ranges_overlap(b->command.offset, b->command.length, track->offset, track->length);
}

void attachment_io_begins(struct attachment *a, struct io_track *track)
{
	track->sequence = ++a->sequence;
	list_append(&a->in_flight, &track->link);
}

void attachment_io_ended(struct attachment *a, struct io_track *track)
{
	list_remove(&track->link);
	list_for_each (node, following, &a->barriers) {
		struct barrier *b = container_of(node, struct barrier, link);

		if (!barrier_matches(b, track) || --b->waiting)
			continue;
		list_remove(&b->link);
		if (b->leaves_line)
			flush_line_leave(&a->disk->line);
		thread_ack_owed(a->thread, &b->command, 0, 0);
		list_append(&a->thread->barriers.free, &b->link);
	}
}

int barriers_init(struct barriers *barriers, uint32_t max)
{
	list_init(&barriers->free);
	barriers->all = calloc(max, sizeof(*barriers->all));
	return barriers->all ? 0 : -ENOMEM;
}

void barriers_deinit(struct barriers *barriers)
{
	free(barriers->all);
}

static struct barrier *barrier_take(struct barriers *barriers)
{
	struct list *node = barriers->free.next;

	if (list_empty(&barriers->free))
		return &barriers->all[barriers->fresh++];
	list_remove(node);
	return container_of(node, struct barrier, link);
}

static void raise_barrier(struct attachment *a, const struct vb_message *command, bool leaves_line)
{
	struct barrier candidate = {.sequence = ++a->sequence, .leaves_line = leaves_line, .command = *command}, *b;

	if (candidate.command.length > UINT64_MAX - candidate.command.offset)
		candidate.command.length = UINT64_MAX - candidate.command.offset;
	list_for_each (node, following, &a->in_flight)
		candidate.waiting += barrier_matches(&candidate, container_of(node, struct io_track, link));
	if (!candidate.waiting) {
		if (leaves_line)
			flush_line_leave(&a->disk->line);
		thread_ack(a->thread, command, 0, 0);
		return;
	}
	b = barrier_take(&a->thread->barriers);
	*b = candidate;
	list_append(&a->barriers, &b->link);
	thread_owe_ack(a->thread);
}

/* Where I/O goes through io_uring, a registered file saves looking up the fd each time. Numbers are given out again, and
 * are looked up when the kernel takes the I/O, which may be later than we think: so none is taken back before that. */
void attachment_register_files(struct attachment *a)
{
	for (uint32_t i = 0; i < EXTENT_FILES; i++) {
		struct extent_file *file = &a->map.files[i];

		if (file->extents && file->direct && file->number < 0) {
			file->number = MAX(aio_register_file(a->thread->aio, file->fd), -1);
		} else if (!file->extents && !file->users && file->number >= 0) {
			aio_unregister_file(a->thread->aio, file->number);
			file->number = -1;
		}
	}
}

void attachment_revoke(struct attachment *a, const struct vb_message *command)
{
	extent_map_remove(&a->map, command->offset, command->length);
	attachment_register_files(a);
	raise_barrier(a, command, false);
}

int attachment_set_flush(struct attachment *a, const struct vb_message *command)
{
	bool held = a->flush_fd >= 0;

	if (command->result >= 0 && !flush_line_enter(&a->disk->line, command->result))
		return -EBUSY;
	a->flush_fd = command->result;
	raise_barrier(a, command, held);
	return 0;
}

static int compare_pieces(const void *a, const void *b)
{
	const struct fixed_piece *left = a, *right = b;

	return left->address < right->address ? -1 : left->address > right->address;
}

/* The piece that holds the address, or NULL. */
static struct fixed_piece *find_piece(const struct memory_use *use, uint64_t address)
{
	uint32_t low = 0, high = use->pieces;

	while (low < high) {
		uint32_t middle = (low + high) / 2;
		struct fixed_piece *piece = &use->fixed[middle];

		if (address < piece->address)
			high = middle;
		else if (address - piece->address >= piece->length)
			low = middle + 1;
		else
			return piece;
	}
	return NULL;
}

/* What shall be registered, ascending by address: io_uring takes at most 1 GiB at a time. */
static void plan_pieces(struct memory_use *use)
{
	uint64_t count = 0;

	for (uint32_t i = 0; i < memory_count(use->memory); i++)
		count += (memory_region(use->memory, i)->size + AIO_BUFFER_MAX - 1) / AIO_BUFFER_MAX;
	use->fixed = count > 4096 ? NULL : calloc(count, sizeof(*use->fixed));
	if (!use->fixed)
		return;
	for (uint32_t i = 0; i < memory_count(use->memory); i++) {
		const struct vb_region *r = memory_region(use->memory, i);

		for (uint64_t done = 0; done < r->size; done += AIO_BUFFER_MAX) {
			uint64_t length = MIN(r->size - done, AIO_BUFFER_MAX);

			use->fixed[use->pieces++] = (struct fixed_piece){r->hva + done, length, -1};
		}
	}
	qsort(use->fixed, use->pieces, sizeof(*use->fixed), compare_pieces);
}

/* Pieces that stay where they are stay registered: a second time they would count twice against the locked-memory limit.
 * Requests that began with the old map, and are in flight, go on using the buffer, which is the same; others of that map
 * do without. */
static void inherit_pieces(struct memory_use *use, struct memory_use *old)
{
	for (uint32_t i = 0; i < use->pieces; i++) {
		struct fixed_piece *piece = &use->fixed[i], *same = find_piece(old, piece->address);

		if (!same || same->address != piece->address || same->length != piece->length)
			continue;
		piece->number = same->number;
		same->number = -1;
	}
}

/* Not before the old map is gone, for the same reason. What the kernel refuses (the limit, a truncated file) stays as it
 * is: registration saves time, nothing else. */
static void register_pieces(struct attachment *a, struct memory_use *use)
{
	for (uint32_t i = 0; i < use->pieces; i++) {
		struct fixed_piece *piece = &use->fixed[i];

		if (piece->number < 0)
			piece->number = aio_register_buffer(a->thread->aio, piece->address, piece->length);
		if (piece->number < 0)
			return;
	}
}

static uint32_t registered_pieces(const struct memory_use *use)
{
	uint32_t count = 0;

	for (uint32_t i = 0; use && i < use->pieces; i++)
		count += use->fixed[i].number >= 0;
	return count;
}

static struct memory_use *memory_use_create(struct vb_memory *memory, bool fixed)
{
	struct memory_use *use = calloc(1, sizeof(*use));

	if (!use)
		return NULL;
	use->memory = memory_ref(memory);
	if (fixed)
		plan_pieces(use);
	return use;
}

/* The old map is out of use: the change is complete. */
static uint32_t finish_change(struct attachment *a, struct memory_use *old)
{
	if (old)
		memory_use_destroy(a, old);
	if (a->memory)
		register_pieces(a, a->memory);
	return registered_pieces(a->memory);
}

void memory_use_put(struct attachment *a, struct memory_use *use)
{
	struct vb_message command;

	if (--use->users || !use->retired)
		return;
	command = use->ack;
	a->retired--;
	thread_ack_owed(a->thread, &command, 0, finish_change(a, use));
}

int attachment_set_memory(struct attachment *a, const struct vb_message *command)
{
	struct memory_use *old = a->memory, *fresh = NULL;

	if (a->retired)
		return -EBUSY;
	if (command->pointer) {
		fresh = memory_use_create((struct vb_memory *)command->pointer, command->flags & 1);
		if (!fresh)
			return -ENOMEM;
	}
	if (fresh && old)
		inherit_pieces(fresh, old);
	a->memory = fresh;
	if (!old || !old->users) {
		thread_ack(a->thread, command, 0, finish_change(a, old));
		return 0;
	}
	old->retired = true;
	old->ack = *command;
	a->retired++;
	thread_owe_ack(a->thread);
	return 0;
}

int memory_use_buffer(const struct memory_use *use, const struct iovec *piece)
{
	uint64_t address = (uint64_t)piece->iov_base;
	const struct fixed_piece *fixed = find_piece(use, address);

	return fixed && piece->iov_len <= fixed->length - (address - fixed->address) ? fixed->number : -1;
}
