/* Guest memory: an immutable, counted snapshot of one front-end's memory map. */
#pragma once
#include "../engine.h"
#include "common.h"

struct vb_memory *memory_ref(struct vb_memory *memory);

/* Remembers one region, so that most translations need no search. All zero: none. Valid for one snapshot only. */
struct memory_window {
	uint64_t gpa;
	uint64_t size;
	uint64_t hva;
};

/* memory_at outside of the window, which is moved to what it finds. */
void *memory_search(const struct vb_memory *memory, struct memory_window *window, uint64_t gpa, uint64_t *length);

/* Where the bytes at guest physical address `gpa` are in this process, or NULL. Cuts *length down to what lies in one
 * piece behind it. */
static inline void *memory_at(
	const struct vb_memory *memory, struct memory_window *window, uint64_t gpa, uint64_t *length)
{
	uint64_t offset = gpa - window->gpa;

	if (offset >= window->size)
		return memory_search(memory, window, gpa, length);
	*length = MIN(*length, window->size - offset);
	return (void *)(window->hva + offset);
}

/* A ring area, by its address in the front-end, or NULL unless all of it lies in one region. */
void *memory_ring(const struct vb_memory *memory, uint64_t uva, uint64_t length);

/* The guest physical address of what memory_ring has found. */
uint64_t memory_ring_gpa(const struct vb_memory *memory, uint64_t uva);

/* Read a byte of every page of a VB_REQUEST's data; then, whether anybody's memory has ever been truncated.
 * Context: any thread. */
bool memory_touch(uint64_t pointer, uint32_t count, uint64_t length);

/* The region that an address in this process is in, or NULL. */
const struct vb_region *memory_region_at(const struct vb_memory *memory, uint64_t hva);

/* The regions, ascending by gpa. */
uint32_t memory_count(const struct vb_memory *memory);
const struct vb_region *memory_region(const struct vb_memory *memory, uint32_t index);
