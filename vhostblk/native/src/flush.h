/* The line of flushes before a disk: one fdatasync at a time, shared by all who waited for it. */
#pragma once
#include <pthread.h>
#include "common.h"

struct flush_line {
	pthread_mutex_t lock;
	int32_t fd;           /* what all threads flush, while ... */
	uint32_t holders;     /* ... there are some that may, or still do */
	uint64_t begun;       /* fdatasyncs, ever */
	uint64_t ended;       /* of them; at most one less */
	struct list watchers; /* attachments with requests in the line, to be woken when one ends */
};

void flush_line_init(struct flush_line *line);
void flush_line_deinit(struct flush_line *line);

/* One more may flush this file until it leaves. False: somebody may flush another one, and whoever shares an fdatasync
 * would be told of the wrong file. */
bool flush_line_enter(struct flush_line *line, int fd);
void flush_line_leave(struct flush_line *line);

struct request;
struct vb_thread;

/* Have request_flushed called when an fdatasync of the file that begins after this call has ended. The request's I/O has
 * been announced (attachment_io_begins). */
void flush_join(struct request *request, int fd);
/* It is not the one that does the fdatasync, and does not wait for it any more. */
void flush_leave(struct request *request);
/* The fdatasync that was begun for this request has ended. */
void flush_ended(struct request *leader);
/* One that requests of this thread may have waited for has ended on another. */
void flush_look(struct vb_thread *thread);
