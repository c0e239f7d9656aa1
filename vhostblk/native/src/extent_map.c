/*
 * extent_map.c: a sorted array of disjoint extents.
 *
 * Neighbours that continue each other in the same file become one, so a request never has to be put together from
 * several. When the map is full, a pass over it drops what nobody has looked up since the last pass (second chance).
 */
#include <stdlib.h>
#include "extent_map.h"

#define FILELESS (VB_EXTENT_ZERO | VB_EXTENT_NULL)

void extent_map_init(struct extent_map *map, uint32_t limit)
{
	*map = (struct extent_map){.limit = MAX(limit, 1u)};
	for (uint32_t i = 0; i < EXTENT_FILES; i++)
		map->files[i].number = -1;
}

void extent_map_deinit(struct extent_map *map)
{
	free(map->entries);
	*map = (struct extent_map){0};
}

static bool is_alignment(uint32_t n)
{
	return n && !(n & (n - 1));
}

static bool range_wraps(uint64_t start, uint64_t length)
{
	return start + length < start;
}

bool extent_valid(const struct vb_extent *e)
{
	return e->length && !range_wraps(e->offset, e->length) && !range_wraps(e->host_offset, e->length) &&
	       is_alignment(e->request_alignment) && is_alignment(e->memory_alignment) &&
	       (e->fd >= 0 || e->flags & FILELESS);
}

static uint64_t extent_end(const struct vb_extent *e)
{
	return e->offset + e->length;
}

/* Index of the first of `high` extents that ends behind `offset`: the one that holds it, or the next. */
static uint32_t first_of_behind(const struct extent_map *map, uint32_t high, uint64_t offset)
{
	uint32_t low = 0;

	while (low < high) {
		uint32_t middle = (low + high) / 2;

		if (extent_end(&map->entries[middle].extent) <= offset)
			low = middle + 1;
		else
			high = middle;
	}
	return low;
}

static uint32_t first_behind(const struct extent_map *map, uint64_t offset)
{
	return first_of_behind(map, map->count, offset);
}

static bool make_room(struct extent_map *map, uint32_t more)
{
	uint32_t capacity = MIN(MAX(map->capacity ? map->capacity * 2 : 16, map->count + more), map->limit);
	struct extent_entry *entries;

	if (more <= map->capacity - map->count)
		return true;
	if (more > map->limit - map->count)
		return false;
	entries = realloc(map->entries, capacity * sizeof(*entries));
	if (!entries)
		return false;
	map->entries = entries;
	map->capacity = capacity;
	return true;
}

/* Count one more extent of a file. A place that somebody still has a number for is not free. */
static uint8_t enter_file(struct extent_map *map, const struct vb_extent *extent)
{
	uint8_t free = EXTENT_FILES;

	if (extent->flags & FILELESS)
		return EXTENT_FILES;
	for (uint8_t i = 0; i < EXTENT_FILES; i++) {
		struct extent_file *file = &map->files[i];

		if (file->extents && file->fd == extent->fd) {
			file->extents++;
			file->direct |= !!(extent->flags & VB_EXTENT_FIXED);
			return i;
		}
		if (!file->extents && file->number < 0)
			free = i;
	}
	if (free < EXTENT_FILES)
		map->files[free] = (struct extent_file){
			.fd = extent->fd, .extents = 1, .direct = extent->flags & VB_EXTENT_FIXED, .number = -1};
	return free;
}

static void leave_file(struct extent_map *map, const struct extent_entry *entry)
{
	if (entry->file < EXTENT_FILES)
		map->files[entry->file].extents--;
}

static void insert_at(struct extent_map *map, uint32_t index, const struct vb_extent *extent)
{
	struct extent_entry *entry = &map->entries[index];

	memmove(entry + 1, entry, (map->count - index) * sizeof(*entry));
	*entry = (struct extent_entry){.extent = *extent, .recent = true, .file = enter_file(map, extent)};
	map->count++;
}

static void delete_at(struct extent_map *map, uint32_t index, uint32_t count)
{
	struct extent_entry *entry = &map->entries[index];

	for (uint32_t i = 0; i < count; i++)
		leave_file(map, &entry[i]);
	memmove(entry, entry + count, (map->count - index - count) * sizeof(*entry));
	map->count -= count;
}

static void cut_front(struct vb_extent *e, uint64_t offset)
{
	e->host_offset += offset - e->offset;
	e->length -= offset - e->offset;
	e->offset = offset;
}

