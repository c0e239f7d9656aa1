/* What blocks must contain, and who is at work on them. See load.h. */
#pragma once
#include "../src/common.h"
#include "load.h"

/* Reserve all blocks of a range, for a writer alone (exclusive), or with other readers. False: somebody is there. */
bool model_lock(struct vb_load_model *model, uint64_t offset, uint32_t length, bool exclusive);
void model_unlock(struct vb_load_model *model, uint64_t offset, uint32_t length, bool exclusive);

/* A number for one more write. */
uint32_t model_next_generation(struct vb_load_model *model);

/* These three hold the range exclusively. */
void model_written(struct vb_load_model *model, uint64_t offset, uint32_t length, uint32_t generation);
void model_zeroed(struct vb_load_model *model, uint64_t offset, uint32_t length);
void model_discarded(struct vb_load_model *model, uint64_t offset, uint32_t length);

bool model_knows(const struct vb_load_model *model, uint64_t offset);

/* Fill memory with what a write at this offset carries. */
void model_fill(const struct vb_load_model *model, uint64_t offset, uint32_t generation, void *to, uint32_t length);

/*
 * Compare what was read; the range is held. Bytes that were compared are added to *compared. False: *error says where
 * and what; its other fields are left alone.
 */
bool model_check(const struct vb_load_model *model, uint64_t offset, const void *from, uint32_t length, bool known_only,
	uint64_t *compared, struct vb_load_error *error);
