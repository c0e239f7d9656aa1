/* A guest's thread: random reads and writes on a queue, each verified. */
#pragma once
#include <pthread.h>
#include "harness.h"

#define RANGE (64u << 10) /* of the disk, per token: nobody else writes there */
#define SECTORS (RANGE / 512)

struct worker {
	pthread_t pthread;
	struct driver *driver;
	uint64_t first_sector;
	uint32_t requests;
	uint32_t alignment; /* of requests, in sectors */
	uint32_t done;      /* atomic */
	uint8_t (*shadow)[SECTORS];
	struct {
		uint32_t sector, sectors;
		bool write;
	} * request;
};

/* Prepare it; `worker_go` begins. */
void worker_start(struct worker *w, struct driver *driver, uint64_t first_sector, uint32_t requests);
void worker_go(struct worker *w);
bool worker_finished(struct worker *w);
void worker_join(struct worker *w);