void extent_map_remove(struct extent_map *map, uint64_t offset, uint64_t length)
{
	uint64_t end = range_wraps(offset, length) ? UINT64_MAX : offset + length;
	uint32_t first = first_behind(map, offset), last;

	if (first < map->count && map->entries[first].extent.offset < offset) {
		struct vb_extent tail = map->entries[first].extent;

		map->entries[first].extent.length = offset - tail.offset;
		first++;
		if (extent_end(&tail) > end) {
			/* A hole in the middle. Without room for the part behind it, that part is forgotten. */
			cut_front(&tail, end);
			if (make_room(map, 1))
				insert_at(map, first, &tail);
			return;
		}
	}
	for (last = first; last < map->count && extent_end(&map->entries[last].extent) <= end;)
		last++;
	if (last < map->count && map->entries[last].extent.offset < end)
		cut_front(&map->entries[last].extent, end);
	if (last > first)
		delete_at(map, first, last - first);
}

/* Drop what was not looked up since the last pass, but at least a sixteenth of all, so that passes are rare. */
static void evict(struct extent_map *map)
{
	uint32_t goal = map->limit / 16 + 1, kept = 0, dropped = 0;

	for (uint32_t i = 0; i < map->count; i++) {
		struct extent_entry *entry = &map->entries[i];
		uint32_t left = map->count - i;
		bool must_drop = dropped + left <= goal;

		if (!entry->recent || must_drop) {
			leave_file(map, entry);
			dropped++;
			continue;
		}
		entry->recent = false;
		map->entries[kept++] = *entry;
	}
	map->count = kept;
}

static bool continues(const struct vb_extent *a, const struct vb_extent *b)
{
	return extent_end(a) == b->offset && a->flags == b->flags && a->fd == b->fd &&
	       a->request_alignment == b->request_alignment && a->memory_alignment == b->memory_alignment &&
	       (a->flags & FILELESS || a->host_offset + a->length == b->host_offset);
}

/* An extent that continues its neighbours, or is continued by them, becomes one with them. */
static void join(struct extent_map *map, uint32_t index)
{
	struct extent_entry *entries = map->entries;

	if (index + 1 < map->count && continues(&entries[index].extent, &entries[index + 1].extent)) {
		entries[index].extent.length += entries[index + 1].extent.length;
		delete_at(map, index + 1, 1);
	}
	if (index && continues(&entries[index - 1].extent, &entries[index].extent)) {
		entries[index - 1].extent.length += entries[index].extent.length;
		delete_at(map, index, 1);
	}
}

void extent_map_insert(struct extent_map *map, const struct vb_extent *extent)
{
	uint32_t index;

	extent_map_remove(map, extent->offset, extent->length);
	if (map->count >= map->limit)
		evict(map);
	if (!make_room(map, 1))
		return;
	index = first_behind(map, extent->offset);
	insert_at(map, index, extent);
	join(map, index);
}

static bool is_ascending(const struct vb_extent *extents, uint32_t count)
{
	for (uint32_t i = 0; i + 1 < count; i++)
		if (extent_end(&extents[i]) > extents[i + 1].offset)
			return false;
	return true;
}

/* Where many are to be inserted, what is behind them moves once, not once for each. */
static bool insert_ascending(struct extent_map *map, const struct vb_extent *extents, uint32_t count)
{
	uint32_t end;

	for (uint32_t i = 0; i < count; i++)
		extent_map_remove(map, extents[i].offset, extents[i].length);
	if (!make_room(map, count))
		return false;
	end = map->count;
	for (uint32_t i = count; i-- > 0;) {
		uint32_t index = first_of_behind(map, end, extents[i].offset);
		struct extent_entry *entry = &map->entries[index];

		memmove(entry + i + 1, entry, (end - index) * sizeof(*entry));
		entry[i] = (struct extent_entry){
			.extent = extents[i], .recent = true, .file = enter_file(map, &extents[i])};
		end = index;
	}
	map->count += count;
	for (uint32_t i = 0; i < count; i++)
		join(map, first_behind(map, extents[i].offset));
	return true;
}

void extent_map_insert_all(struct extent_map *map, const struct vb_extent *extents, uint32_t count)
{
	if (count > 1 && is_ascending(extents, count) && insert_ascending(map, extents, count))
		return;
	for (uint32_t i = 0; i < count; i++)
		extent_map_insert(map, &extents[i]);
}

const struct vb_extent *extent_map_find(struct extent_map *map, uint64_t offset, uint64_t length, uint32_t flags)
{
	uint32_t index = map->last;
	struct extent_entry *entry;

	if (index >= map->count || map->entries[index].extent.offset > offset ||
		extent_end(&map->entries[index].extent) <= offset)
		index = first_behind(map, offset);
	if (index >= map->count)
		return NULL;
	map->last = index;
	entry = &map->entries[index];
	if (entry->extent.offset > offset || length > extent_end(&entry->extent) - offset ||
		(entry->extent.flags & flags) != flags)
		return NULL;
	entry->recent = true;
	return &entry->extent;
}
