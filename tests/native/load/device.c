#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>
#include "device.h"
#include "src/common.h"
#include "test.h"

struct view {
	struct vring_desc *desc;
	struct vring_avail *avail;
	struct vring_used *used;
};

static struct view view_of(const struct vb_load_ring *ring)
{
	return (struct view){
		(void *)(uintptr_t)ring->desc, (void *)(uintptr_t)ring->avail, (void *)(uintptr_t)ring->used};
}

/* The data of a request, as far as it fits: to or from the disk. False: outside of the disk. */
static bool move(struct device *device, const struct vring_desc *table, uint16_t at, uint64_t offset, bool to_disk)
{
	for (; table[at].flags & VRING_DESC_F_NEXT; at = table[at].next) {
		void *buffer = (void *)(uintptr_t)table[at].addr;

		CHECK(!!(table[at].flags & VRING_DESC_F_WRITE) == !to_disk);
		if (offset > DISK_BYTES || table[at].len > DISK_BYTES - offset)
			return false;
		if (to_disk)
			memcpy(device->disk + offset, buffer, table[at].len);
		else
			memcpy(buffer, device->disk + offset, table[at].len);
		offset += table[at].len;
	}
	return true;
}

static uint8_t execute(struct device *device, const struct vring_desc *table, uint16_t at)
{
	const struct virtio_blk_outhdr *header = (void *)(uintptr_t)table[at].addr;
	uint64_t offset = header->sector * 512;
	const struct virtio_blk_discard_write_zeroes *segment;

	CHECK_EQUAL(table[at].len, sizeof(*header));
	CHECK(!(table[at].flags & VRING_DESC_F_WRITE));
	device->requests[header->type & 15]++;
	at = table[at].next;
	switch (header->type) {
	case VIRTIO_BLK_T_IN:
		return move(device, table, at, offset, false) ? VIRTIO_BLK_S_OK : VIRTIO_BLK_S_IOERR;
	case VIRTIO_BLK_T_OUT:
		if (device->misdeed == FAIL_WRITES)
			return VIRTIO_BLK_S_IOERR;
		if (++device->writes >= 100 && device->misdeed == LOSE_WRITES)
			return VIRTIO_BLK_S_OK;
		return move(device, table, at, offset, true) ? VIRTIO_BLK_S_OK : VIRTIO_BLK_S_IOERR;
	case VIRTIO_BLK_T_FLUSH:
		return VIRTIO_BLK_S_OK;
	case VIRTIO_BLK_T_DISCARD:
	case VIRTIO_BLK_T_WRITE_ZEROES:
		segment = (void *)(uintptr_t)table[at].addr;
		CHECK_EQUAL(table[at].len, sizeof(*segment));
		offset = segment->sector * 512;
		if (offset + segment->num_sectors * 512ull > DISK_BYTES)
			return VIRTIO_BLK_S_IOERR;
		/* What a discarded block reads as is the device's choice. */
		memset(device->disk + offset, header->type == VIRTIO_BLK_T_DISCARD ? 0xdd : 0,
			segment->num_sectors * 512ull);
		return VIRTIO_BLK_S_OK;
	default:
		return VIRTIO_BLK_S_UNSUPP;
	}
}

static void complete(struct device *device, const struct view *view, uint16_t head)
{
	const struct vring_desc *table = view->desc;
	uint16_t first = head, last, slot = view->used->idx & (RING_ENTRIES - 1);
	uint32_t length = 1;
	uint8_t status;

	if (table[head].flags & VRING_DESC_F_INDIRECT) {
		table = (void *)(uintptr_t)table[head].addr;
		first = 0;
	}
	for (last = first; table[last].flags & VRING_DESC_F_NEXT; last = table[last].next)
		length++;
	device->longest_chain = MAX(device->longest_chain, length);
	CHECK_EQUAL(table[last].len, 1);
	CHECK(table[last].flags & VRING_DESC_F_WRITE);
	status = execute(device, table, first);
	if (device->misdeed != FORGET_STATUS)
		store_relaxed((uint8_t *)(uintptr_t)table[last].addr, status);
	view->used->ring[slot] = (struct vring_used_elem){device->misdeed == FOREIGN_HEAD ? 100 : head, 1};
	store_release(&view->used->idx, (uint16_t)(view->used->idx + 1));
	if (device->misdeed == RUN_AHEAD)
		store_release(&view->used->idx, (uint16_t)(view->used->idx + 100));
}

