/* Where the engine has written: for dirty bitmaps and the highest offset, of which control knows more. */
#pragma once
#include "../engine.h"
#include "common.h"

/* Bits of the range are set; what is beyond the map is left out. Context: any thread. */
void dirty_map_mark(const struct vb_dirty_map *map, uint64_t offset, uint64_t length);
/* `*highest` is at least `end`. Context: any thread. */
void dirty_raise(uint64_t *highest, uint64_t end);
