/* test_fds.c: queues whose fds are changed while they run. */
#include <poll.h>
#include "harness.h"

#define DISK_SIZE (1u << 20)

/* Nobody but the device looks, and it sleeps until it is kicked. */
static void ask_and_wait(struct driver *driver)
{
	driver_add(driver, 0, VIRTIO_BLK_T_IN, 0, 512);
	driver_publish(driver);
	while (driver_reap(driver, NULL) < 0)
		CHECK(driver_wait(driver, 5000));
}

static void kick_fd_comes_later(bool event_idx)
{
	struct driver_config config = {.size = 16, .data_bytes = 512, .event_idx = event_idx};
	struct engine *engine = engine_new(VB_IO_THREADS, 0);
	struct vb_disk *disk = disk_new(1, DISK_SIZE);
	struct vb_message set = {.type = VB_QUEUE_FD, .queue = 1, .aux = VB_QUEUE_KICK};
	struct driver driver;
	struct guest guest;
	int kick_fd;

	guest_init(&guest);
	disk_attach(engine, disk, guest.memory);
	disk_map(engine, disk, whole_file(-1, DISK_SIZE, VB_EXTENT_NULL | VB_EXTENT_READ));
	driver_init(&driver, &guest, &config);
	driver_start(&driver, engine, disk, 1);
	kick_fd = driver.kick_fd;
	for (int round = 0; round < 20; round++) {
		driver.kick_fd = set.result = -1;
		CHECK_EQUAL(engine_command(engine, set).result, 0);
		for (int i = 0; i < 5; i++)
			ask_and_wait(&driver);
		driver.kick_fd = set.result = kick_fd;
		CHECK_EQUAL(engine_command(engine, set).result, 0);
		for (int i = 0; i < 5; i++)
			ask_and_wait(&driver);
	}
	driver_stop(&driver);
	disk_detach(engine, disk);
	engine_delete(engine);
	vb_disk_unref(disk);
	driver_deinit(&driver);
	guest_deinit(&guest);
}

TEST(a_kick_fd_that_comes_later_is_listened_to)
{
	kick_fd_comes_later(false);
	kick_fd_comes_later(true);
}