static void call_if_wanted(struct device *device, const struct vb_load_ring *ring, uint16_t old)
{
	struct view view = view_of(ring);
	static const uint64_t one = 1;
	uint16_t new = view.used->idx, event;

	full_fence();
	event = load_relaxed((uint16_t *)(void *)&view.avail->ring[ring->size]);
	if (device->event_idx ? (uint16_t)(new - event - 1) >= (uint16_t)(new - old)
			      : load_relaxed(&view.avail->flags) & VRING_AVAIL_F_NO_INTERRUPT)
		return;
	device->calls++;
	CHECK_EQUAL(write(ring->call_fd, &one, sizeof(one)), sizeof(one));
}

/* True: there was something. */
static bool serve(struct device *device, uint32_t queue)
{
	struct view view = view_of(&device->rings[queue]);
	uint16_t end = load_acquire(&view.avail->idx), old = view.used->idx;

	if (device->next[queue] == end)
		return false;
	for (; device->next[queue] != end; device->next[queue]++)
		complete(device, &view, view.avail->ring[device->next[queue] & (RING_ENTRIES - 1)]);
	call_if_wanted(device, &device->rings[queue], old);
	return true;
}

static bool serve_all(struct device *device)
{
	bool busy = false;

	for (uint32_t i = 0; i < device->count; i++)
		busy |= serve(device, i);
	return busy;
}

static void want_kicks(struct device *device, bool wanted)
{
	for (uint32_t i = 0; i < device->count; i++) {
		struct view view = view_of(&device->rings[i]);
		uint16_t event = (uint16_t)(device->next[i] + (wanted ? 0 : 0x8000));

		store_relaxed((uint16_t *)(void *)&view.used->ring[RING_ENTRIES], event);
		store_relaxed(&view.used->flags, wanted ? 0 : VRING_USED_F_NO_NOTIFY);
	}
	full_fence();
}

static void take_kicks(struct device *device)
{
	uint64_t counter;

	for (uint32_t i = 0; i < device->count; i++)
		if (read(device->rings[i].kick_fd, &counter, sizeof(counter)) > 0)
			device->kicks += counter;
}

static void *device_main(void *argument)
{
	struct device *device = argument;
	struct epoll_event event;

	while (!load_relaxed(&device->stop)) {
		if (serve_all(device))
			continue;
		want_kicks(device, true);
		/* Nobody wakes this but a kick: a kick that is not sent is a test that ends at its deadline. */
		if (!serve_all(device) && epoll_wait(device->epoll_fd, &event, 1, -1) == 1)
			take_kicks(device);
		want_kicks(device, false);
	}
	return NULL;
}

static uint64_t memory(uint64_t size)
{
	void *memory = aligned_alloc(4096, (size + 4095) / 4096 * 4096);

	CHECK(memory);
	memset(memory, 0, size);
	return (uintptr_t)memory;
}

void device_init(struct device *device, const struct vb_load_options *options, uint32_t queues, enum misdeed misdeed)
{
	*device = (struct device){.count = queues, .event_idx = options->event_idx, .misdeed = misdeed};
	device->disk = malloc(DISK_BYTES);
	memset(device->disk, 0xdd, DISK_BYTES);
	device->epoll_fd = epoll_create1(0);
	for (uint32_t i = 0; i < queues; i++) {
		struct vb_load_ring *ring = &device->rings[i];
		struct epoll_event event = {.events = EPOLLIN};

		ring->size = RING_ENTRIES;
		ring->desc = memory(16 * RING_ENTRIES);
		ring->avail = memory(6 + 2 * RING_ENTRIES);
		ring->used = memory(6 + 8 * RING_ENTRIES);
		ring->slots = ring->slots_gpa = memory(vb_load_slots_size(options));
		ring->kick_fd = eventfd(0, EFD_NONBLOCK);
		ring->call_fd = eventfd(0, EFD_NONBLOCK);
		CHECK_EQUAL(epoll_ctl(device->epoll_fd, EPOLL_CTL_ADD, ring->kick_fd, &event), 0);
	}
	if (misdeed != ABSENT)
		CHECK_EQUAL(pthread_create(&device->thread, NULL, device_main, device), 0);
}

void device_deinit(struct device *device)
{
	static const uint64_t one = 1;

	store_relaxed(&device->stop, 1);
	CHECK_EQUAL(write(device->rings[0].kick_fd, &one, sizeof(one)), sizeof(one));
	if (device->misdeed != ABSENT)
		pthread_join(device->thread, NULL);
	take_kicks(device);
	device->kicks--; /* ours */
	for (uint32_t i = 0; i < device->count; i++) {
		struct vb_load_ring *ring = &device->rings[i];

		free((void *)(uintptr_t)ring->desc);
		free((void *)(uintptr_t)ring->avail);
		free((void *)(uintptr_t)ring->used);
		free((void *)(uintptr_t)ring->slots);
		close(ring->kick_fd);
		close(ring->call_fd);
	}
	close(device->epoll_fd);
	free(device->disk);
}
