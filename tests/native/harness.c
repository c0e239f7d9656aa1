/* harness.c: see harness.h. */
#include <fcntl.h>
#include <poll.h>
#include <sys/mman.h>
#include "harness.h"
#include "src/thread.h"

/* ---------------------------------------------------------------- tests */

static struct {
	const char *name;
	test_function function;
} tests[1000];
static size_t test_count;

void test_register(const char *name, test_function function)
{
	CHECK(test_count < sizeof(tests) / sizeof(*tests));
	tests[test_count].name = name;
	tests[test_count++].function = function;
}

void check_failed(const char *file, int line, const char *condition)
{
	fprintf(stderr, "%s:%d: %s is not so\n", file, line, condition);
	exit(1);
}

void check_differs(const char *file, int line, const char *a, long long left, const char *b, long long right)
{
	fprintf(stderr, "%s:%d: %s is %lld, %s is %lld\n", file, line, a, left, b, right);
	exit(1);
}

void skip(const char *reason)
{
	printf("SKIP: %s\n", reason);
	exit(77);
}

int main(int argc, char **argv)
{
	bool list = argc == 2 && !strcmp(argv[1], "--list");
	int ran = 0;

	for (size_t i = 0; i < test_count; i++) {
		if (list)
			puts(tests[i].name);
		for (int j = 1; j < argc && !list; j++) {
			if (!strcmp(argv[j], tests[i].name)) {
				tests[i].function();
				ran++;
			}
		}
	}
	return list || ran == argc - 1 ? 0 : 2;
}

static _Thread_local uint64_t random_state = 88172645463325252ull;

uint32_t random_below(uint32_t n)
{
	random_state ^= random_state << 13;
	random_state ^= random_state >> 7;
	random_state ^= random_state << 17;
	return (uint32_t)(random_state >> 32) % n;
}

/* ---------------------------------------------------------------- control */

static void unexpected(struct engine *engine, const struct vb_message *m)
{
	(void)engine;
	fprintf(stderr, "unexpected message %u, result %d\n", m->type, m->result);
	exit(1);
}

struct engine *engine_new(enum vb_io_kind kind, uint64_t poll_max_ns)
{
	struct vb_thread_options options = {.name = "harness", .poll_max_ns = poll_max_ns, .io_kind = kind};
	struct engine *engine = calloc(1, sizeof(*engine));

	engine->on_message = unexpected;
	CHECK_EQUAL(vb_thread_create(&options, &engine->thread), 0);
	return engine;
}

struct engine *engine_new_by_hand(enum vb_io_kind kind)
{
	struct vb_thread_options options = {.name = "harness", .io_kind = kind};
	struct engine *engine = calloc(1, sizeof(*engine));

	engine->by_hand = true;
	engine->on_message = unexpected;
	CHECK_EQUAL(thread_open(&options, &engine->thread), 0);
	return engine;
}

void engine_delete(struct engine *engine)
{
	if (engine->by_hand)
		thread_close(engine->thread);
	else
		CHECK_EQUAL(vb_thread_destroy(engine->thread), 0);
	free(engine);
}

uint64_t engine_send(struct engine *engine, struct vb_message message)
{
	message.cookie = ++engine->next_cookie % 65536;
	engine->acked[message.cookie] = 0;
	engine_tell(engine, message);
	return message.cookie;
}

void engine_tell(struct engine *engine, struct vb_message message)
{
	uint64_t end = now_ns() + DEADLINE;

	while (vb_thread_send(engine->thread, &message, 1) != 1) {
		CHECK(now_ns() < end);
		engine_pump(engine, 1);
	}
}

void engine_pump(struct engine *engine, int timeout_ms)
{
	struct pollfd readable = {.fd = vb_thread_fd(engine->thread), .events = POLLIN};
	struct vb_message messages[32];
	int count;
	uint32_t alike;

	if (engine->by_hand)
		thread_turn(engine->thread);
	else
		poll(&readable, 1, timeout_ms);
	while ((count = vb_thread_receive(engine->thread, messages, 32, &alike))) {
		for (int i = 0; i < count; i++) {
			struct vb_message *m = &messages[i];

			if (m->type != VB_ACK) {
				engine->on_message(engine, m);
				continue;
			}
			CHECK(!engine->acked[m->cookie]);
			engine->acks[m->cookie] = *m;
			engine->acked[m->cookie] = 1;
		}
	}
}

