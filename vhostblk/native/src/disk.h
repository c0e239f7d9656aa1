/*
 * Disks: what all threads share of one (struct vb_disk), and what one thread has of it (struct attachment): extent map,
 * memory map, I/O in flight, and acknowledgements that wait for it.
 */
#pragma once
#include "../engine.h"
#include "aio.h"
#include "common.h"
#include "dirty.h"
#include "extent_map.h"
#include "flush.h"
#include "memory.h"
#include "memory_log.h"

struct vb_disk {
	uint32_t refs;
	struct vb_disk_config config; /* all but capacity never change */
	uint64_t capacity;
	uint32_t write_through;
	uint32_t flush_failed; /* the errno of an fdatasync: from then on control answers flushes */
	struct flush_line line;
	_Alignas(64) uint64_t write_gen; /* written by several threads, as is ... */
	uint64_t highest_write;          /* ... this */
	const struct vb_dirty_map *dirty;
};

struct vb_disk *disk_ref(struct vb_disk *disk);

/* What is not noted for every write: where it was, if there is a map, and how far it has reached. */
void disk_note_write(struct vb_disk *disk, uint64_t offset, uint64_t length) __attribute__((cold));

/* A write of the engine's has ended; part of it may be in the file even if it has failed. Before the driver can know: a
 * flush that it sends afterwards must see this write. Pair [W1], vb_disk_write_gen. */
static inline void disk_wrote(struct vb_disk *disk, uint64_t offset, uint64_t length)
{
	if (load_relaxed(&disk->dirty) || offset + length > load_relaxed(&disk->highest_write))
		disk_note_write(disk, offset, length);
	__atomic_fetch_add(&disk->write_gen, 1, __ATOMIC_RELEASE);
}

struct vb_thread;

/* A piece of guest memory that is registered with io_uring. */
struct fixed_piece {
	uint64_t address;
	uint64_t length;
	int number; /* -1 or another negative one: not registered */
};

/* A memory snapshot in use by one attachment. Requests hold it by `users`; after it was replaced it lives until the
 * last of them is gone, and then the MEMORY_SET that replaced it is acknowledged. */
struct memory_use {
	struct vb_memory *memory;
	uint32_t users;
	bool retired;
	struct vb_message ack;
	uint32_t pieces;
	struct fixed_piece *fixed;
};

/* An I/O of the engine's, in flight. */
struct io_track {
	struct list link;
	uint64_t sequence;
	uint64_t offset;
	uint64_t length;
	bool is_flush; /* an fdatasync, or a write that ends with one */
};

/* A VB_REVOKE or VB_FLUSH_SET that waits for I/O. */
struct barrier {
	struct list link; /* of an attachment, or free */
	uint64_t sequence;
	uint32_t waiting; /* I/O in flight that it waits for */
	bool leaves_line; /* then nobody here flushes the file any more */
	struct vb_message command;
};

/* All that a thread can need: one for each acknowledgement that it can owe. So there is always one, and no revocation
 * fails when it is too late to undo it. Address space only, until it is used. */
struct barriers {
	struct barrier *all;
	uint32_t fresh; /* those beyond were never used */
	struct list free;
};

int barriers_init(struct barriers *barriers, uint32_t max);
void barriers_deinit(struct barriers *barriers);

struct attachment {
	struct list link; /* of the thread's list */
	struct vb_thread *thread;
	struct vb_disk *disk;
	struct extent_map map;
	struct memory_use *memory;      /* NULL: none was set */
	uint32_t retired;               /* memory uses that still have users */
	struct vb_memory_log *log;      /* for rings, or NULL */
	struct vb_memory_log *data_log; /* the same for buffers */
	int32_t log_fd;                 /* signalled when something was marked; -1: none */
	uint32_t log_region;            /* where the last mark was: most are there */
	bool marked;                    /* since log_fd was last signalled */
	uint8_t cold;                   /* so many reads are not looked for in the page cache */
	uint8_t cold_next;              /* that, when the next one is not found there */
	int32_t flush_fd;               /* or VB_FLUSH_MISS, VB_FLUSH_NOTHING */
	uint32_t queues;
	uint64_t sequence;         /* grows with each I/O that begins and each barrier */
	struct list in_flight;     /* of struct io_track */
	struct list barriers;      /* of struct barrier */
	struct list flushes;       /* requests in the disk's line, by their tickets */
	struct list flush_watcher; /* in disk->line.watchers, while ... */
	bool watches_flushes;      /* ... this is so; both are guarded by the line's lock */
};

struct attachment *attachment_create(struct vb_thread *thread, struct vb_disk *disk);
/* Nothing of it may be in use. */
void attachment_destroy(struct attachment *attachment);

/* An I/O begins, or has ended: then barriers that waited for it are acknowledged. */
void attachment_io_begins(struct attachment *attachment, struct io_track *track);
void attachment_io_ended(struct attachment *attachment, struct io_track *track);

/* The map has other extents: register files that have come, forget those that are gone and not in use. */
void attachment_register_files(struct attachment *attachment);

/* Acknowledge `command` when no I/O that has begun before touches the range, or, for flushes, none is in flight. */
void attachment_revoke(struct attachment *attachment, const struct vb_message *command);
/* 0, or -EBUSY: it was not done and has to be answered. */
int attachment_set_flush(struct attachment *attachment, const struct vb_message *command);

/* Use another memory map from now on; acknowledges the command when nothing uses the old one. */
int attachment_set_memory(struct attachment *attachment, const struct vb_message *command);

static inline void memory_use_get(struct memory_use *use)
{
	use->users++;
}

void memory_use_put(struct attachment *attachment, struct memory_use *use);

/* Number of the registered buffer that holds all of the piece, or -1. */
int memory_use_buffer(const struct memory_use *use, const struct iovec *piece);
