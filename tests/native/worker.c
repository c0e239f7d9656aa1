/* worker.c: what guests write is what they read. */
#include <pthread.h>
#include <sched.h>
#include "worker.h"

static void fill(uint8_t *data, uint64_t sector, uint8_t version)
{
	for (int i = 0; i < 512; i++)
		data[i] = version ? (uint8_t)(sector * 7 + version * 31 + i) : 0;
}

/* Never 0, which means "not written yet". */
static uint8_t next_version(struct worker *w, uint16_t token, uint32_t sector)
{
	uint8_t *version = &w->shadow[token][sector];

	*version = (uint8_t)(*version % 255 + 1);
	return *version;
}

static void begin(struct worker *w, uint16_t token)
{
	uint64_t base = w->first_sector + (uint64_t)token * SECTORS;
	uint32_t grains = SECTORS / w->alignment;
	uint32_t first = random_below(grains),
		 most = MIN(grains - first, w->driver->config.data_bytes / 512 / w->alignment);
	uint32_t sector = first * w->alignment, sectors = (1 + random_below(most)) * w->alignment;
	bool write = random_below(2);

	w->request[token].sector = sector;
	w->request[token].sectors = sectors;
	w->request[token].write = write;
	for (uint32_t i = 0; i < sectors && write; i++)
		fill(driver_data(w->driver, token) + 512 * i, base + sector + i, next_version(w, token, sector + i));
	if (!write)
		memset(driver_data(w->driver, token), 0xaa, 512 * sectors);
	driver_add(w->driver, token, write ? VIRTIO_BLK_T_OUT : VIRTIO_BLK_T_IN, base + sector, 512 * sectors);
}

static void verify(struct worker *w, uint16_t token, uint32_t written)
{
	uint64_t base = w->first_sector + (uint64_t)token * SECTORS;
	uint32_t sector = w->request[token].sector, sectors = w->request[token].sectors;
	uint8_t expected[512];

	CHECK_EQUAL(*driver_status(w->driver, token), VIRTIO_BLK_S_OK);
	CHECK_EQUAL(written, w->request[token].write ? 1 : 512 * sectors + 1);
	for (uint32_t i = 0; i < sectors && !w->request[token].write; i++) {
		fill(expected, base + sector + i, w->shadow[token][sector + i]);
		CHECK(!memcmp(expected, driver_data(w->driver, token) + 512 * i, 512));
	}
}

static void *work(void *opaque)
{
	struct worker *w = opaque;
	uint32_t started = 0, in_flight = 0, written, finished = 0;
	uint64_t end = now_ns() + DEADLINE;
	int token;

	for (uint16_t i = 0; i < w->driver->tokens && started < w->requests; i++, started++, in_flight++)
		begin(w, i);
	driver_publish(w->driver);
	while (in_flight) {
		CHECK(now_ns() < end);
		while ((token = driver_reap(w->driver, &written)) >= 0) {
			verify(w, (uint16_t)token, written);
			in_flight--;
			store_release(&w->done, ++finished);
			if (started < w->requests) {
				begin(w, (uint16_t)token);
				started++;
				in_flight++;
			}
		}
		if (driver_has_added(w->driver))
			driver_publish(w->driver);
		else if (in_flight && w->driver->call_fd >= 0)
			CHECK(driver_wait(w->driver, 10000));
		else
			sched_yield();
	}
	return NULL;
}

void worker_start(struct worker *w, struct driver *driver, uint64_t first_sector, uint32_t requests)
{
	*w = (struct worker){.driver = driver, .first_sector = first_sector, .requests = requests, .alignment = 1};
	w->shadow = calloc(driver->tokens, sizeof(*w->shadow));
	w->request = calloc(driver->tokens, sizeof(*w->request));
}

void worker_go(struct worker *w)
{
	CHECK_EQUAL(pthread_create(&w->pthread, NULL, work, w), 0);
}

void worker_join(struct worker *w)
{
	pthread_join(w->pthread, NULL);
	free(w->shadow);
	free(w->request);
}

bool worker_finished(struct worker *w)
{
	return load_acquire(&w->done) == w->requests;
}
