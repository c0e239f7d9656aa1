/*
 * The extent map: which range of a disk is which range of a file. One per engine thread and disk, used by that thread
 * alone. A cache: it may forget anything at any time, but never keeps what was removed.
 */
#pragma once
#include "../engine.h"
#include "common.h"

struct extent_entry {
	struct vb_extent extent;
	bool recent; /* looked up since the last eviction */
};

struct extent_map {
	struct extent_entry *entries; /* ascending by offset, disjoint */
	uint32_t count;
	uint32_t capacity; /* allocated */
	uint32_t limit;    /* never more than that */
	uint32_t last;     /* where the last lookup ended: the next one is often there too */
};

void extent_map_init(struct extent_map *map, uint32_t limit);
void extent_map_deinit(struct extent_map *map);

/* Whether an extent makes sense at all. */
bool extent_valid(const struct vb_extent *extent);

/* Replaces what overlaps. Does nothing when memory is short. */
void extent_map_insert(struct extent_map *map, const struct vb_extent *extent);
void extent_map_remove(struct extent_map *map, uint64_t offset, uint64_t length);

/* The extent that has all of the range and these flags, or NULL. */
const struct vb_extent *extent_map_find(struct extent_map *map, uint64_t offset, uint64_t length, uint32_t flags);
