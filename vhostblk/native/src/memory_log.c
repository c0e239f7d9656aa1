/*
 * memory_log.c: marks in the log of guest memory. vhost-user, "Migration".
 *
 * Theory of operation: the log is memory of the front-end's, a bit for each 4096 bytes of guest physical memory from
 * address 0 on. We set bits, the front-end takes them and then copies the pages, both at any time and by atomic
 * operations, so that no bit is lost. Pair [L1]: what was written is in memory before its bit is set, and the front-end
 * takes the bit before it reads the memory. So whoever takes a bit sees what was written, or the bit comes once more.
 * This needs a read-modify-write also where the bit is set already: a look at it could be done before what was written
 * is there for others.
 *
 * A page beyond the end of the log cannot be marked, and a log that was truncated keeps nothing (the SIGBUS guard puts
 * private pages there). Then the copy that the front-end makes is not what the guest has, and it does not know: so the
 * log is lost as a whole, and control ends the session.
 */
#include "memory_log.h"
#include <errno.h>
#include <stdlib.h>
#include "sigbus.h"

#define LOG_PAGE_BITS 12 /* VHOST_LOG_PAGE, whatever the size of pages is here */

struct vb_memory_log {
	uint8_t *bits;
	uint64_t pages;
	int guard;
	uint32_t lost;
};

int vb_memory_log_create(uint64_t address, uint64_t size, struct vb_memory_log **ret)
{
	struct vb_memory_log *log = calloc(1, sizeof(*log));

	if (!log)
		return -ENOMEM;
	log->bits = (uint8_t *)address;
	log->pages = size > UINT64_MAX / 8 ? UINT64_MAX : size * 8;
	log->guard = sigbus_guard_add(address, size);
	if (log->guard < 0) {
		int error = log->guard;

		free(log);
		return error;
	}
	*ret = log;
	return 0;
}

void vb_memory_log_destroy(struct vb_memory_log *log)
{
	if (!log)
		return;
	sigbus_guard_remove(log->guard);
	free(log);
}

int vb_memory_log_lost(const struct vb_memory_log *log)
{
	return load_relaxed(&log->lost) || sigbus_guard_faulted(log->guard);
}

void vb_memory_log_mark(struct vb_memory_log *log, uint64_t gpa, uint64_t length)
{
	uint64_t page = gpa >> LOG_PAGE_BITS, end;

	if (!length)
		return;
	end = gpa > UINT64_MAX - (length - 1) ? UINT64_MAX : ((gpa + (length - 1)) >> LOG_PAGE_BITS) + 1;
	if (end > log->pages) {
		store_relaxed(&log->lost, 1);
		end = log->pages;
	}
	while (page < end) {
		uint64_t next = MIN((page | 7) + 1, end);
		uint8_t mask = (uint8_t)((0xffu >> (8 - (next - page))) << (page & 7));

		__atomic_fetch_or(&log->bits[page >> 3], mask, __ATOMIC_ACQ_REL); /* [L1] */
		page = next;
	}
}

/* The region that an address in this process is in, or NULL. Most are where the last one was. */
static const struct vb_region *find_region(const struct vb_memory *memory, uint32_t *guess, uint64_t hva)
{
	const struct vb_region *r = *guess < memory_count(memory) ? memory_region(memory, *guess) : NULL;

	if (r && hva - r->hva < r->size)
		return r;
	r = memory_region_at(memory, hva);
	if (r)
		*guess = (uint32_t)(r - memory_region(memory, 0));
	return r;
}

static void mark_at(
	struct vb_memory_log *log, const struct vb_memory *memory, uint32_t *guess, uint64_t hva, uint64_t length)
{
	/* Two regions may be neighbours here and not in the guest. */
	while (length) {
		const struct vb_region *r = find_region(memory, guess, hva);
		uint64_t piece;

		if (!r) {
			store_relaxed(&log->lost, 1);
			return;
		}
		piece = MIN(length, r->size - (hva - r->hva));
		vb_memory_log_mark(log, r->gpa + (hva - r->hva), piece);
		hva += piece;
		length -= piece;
	}
}

void vb_memory_log_mark_at(struct vb_memory_log *log, const struct vb_memory *memory, uint64_t hva, uint64_t length)
{
	uint32_t guess = 0;

	mark_at(log, memory, &guess, hva, length);
}

void memory_log_mark_pieces(struct vb_memory_log *log, const struct vb_memory *memory, uint32_t *region,
	const struct iovec *pieces, uint32_t count)
{
	for (uint32_t i = 0; i < count; i++)
		mark_at(log, memory, region, (uint64_t)pieces[i].iov_base, pieces[i].iov_len);
}
