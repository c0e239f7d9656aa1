/*
 * The extent map: which range of a disk is which range of a file. One per engine thread and disk, used by that thread
 * alone. A cache: it may forget anything at any time, but never keeps what was removed.
 */
#pragma once
#include "../engine.h"
#include "common.h"

struct extent_entry {
	struct vb_extent extent;
	bool recent;  /* looked up since the last eviction */
	uint8_t file; /* in map->files, or EXTENT_FILES: not among them */
};

/* The first files that a map has extents of are counted: what somebody knows about a file is worth something as long as
 * there are extents of it, and wrong as soon as its fd may have been closed. */
#define EXTENT_FILES 8

struct extent_file {
	int32_t fd;
	uint32_t extents; /* 0: the fd may be closed when its I/O has ended */
	bool direct;      /* there is, or was, one with VB_EXTENT_FIXED */
	int32_t number;   /* what the owner of the map knows it by, or -1 */
	uint32_t users;   /* I/O in flight that uses the number */
};

struct extent_map {
	struct extent_entry *entries; /* ascending by offset, disjoint */
	uint32_t count;
	uint32_t capacity; /* allocated */
	uint32_t limit;    /* never more than that */
	uint32_t last;     /* where the last lookup ended: the next one is often there too */
	struct extent_file files[EXTENT_FILES];
};

void extent_map_init(struct extent_map *map, uint32_t limit);
void extent_map_deinit(struct extent_map *map);

/* Whether an extent makes sense at all. */
bool extent_valid(const struct vb_extent *extent);

/* Replaces what overlaps. Does nothing when memory is short. */
void extent_map_insert(struct extent_map *map, const struct vb_extent *extent);
/* The same for many, later ones after earlier ones; quick if they are in ascending order, apart from each other. */
void extent_map_insert_all(struct extent_map *map, const struct vb_extent *extents, uint32_t count);
void extent_map_remove(struct extent_map *map, uint64_t offset, uint64_t length);

/* The file of an extent that extent_map_find has returned, or NULL: it is not among those that are counted. */
static inline struct extent_file *extent_file(struct extent_map *map, const struct vb_extent *extent)
{
	uint8_t file = container_of(extent, const struct extent_entry, extent)->file;

	return file < EXTENT_FILES ? &map->files[file] : NULL;
}

/* The extent that has all of the range and these flags, or NULL. */
const struct vb_extent *extent_map_find(struct extent_map *map, uint64_t offset, uint64_t length, uint32_t flags);
