/*
 * A guest and a control loop for tests of the engine, both as simple as they can be.
 *
 * TEST(name) { ... } registers a test; `harness` runs those named on its command line, `harness --list` names them all.
 * A test fails by CHECK; what it leaves behind dies with the process.
 */
#pragma once
#include <errno.h>
#include <linux/virtio_blk.h>
#include <linux/virtio_ring.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>
#include "engine.h"
#include "src/common.h"

#define CHECK(condition) ((condition) ? (void)0 : check_failed(__FILE__, __LINE__, #condition))
#define CHECK_EQUAL(a, b)                                                                                              \
	do {                                                                                                           \
		long long left_ = (long long)(a), right_ = (long long)(b);                                             \
		if (left_ != right_)                                                                                   \
			check_differs(__FILE__, __LINE__, #a, left_, #b, right_);                                      \
	} while (0)

void check_failed(const char *file, int line, const char *condition) __attribute__((noreturn));
void check_differs(const char *file, int line, const char *a, long long left, const char *b, long long right)
	__attribute__((noreturn));
void skip(const char *reason) __attribute__((noreturn));

typedef void (*test_function)(void);
void test_register(const char *name, test_function function);

#define TEST(name)                                                                                                     \
	static void test_##name(void);                                                                                 \
	__attribute__((constructor)) static void register_##name(void)                                                 \
	{                                                                                                              \
		test_register(#name, test_##name);                                                                     \
	}                                                                                                              \
	static void test_##name(void)

/* Every wait ends after that: nanoseconds. */
#define DEADLINE 20000000000ull

uint32_t random_below(uint32_t n);

/* ---------------------------------------------------------------- control */

struct engine {
	struct vb_thread *thread;
	bool by_hand; /* there is no thread: each pump is one turn of it */
	uint64_t next_cookie;
	/* Called for everything that is not an ACK; by default requests are an error. */
	void (*on_message)(struct engine *engine, const struct vb_message *message);
	void *opaque;
	/* ACKs by cookie. */
	struct vb_message acks[65536];
	uint8_t acked[65536];
};

struct engine *engine_new(enum vb_io_kind kind, uint64_t poll_max_ns);
struct engine *engine_new_by_hand(enum vb_io_kind kind);
void engine_delete(struct engine *engine);
/* Send without waiting; the cookie of the ACK to come. */
uint64_t engine_send(struct engine *engine, struct vb_message message);
/* Take what has come. Waits for at most `timeout_ms` until something does. */
void engine_pump(struct engine *engine, int timeout_ms);
bool engine_acked(struct engine *engine, uint64_t cookie);
struct vb_message engine_wait(struct engine *engine, uint64_t cookie);
/* Send and wait. */
struct vb_message engine_command(struct engine *engine, struct vb_message message);
/* Send what needs no ACK. */
void engine_tell(struct engine *engine, struct vb_message message);

/* Pump until it is so. */
#define engine_until(engine, condition)                                                                                \
	do {                                                                                                           \
		uint64_t end_ = now_ns() + DEADLINE;                                                                   \
		while (!(condition)) {                                                                                 \
			CHECK(now_ns() < end_);                                                                        \
			engine_pump(engine, 1);                                                                        \
		}                                                                                                      \
	} while (0)

/* ---------------------------------------------------------------- guest */

/* Two regions, next to each other for the guest and apart for everybody else. */
#define GUEST_GPA 0x40000000ull
#define GUEST_UVA 0x700000000000ull
#define GUEST_REGION (32u << 20)

struct guest {
	int memfd;
	uint8_t *base[2];
	struct vb_memory *memory;
	uint64_t free; /* offset of what is not allocated yet */
};

void guest_init(struct guest *guest);
void guest_deinit(struct guest *guest);
struct vb_memory *guest_snapshot(const struct guest *guest);
/* Offsets into guest memory. */
uint64_t guest_alloc(struct guest *guest, uint64_t size, uint64_t alignment);
void *guest_at(const struct guest *guest, uint64_t offset);

struct driver_config {
	uint16_t size;
	uint32_t start; /* both indices; packed: as vb_queue_config.base, 0 for a new ring */
	bool packed;
	bool event_idx;
	bool indirect;
	bool no_kick_fd;
	bool no_call_fd;
	uint32_t pieces;     /* descriptors per request's data */
	uint32_t data_bytes; /* room per request */
	uint32_t alignment;  /* of the data */
	void *inflight;      /* where requests are tracked, or NULL */
	uint64_t inflight_size;
};

/* The driver's half: `tokens` requests, each with descriptors and buffers of its own. */
struct driver {
	struct driver_config config;
	struct guest *guest;
	struct engine *engine;
	struct vb_disk *disk;
	uint32_t key;
	struct vb_queue_stats *stats;
	int kick_fd, call_fd, err_fd;
	uint64_t desc_at, avail_at, used_at; /* offsets */
	struct vring_desc *desc;
	struct vring_avail *avail;
	struct vring_used *used;
	struct packed_driver *packed; /* instead of the three, or NULL */
	uint16_t avail_idx;           /* ours, published or not */
	uint16_t published;
	uint16_t used_idx;
	uint16_t tokens;
	uint16_t per_token; /* descriptors in the queue's table */
	uint64_t slots_at;  /* per token: header, status, table, data */
	uint32_t slot_size, data_in_slot;
	bool runs;
};

void driver_init(struct driver *driver, struct guest *guest, const struct driver_config *config);
void driver_deinit(struct driver *driver);
void driver_start(struct driver *driver, struct engine *engine, struct vb_disk *disk, uint32_t key);
struct vb_queue_config driver_queue_config(const struct driver *driver);
/* Returns where the ring can be started again. */
uint32_t driver_stop(struct driver *driver);

uint8_t *driver_data(const struct driver *driver, uint16_t token);
uint8_t *driver_status(const struct driver *driver, uint16_t token);
uint64_t driver_gpa(const struct driver *driver, const void *address);
/* Describe a request; not visible before driver_publish. */
void driver_add(struct driver *driver, uint16_t token, uint32_t type, uint64_t sector, uint32_t length);
/* Offer a head of which the test has written the descriptors. */
void driver_offer(struct driver *driver, uint16_t head);
/* Whether something was added that is not published. */
bool driver_has_added(const struct driver *driver);
/* Make visible what was added; kicks if the device wants it. */
void driver_publish(struct driver *driver);
/* The token of a finished request, or -1. */
int driver_reap(struct driver *driver, uint32_t *written);
/* Wait for the call fd, as a guest without work does; false: nothing came in `timeout_ms`. */
bool driver_wait(struct driver *driver, int timeout_ms);
/* One request from beginning to end, pumping the engine's messages; its status. */
int driver_do(struct driver *driver, uint32_t type, uint64_t sector, uint32_t length, uint32_t *written);

/* packed_driver.c: the driver's half of a packed ring of `size`, whose three parts are somewhere in guest memory. */
struct packed_driver *packed_driver_new(
	struct vring_packed_desc *desc, uint32_t *driver_event, uint32_t *device_event, uint16_t size, bool event_idx);
/* Describe a chain, whose descriptors are as those of a split ring. */
void packed_driver_add(struct packed_driver *packed, const struct vring_desc *chain, uint32_t count, uint16_t id);
/* Turn a table of a split ring's into one of a packed ring's. */
void packed_driver_convert(struct vring_desc *table, uint32_t count);
bool packed_driver_has_added(const struct packed_driver *packed);
/* Make visible what was added; whether the device is to be kicked. */
bool packed_driver_publish(struct packed_driver *packed);
/* The id of a chain that was used, or -1. */
int packed_driver_reap(struct packed_driver *packed, uint32_t *written);
/* Ask for a call; whether there is something to reap already. */
bool packed_driver_listen(struct packed_driver *packed);

/* ---------------------------------------------------------------- disks */

/* A file in memory (tmpfs) or on disk, unlinked. */
int file_new(bool on_disk, uint64_t size);

struct vb_disk *disk_new(uint64_t id, uint64_t capacity);
void disk_attach(struct engine *engine, struct vb_disk *disk, struct vb_memory *memory);
void disk_detach(struct engine *engine, struct vb_disk *disk);
void disk_map(struct engine *engine, struct vb_disk *disk, struct vb_extent extent);
struct vb_extent whole_file(int fd, uint64_t size, uint32_t flags);

/* ---------------------------------------------------------------- one of each */

/* A disk (1) without extents on a thread of its own, and a driver, to be started. */
struct stand {
	struct engine *engine;
	struct vb_disk *disk;
	struct guest guest;
	struct driver driver;
};

struct stand *stand_new(enum vb_io_kind kind, uint64_t poll_max_ns, uint64_t size, const struct driver_config *config);
/* Stops the driver, if it runs. */
void stand_delete(struct stand *stand);