bool engine_acked(struct engine *engine, uint64_t cookie)
{
	return engine->acked[cookie];
}

struct vb_message engine_wait(struct engine *engine, uint64_t cookie)
{
	engine_until(engine, engine_acked(engine, cookie));
	return engine->acks[cookie];
}

struct vb_message engine_command(struct engine *engine, struct vb_message message)
{
	return engine_wait(engine, engine_send(engine, message));
}

/* ---------------------------------------------------------------- guest */

void guest_init(struct guest *guest)
{
	*guest = (struct guest){.memfd = memfd_create("guest", MFD_CLOEXEC), .free = 4096};
	CHECK_EQUAL(ftruncate(guest->memfd, 2 * GUEST_REGION), 0);
	/* The second first, so that the two are not neighbours here. */
	for (int i = 1; i >= 0; i--) {
		guest->base[i] = mmap(
			NULL, GUEST_REGION, PROT_READ | PROT_WRITE, MAP_SHARED, guest->memfd, i * (off_t)GUEST_REGION);
		CHECK(guest->base[i] != MAP_FAILED);
		mmap(NULL, 4096, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	}
	guest->memory = guest_snapshot(guest);
}

struct vb_memory *guest_snapshot(const struct guest *guest)
{
	struct vb_region regions[2];
	struct vb_memory *memory;

	for (int i = 0; i < 2; i++)
		regions[i] = (struct vb_region){
			.gpa = GUEST_GPA + i * (uint64_t)GUEST_REGION,
			.uva = GUEST_UVA + i * (uint64_t)(GUEST_REGION + 4096),
			.size = GUEST_REGION,
			.hva = (uint64_t)guest->base[i],
		};
	CHECK_EQUAL(vb_memory_create(regions, 2, &memory), 0);
	return memory;
}

void guest_deinit(struct guest *guest)
{
	CHECK_EQUAL(vb_memory_refs(guest->memory), 1);
	vb_memory_unref(guest->memory);
	munmap(guest->base[0], GUEST_REGION);
	munmap(guest->base[1], GUEST_REGION);
	close(guest->memfd);
}

uint64_t guest_alloc(struct guest *guest, uint64_t size, uint64_t alignment)
{
	uint64_t offset = (guest->free + alignment - 1) & ~(alignment - 1);

	/* Not across the border: that is for tests that want it. */
	if (offset < GUEST_REGION && offset + size > GUEST_REGION)
		offset = GUEST_REGION;
	CHECK(offset + size <= 2 * GUEST_REGION);
	guest->free = offset + size;
	return offset;
}

void *guest_at(const struct guest *guest, uint64_t offset)
{
	return guest->base[offset / GUEST_REGION] + offset % GUEST_REGION;
}

static uint64_t uva_of(uint64_t offset)
{
	return GUEST_UVA + offset + (offset >= GUEST_REGION ? 4096 : 0);
}

/* Where a token's things are in its slot. */
enum { HEADER_AT = 0, STATUS_AT = 16, TABLE_AT = 32 };

void driver_init(struct driver *driver, struct guest *guest, const struct driver_config *config)
{
	uint32_t pieces = config->pieces ? config->pieces : 1;
	uint32_t alignment = config->alignment ? config->alignment : 512;

	*driver = (struct driver){.config = *config, .guest = guest};
	driver->config.pieces = pieces;
	driver->kick_fd = config->no_kick_fd ? -1 : eventfd(0, EFD_CLOEXEC);
	driver->call_fd = config->no_call_fd ? -1 : eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	driver->err_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	driver->desc_at = guest_alloc(guest, 16u * config->size, 16);
	driver->avail_at = guest_alloc(guest, 6 + 2u * config->size, config->packed ? 4 : 2);
	driver->used_at = guest_alloc(guest, 6 + 8u * config->size, 4);
	driver->desc = guest_at(guest, driver->desc_at);
	driver->avail = guest_at(guest, driver->avail_at);
	driver->used = guest_at(guest, driver->used_at);
	if (config->packed) {
		driver->packed = packed_driver_new(guest_at(guest, driver->desc_at), guest_at(guest, driver->avail_at),
			guest_at(guest, driver->used_at), config->size, config->event_idx);
		driver->config.start = 0x80008000;
	} else {
		driver->avail->idx = driver->used->idx = (uint16_t)config->start;
		driver->avail_idx = driver->published = driver->used_idx = (uint16_t)config->start;
	}
	driver->per_token = (uint16_t)(config->indirect ? 1 : pieces + 2);
	driver->tokens = config->size / driver->per_token;
	driver->data_in_slot = (TABLE_AT + 16 * (pieces + 2) + alignment - 1) & ~(alignment - 1);
	driver->slot_size = (driver->data_in_slot + config->data_bytes + alignment - 1) & ~(alignment - 1);
	driver->slots_at = guest_alloc(guest, (uint64_t)driver->slot_size * driver->tokens, alignment);
	driver->stats = calloc(1, sizeof(*driver->stats));
}

void driver_deinit(struct driver *driver)
{
	if (driver->kick_fd >= 0)
		close(driver->kick_fd);
	if (driver->call_fd >= 0)
		close(driver->call_fd);
	close(driver->err_fd);
	free(driver->packed);
	free(driver->stats);
}

struct vb_queue_config driver_queue_config(const struct driver *driver)
{
	return (struct vb_queue_config){
		.disk = driver->disk,
		.stats = driver->stats,
		.desc_uva = uva_of(driver->desc_at),
		.avail_uva = uva_of(driver->avail_at),
		.used_uva = uva_of(driver->used_at),
		.size = driver->config.size,
		.index = driver->key,
		.base = driver->config.start,
		.enabled = 1,
		.event_idx = driver->config.event_idx,
		.indirect = driver->config.indirect,
		.packed = driver->config.packed,
		.kick_fd = driver->kick_fd,
		.call_fd = driver->call_fd,
		.err_fd = driver->err_fd,
		.inflight = (uint64_t)driver->config.inflight,
		.inflight_size = driver->config.inflight_size,
	};
}

void driver_start(struct driver *driver, struct engine *engine, struct vb_disk *disk, uint32_t key)
{
	struct vb_queue_config config;
	struct vb_message ack;

	driver->engine = engine;
	driver->disk = disk;
	driver->key = key;
	config = driver_queue_config(driver);
	ack = engine_command(engine,
		(struct vb_message){
			.type = VB_QUEUE_START, .queue = key, .disk = (uint64_t)disk, .pointer = (uint64_t)&config});
	CHECK_EQUAL(ack.result, 0);
	driver->runs = true;
}

uint32_t driver_stop(struct driver *driver)
{
	struct vb_message ack =
		engine_command(driver->engine, (struct vb_message){.type = VB_QUEUE_STOP, .queue = driver->key});

	CHECK_EQUAL(ack.result, 0);
	driver->config.start = (uint32_t)ack.aux;
	driver->runs = false;
	return (uint32_t)ack.aux;
}

static uint64_t slot_at(const struct driver *driver, uint16_t token)
{
	return driver->slots_at + (uint64_t)driver->slot_size * token;
}

uint8_t *driver_data(const struct driver *driver, uint16_t token)
{
	return guest_at(driver->guest, slot_at(driver, token) + driver->data_in_slot);
}

uint8_t *driver_status(const struct driver *driver, uint16_t token)
{
	return guest_at(driver->guest, slot_at(driver, token) + STATUS_AT);
}

uint64_t driver_gpa(const struct driver *driver, const void *address)
{
	for (int i = 0; i < 2; i++) {
		uint64_t offset = (uint64_t)((const uint8_t *)address - driver->guest->base[i]);

		if (offset < GUEST_REGION)
			return GUEST_GPA + i * (uint64_t)GUEST_REGION + offset;
	}
	CHECK(!"an address in guest memory");
}

static void offer_packed(struct driver *driver, uint16_t token, struct vring_desc *table, uint32_t count)
{
	struct vring_desc whole = {driver_gpa(driver, table), 16 * count, VRING_DESC_F_INDIRECT, 0};

	if (!driver->config.indirect) {
		packed_driver_add(driver->packed, table, count, token);
		return;
	}
	packed_driver_convert(table, count);
	packed_driver_add(driver->packed, &whole, 1, token);
}

void driver_add(struct driver *driver, uint16_t token, uint32_t type, uint64_t sector, uint32_t length)
{
	uint64_t slot = GUEST_GPA + slot_at(driver, token);
	bool indirect = driver->config.indirect, apart = indirect || driver->packed;
	uint16_t head = (uint16_t)(token * driver->per_token), next = apart ? 0 : head;
	struct vring_desc *table = apart ? guest_at(driver->guest, slot_at(driver, token) + TABLE_AT) : driver->desc;
	struct virtio_blk_outhdr *header = guest_at(driver->guest, slot_at(driver, token) + HEADER_AT);
	uint16_t write = type == VIRTIO_BLK_T_IN || type == VIRTIO_BLK_T_GET_ID ? VRING_DESC_F_WRITE : 0;
	uint32_t pieces = MIN(driver->config.pieces, MAX(length / 512, 1u)), done = 0, count = 0;

	*header = (struct virtio_blk_outhdr){.type = type, .sector = sector};
	*driver_status(driver, token) = 0xff;
	table[next] = (struct vring_desc){slot + HEADER_AT, 16, VRING_DESC_F_NEXT, (uint16_t)(next + 1)};
	for (; length && count < pieces; count++) {
		/* All but the last as long as each other, in whole sectors. */
		uint32_t n = count + 1 < pieces ? length / pieces / 512 * 512 : length - done;

		next++;
		table[next] = (struct vring_desc){
			slot + driver->data_in_slot + done, n, VRING_DESC_F_NEXT | write, (uint16_t)(next + 1)};
		done += n;
	}
	next++;
	table[next] = (struct vring_desc){slot + STATUS_AT, 1, VRING_DESC_F_WRITE, 0};
	if (driver->packed) {
		offer_packed(driver, token, table, next + 1u);
		return;
	}
	if (indirect)
		driver->desc[head] = (struct vring_desc){slot + TABLE_AT, 16u * (next + 1u), VRING_DESC_F_INDIRECT, 0};
	driver_offer(driver, head);
}

void driver_offer(struct driver *driver, uint16_t head)
{
	store_relaxed(&driver->avail->ring[driver->avail_idx & (driver->config.size - 1)], head);
	driver->avail_idx++;
}

bool driver_has_added(const struct driver *driver)
{
	return driver->packed ? packed_driver_has_added(driver->packed) : driver->published != driver->avail_idx;
}

void driver_publish(struct driver *driver)
{
	uint16_t before = driver->published, now = driver->avail_idx;
	uint16_t event;
	bool kick;

	if (driver->packed) {
		if (packed_driver_publish(driver->packed) && driver->kick_fd >= 0)
			eventfd_write(driver->kick_fd, 1);
		return;
	}
	store_release(&driver->avail->idx, now);
	driver->published = now;
	full_fence();
	if (driver->config.event_idx) {
		event = load_relaxed((uint16_t *)&driver->used->ring[driver->config.size]);
		kick = vring_need_event(event, now, before);
	} else {
		kick = !(load_relaxed(&driver->used->flags) & VRING_USED_F_NO_NOTIFY);
	}
	if (kick && driver->kick_fd >= 0)
		eventfd_write(driver->kick_fd, 1);
}

int driver_reap(struct driver *driver, uint32_t *written)
{
	struct vring_used_elem *element = &driver->used->ring[driver->used_idx & (driver->config.size - 1)];
	uint32_t id;

	if (driver->packed)
		return packed_driver_reap(driver->packed, written);
	if (load_acquire(&driver->used->idx) == driver->used_idx)
		return -1;
	id = load_relaxed(&element->id);
	if (written)
		*written = load_relaxed(&element->len);
	driver->used_idx++;
	CHECK(id < driver->config.size);
	return (int)(id / driver->per_token);
}

bool driver_wait(struct driver *driver, int timeout_ms)
{
	struct pollfd readable = {.fd = driver->call_fd, .events = POLLIN};
	eventfd_t ignored;

	/* Ask for a call for the next one. */
	if (driver->packed && packed_driver_listen(driver->packed))
		return true;
	if (!driver->packed && driver->config.event_idx)
		store_relaxed((uint16_t *)&driver->avail->ring[driver->config.size], driver->used_idx);
	full_fence();
	if (!driver->packed && load_acquire(&driver->used->idx) != driver->used_idx)
		return true;
	if (poll(&readable, 1, timeout_ms) != 1)
		return false;
	eventfd_read(driver->call_fd, &ignored);
	return true;
}

int driver_do(struct driver *driver, uint32_t type, uint64_t sector, uint32_t length, uint32_t *written)
{
	int token = -1;

	driver_add(driver, 0, type, sector, length);
	driver_publish(driver);
	engine_until(driver->engine, (token = driver_reap(driver, written)) >= 0);
	CHECK_EQUAL(token, 0);
	return *driver_status(driver, 0);
}

/* ---------------------------------------------------------------- disks */

int file_new(bool on_disk, uint64_t size)
{
	char path[] = "./harness-XXXXXX";
	int fd = on_disk ? mkostemp(path, O_CLOEXEC) : memfd_create("disk", MFD_CLOEXEC);

	CHECK(fd >= 0);
	if (on_disk)
		unlink(path);
	CHECK_EQUAL(ftruncate(fd, (off_t)size), 0);
	return fd;
}

struct vb_disk *disk_new(uint64_t id, uint64_t capacity)
{
	struct vb_disk_config config = {.id = id,
		.capacity = capacity,
		.max_segments = 8,
		.serial = "a serial of 20 chars",
		.max_extents = 1000};
	struct vb_disk *disk;

	CHECK_EQUAL(vb_disk_create(&config, &disk), 0);
	return disk;
}

void disk_attach(struct engine *engine, struct vb_disk *disk, struct vb_memory *memory)
{
	struct vb_message attach = {.type = VB_DISK_ATTACH, .disk = (uint64_t)disk};
	struct vb_message set = {.type = VB_MEMORY_SET, .disk = (uint64_t)disk, .pointer = (uint64_t)memory};

	CHECK_EQUAL(engine_command(engine, attach).result, 0);
	CHECK_EQUAL(engine_command(engine, set).result, 0);
}

void disk_detach(struct engine *engine, struct vb_disk *disk)
{
	struct vb_message set = {.type = VB_MEMORY_SET, .disk = (uint64_t)disk};
	struct vb_message detach = {.type = VB_DISK_DETACH, .disk = (uint64_t)disk};

	CHECK_EQUAL(engine_command(engine, set).result, 0);
	CHECK_EQUAL(engine_command(engine, detach).result, 0);
}

void disk_map(struct engine *engine, struct vb_disk *disk, struct vb_extent extent)
{
	struct vb_message map = {.type = VB_MAP, .disk = (uint64_t)disk, .pointer = (uint64_t)&extent, .count = 1};

	CHECK_EQUAL(engine_command(engine, map).result, 0);
}

struct vb_extent whole_file(int fd, uint64_t size, uint32_t flags)
{
	return (struct vb_extent){
		.length = size, .fd = fd, .flags = flags, .request_alignment = 1, .memory_alignment = 1};
}

/* ---------------------------------------------------------------- one of each */

struct stand *stand_new(enum vb_io_kind kind, uint64_t poll_max_ns, uint64_t size, const struct driver_config *config)
{
	struct stand *stand = calloc(1, sizeof(*stand));

	stand->engine = engine_new(kind, poll_max_ns);
	stand->disk = disk_new(1, size);
	guest_init(&stand->guest);
	disk_attach(stand->engine, stand->disk, stand->guest.memory);
	driver_init(&stand->driver, &stand->guest, config);
	return stand;
}

void stand_delete(struct stand *stand)
{
	if (stand->driver.runs)
		driver_stop(&stand->driver);
	disk_detach(stand->engine, stand->disk);
	engine_delete(stand->engine);
	vb_disk_unref(stand->disk);
	driver_deinit(&stand->driver);
	guest_deinit(&stand->guest);
	free(stand);
}
