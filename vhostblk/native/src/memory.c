/*
 * memory.c: guest memory snapshots and address translation.
 *
 * vhost-user, "Memory region description": a region says where a piece of guest physical memory is in the front-end
 * (uva) and, mapped by control, here (hva). Descriptors hold gpa, SET_VRING_ADDR holds uva.
 */
#include <errno.h>
#include <stdlib.h>
#include "memory.h"
#include "sigbus.h"

/* Of the smallest pages there are. */
#define PAGE 4096u

struct vb_memory {
	uint32_t refs;
	uint32_t count;
	uint32_t guarded; /* so many guards are valid */
	int *guards;
	const struct vb_region **by_hva; /* the same, ascending by hva */
	struct vb_region regions[];      /* ascending by gpa, disjoint */
};

static int compare_gpa(const void *a, const void *b)
{
	const struct vb_region *left = a, *right = b;

	return left->gpa < right->gpa ? -1 : left->gpa > right->gpa;
}

static int compare_hva(const void *a, const void *b)
{
	const struct vb_region *left = *(const struct vb_region *const *)a;
	const struct vb_region *right = *(const struct vb_region *const *)b;

	return left->hva < right->hva ? -1 : left->hva > right->hva;
}

static bool wraps(uint64_t start, uint64_t size)
{
	return start + size - 1 < start;
}

static bool regions_valid(const struct vb_region *regions, uint32_t count)
{
	for (uint32_t i = 0; i < count; i++) {
		const struct vb_region *r = &regions[i];

		if (!r->size || !r->hva || wraps(r->gpa, r->size) || wraps(r->uva, r->size) || wraps(r->hva, r->size))
			return false;
		if (i && r->gpa <= regions[i - 1].gpa + (regions[i - 1].size - 1))
			return false;
	}
	return true;
}

static int guard_regions(struct vb_memory *memory)
{
	for (; memory->guarded < memory->count; memory->guarded++) {
		const struct vb_region *r = &memory->regions[memory->guarded];
		int slot = sigbus_guard_add(r->hva, r->size);

		if (slot < 0)
			return slot;
		memory->guards[memory->guarded] = slot;
	}
	return 0;
}

static int allocate_tables(struct vb_memory *memory)
{
	uint32_t count = memory->count ? memory->count : 1;

	memory->guards = calloc(count, sizeof(*memory->guards));
	memory->by_hva = calloc(count, sizeof(*memory->by_hva));
	return memory->guards && memory->by_hva ? 0 : -ENOMEM;
}

static void sort_regions(struct vb_memory *memory)
{
	qsort(memory->regions, memory->count, sizeof(*memory->regions), compare_gpa);
	for (uint32_t i = 0; i < memory->count; i++)
		memory->by_hva[i] = &memory->regions[i];
	qsort(memory->by_hva, memory->count, sizeof(*memory->by_hva), compare_hva);
}

int vb_memory_create(const struct vb_region *regions, uint32_t count, struct vb_memory **ret)
{
	struct vb_memory *memory = calloc(1, sizeof(*memory) + count * sizeof(*regions));
	int error;

	if (!memory)
		return -ENOMEM;
	memory->refs = 1;
	memory->count = count;
	if (count)
		memcpy(memory->regions, regions, count * sizeof(*regions));
	error = allocate_tables(memory);
	if (!error) {
		sort_regions(memory);
		error = regions_valid(memory->regions, count) ? guard_regions(memory) : -EINVAL;
	}
	if (error) {
		vb_memory_unref(memory);
		return error;
	}
	*ret = memory;
	return 0;
}

struct vb_memory *memory_ref(struct vb_memory *memory)
{
	__atomic_fetch_add(&memory->refs, 1, __ATOMIC_RELAXED);
	return memory;
}

void vb_memory_unref(struct vb_memory *memory)
{
	/* Pair [M1]: what others did with the memory comes before the end of the one who frees it. */
	if (!memory || __atomic_sub_fetch(&memory->refs, 1, __ATOMIC_ACQ_REL))
		return;
	while (memory->guarded)
		sigbus_guard_remove(memory->guards[--memory->guarded]);
	free(memory->guards);
	free(memory->by_hva);
	free(memory);
}

uint32_t vb_memory_refs(const struct vb_memory *memory)
{
	return load_acquire(&memory->refs); /* [M1] */
}

int vb_memory_faulted(const struct vb_memory *memory)
{
	for (uint32_t i = 0; i < memory->guarded; i++)
		if (sigbus_guard_faulted(memory->guards[i]))
			return 1;
	return 0;
}

static void touch(uint64_t address, uint64_t length)
{
	uint64_t end = address + length;

	for (; address < end; address = (address | (PAGE - 1)) + 1)
		(void)*(const volatile uint8_t *)(uintptr_t)address;
}

bool memory_touch(uint64_t pointer, uint32_t count, uint64_t length)
{
	const struct vb_iov *pieces = (const struct vb_iov *)(uintptr_t)pointer;

	if (count == 1)
		touch(pointer, length);
	else
		for (uint32_t i = 0; i < count; i++)
			touch(pieces[i].address, pieces[i].length);
	return sigbus_faults();
}

void *memory_search(const struct vb_memory *memory, struct memory_window *window, uint64_t gpa, uint64_t *length)
{
	uint32_t low = 0, high = memory->count;

	while (low < high) {
		uint32_t middle = (low + high) / 2;
		const struct vb_region *r = &memory->regions[middle];

		if (gpa < r->gpa) {
			high = middle;
		} else if (gpa - r->gpa >= r->size) {
			low = middle + 1;
		} else {
			*window = (struct memory_window){r->gpa, r->size, r->hva};
			return memory_at(memory, window, gpa, length);
		}
	}
	return NULL;
}

static const struct vb_region *region_of_uva(const struct vb_memory *memory, uint64_t uva)
{
	for (uint32_t i = 0; i < memory->count; i++) {
		const struct vb_region *r = &memory->regions[i];

		if (uva >= r->uva && uva - r->uva < r->size)
			return r;
	}
	return NULL;
}

void *memory_ring(const struct vb_memory *memory, uint64_t uva, uint64_t length)
{
	const struct vb_region *r = region_of_uva(memory, uva);

	return r && length <= r->size - (uva - r->uva) ? (void *)(r->hva + (uva - r->uva)) : NULL;
}

uint64_t memory_ring_gpa(const struct vb_memory *memory, uint64_t uva)
{
	const struct vb_region *r = region_of_uva(memory, uva);

	return r->gpa + (uva - r->uva);
}

const struct vb_region *memory_region_at(const struct vb_memory *memory, uint64_t hva)
{
	uint32_t low = 0, high = memory->count;

	while (low < high) {
		uint32_t middle = (low + high) / 2;
		const struct vb_region *r = memory->by_hva[middle];

		if (hva < r->hva)
			high = middle;
		else if (hva - r->hva >= r->size)
			low = middle + 1;
		else
			return r;
	}
	return NULL;
}

uint32_t memory_count(const struct vb_memory *memory)
{
	return memory->count;
}

const struct vb_region *memory_region(const struct vb_memory *memory, uint32_t index)
{
	return &memory->regions[index];
}
