/* test_flush.c: one fdatasync of a disk at a time, whoever asks. */
#include <pthread.h>
#include <sys/syscall.h>
#include "harness.h"

#define SIZE (1u << 20)
#define RW (VB_EXTENT_READ | VB_EXTENT_WRITE)
#define THREADS 3

/* ---------------------------------------------------------------- a kernel that loses writes */

/* Stands in for the one of libc. As the kernel does, it tells of a lost write to whoever asks first, and to nobody
 * else; how long it takes is up to the test. */
static struct {
	bool stands_in;
	pthread_mutex_t lock;
	pthread_cond_t changed;
	bool gate; /* calls wait until the test lets them through */
	int inside, most_inside, let_through, calls;
	bool lost;
} kernel = {.lock = PTHREAD_MUTEX_INITIALIZER, .changed = PTHREAD_COND_INITIALIZER};

int fdatasync(int fd)
{
	bool failed;

	if (!kernel.stands_in)
		return (int)syscall(SYS_fdatasync, fd);
	pthread_mutex_lock(&kernel.lock);
	kernel.calls++;
	kernel.inside++;
	kernel.most_inside = MAX(kernel.most_inside, kernel.inside);
	while (kernel.gate && !kernel.let_through)
		pthread_cond_wait(&kernel.changed, &kernel.lock);
	kernel.let_through -= kernel.gate;
	kernel.inside--;
	failed = kernel.lost;
	kernel.lost = false;
	pthread_mutex_unlock(&kernel.lock);
	if (failed)
		errno = EIO;
	return failed ? -1 : 0;
}

static void let_through(int calls, bool lose)
{
	pthread_mutex_lock(&kernel.lock);
	kernel.let_through += calls;
	kernel.lost = lose;
	pthread_cond_broadcast(&kernel.changed);
	pthread_mutex_unlock(&kernel.lock);
}

static int calls_inside(void)
{
	int inside;

	pthread_mutex_lock(&kernel.lock);
	inside = kernel.inside;
	pthread_mutex_unlock(&kernel.lock);
	return inside;
}

/* ---------------------------------------------------------------- one disk on three threads */

static struct {
	struct engine *engines[THREADS];
	struct driver drivers[THREADS];
	struct guest guest;
	struct vb_disk *disk;
	int fd;
	int requests, io_errors; /* messages */
	struct vb_message request;
} rig;

static void note(struct engine *engine, const struct vb_message *m)
{
	(void)engine;
	if (m->type == VB_REQUEST) {
		rig.request = *m;
		rig.requests++;
	} else {
		CHECK_EQUAL(m->type, VB_IO_ERROR);
		CHECK_EQUAL(m->result, -EIO);
		rig.io_errors++;
	}
}

static void rig_up(bool gate)
{
	struct driver_config config = {.size = 16, .data_bytes = 4096, .event_idx = true};

	memset(&rig, 0, sizeof(rig));
	kernel.stands_in = true;
	kernel.gate = gate;
	guest_init(&rig.guest);
	rig.disk = disk_new(1, SIZE);
	rig.fd = file_new(false, SIZE);
	for (uint32_t i = 0; i < THREADS; i++) {
		struct vb_message set = {.type = VB_FLUSH_SET, .disk = (uint64_t)rig.disk, .result = rig.fd};

		rig.engines[i] = engine_new(VB_IO_THREADS, 0);
		rig.engines[i]->on_message = note;
		disk_attach(rig.engines[i], rig.disk, rig.guest.memory);
		disk_map(rig.engines[i], rig.disk, whole_file(rig.fd, SIZE, RW));
		CHECK_EQUAL(engine_command(rig.engines[i], set).result, 0);
		driver_init(&rig.drivers[i], &rig.guest, &config);
		driver_start(&rig.drivers[i], rig.engines[i], rig.disk, 1);
	}
}

static void rig_down(void)
{
	for (int i = 0; i < THREADS; i++) {
		driver_stop(&rig.drivers[i]);
		disk_detach(rig.engines[i], rig.disk);
		engine_delete(rig.engines[i]);
		driver_deinit(&rig.drivers[i]);
	}
	vb_disk_unref(rig.disk);
	guest_deinit(&rig.guest);
	close(rig.fd);
}

/* An answered command says that the thread has served what was published before. */
static void settle_thread(int thread)
{
	struct vb_message nothing = {.type = VB_REVOKE, .disk = (uint64_t)rig.disk};

	CHECK_EQUAL(engine_command(rig.engines[thread], nothing).result, 0);
}

static void ask(int thread, uint16_t token, uint32_t type, uint32_t length)
{
	driver_add(&rig.drivers[thread], token, type, 0, length);
	driver_publish(&rig.drivers[thread]);
	settle_thread(thread);
}

static int status_of(int thread, int token)
{
	engine_until(rig.engines[thread], driver_reap(&rig.drivers[thread], NULL) == token);
	return *driver_status(&rig.drivers[thread], (uint16_t)token);
}

TEST(flushes_that_come_during_an_fdatasync_share_the_next_one)
{
	rig_up(true);
	ask(0, 0, VIRTIO_BLK_T_FLUSH, 0);
	engine_until(rig.engines[0], calls_inside() == 1);
	for (int i = 0; i < THREADS; i++) {
		for (uint16_t token = 1; token < 4; token++)
			ask(i, token, VIRTIO_BLK_T_FLUSH, 0);
	}
	let_through(1, false);
	CHECK_EQUAL(status_of(0, 0), VIRTIO_BLK_S_OK);
	engine_until(rig.engines[0], calls_inside() == 1);
	/* None of them is answered by what had begun before it came. */
	for (int i = 0; i < THREADS; i++)
		CHECK_EQUAL(driver_reap(&rig.drivers[i], NULL), -1);
	let_through(1, false);
	for (int i = 0; i < THREADS; i++)
		for (int token = 1; token < 4; token++)
			CHECK_EQUAL(status_of(i, token), VIRTIO_BLK_S_OK);
	CHECK_EQUAL(kernel.calls, 2);
	CHECK_EQUAL(kernel.most_inside, 1);
	CHECK_EQUAL(rig.requests, 0);
	rig_down();
}

TEST(no_flush_succeeds_while_another_is_told_of_a_lost_write)
{
	rig_up(true);
	for (int i = 0; i < THREADS; i++) {
		ask(i, 0, VIRTIO_BLK_T_FLUSH, 0);
		ask(i, 1, VIRTIO_BLK_T_FLUSH, 0);
	}
	engine_until(rig.engines[0], calls_inside() >= 1);
	let_through(100, true);
	for (int i = 0; i < THREADS; i++)
		for (int token = 0; token < 2; token++)
			CHECK_EQUAL(status_of(i, token), VIRTIO_BLK_S_IOERR);
	CHECK_EQUAL(kernel.calls, 1);
	CHECK_EQUAL(vb_disk_flush_failed(rig.disk), EIO);
	/* From here on control answers. */
	ask(2, 0, VIRTIO_BLK_T_FLUSH, 0);
	engine_until(rig.engines[2], rig.requests == 1);
	engine_tell(rig.engines[2], (struct vb_message){.type = VB_COMPLETE, .cookie = rig.request.cookie});
	CHECK_EQUAL(status_of(2, 0), VIRTIO_BLK_S_OK);
	CHECK_EQUAL(kernel.calls, 1);
	rig_down();
}

/* RWF_DSYNC would take the error of a lost write, too. */
TEST(durable_writes_share_fdatasyncs_with_flushes)
{
	rig_up(true);
	vb_disk_set_write_through(rig.disk, 1);
	for (int i = 0; i < THREADS; i++) {
		ask(i, 0, VIRTIO_BLK_T_OUT, 4096);
		ask(i, 1, VIRTIO_BLK_T_FLUSH, 0);
	}
	engine_until(rig.engines[0], calls_inside() == 1);
	CHECK_EQUAL(vb_disk_write_gen(rig.disk), 0);
	let_through(100, false);
	for (int i = 0; i < THREADS; i++) {
		int done = 0;

		engine_until(rig.engines[i], (done += driver_reap(&rig.drivers[i], NULL) >= 0) == 2);
		CHECK_EQUAL(*driver_status(&rig.drivers[i], 0), VIRTIO_BLK_S_OK);
		CHECK_EQUAL(*driver_status(&rig.drivers[i], 1), VIRTIO_BLK_S_OK);
	}
	CHECK_EQUAL(kernel.most_inside, 1);
	CHECK_EQUAL(vb_disk_write_gen(rig.disk), THREADS);
	/* A lost write is an error of all of them. */
	kernel.gate = false;
	let_through(0, true);
	ask(1, 0, VIRTIO_BLK_T_OUT, 4096);
	CHECK_EQUAL(status_of(1, 0), VIRTIO_BLK_S_IOERR);
	CHECK_EQUAL(rig.requests, 0);
	/* And then, or where nobody may flush, control makes writes durable. */
	ask(1, 0, VIRTIO_BLK_T_OUT, 4096);
	engine_until(rig.engines[1], rig.requests == 1);
	CHECK_EQUAL(rig.request.flags, VB_REQUEST_NEEDS_FLUSH);
	engine_tell(rig.engines[1], (struct vb_message){.type = VB_COMPLETE, .cookie = rig.request.cookie});
	CHECK_EQUAL(status_of(1, 0), VIRTIO_BLK_S_OK);
	rig_down();
}

TEST(the_right_to_flush_is_back_when_no_thread_flushes)
{
	struct vb_message miss = {.type = VB_FLUSH_SET, .result = VB_FLUSH_MISS};
	uint64_t cookies[2];

	rig_up(true);
	miss.disk = (uint64_t)rig.disk;
	ask(0, 0, VIRTIO_BLK_T_FLUSH, 0);
	engine_until(rig.engines[0], calls_inside() == 1);
	ask(1, 0, VIRTIO_BLK_T_FLUSH, 0);
	for (int i = 0; i < 2; i++) {
		cookies[i] = engine_send(rig.engines[i], miss);
		settle_thread(i);
		CHECK(!engine_acked(rig.engines[i], cookies[i]));
	}
	let_through(1, false);
	CHECK_EQUAL(engine_wait(rig.engines[0], cookies[0]).result, 0);
	/* The second one waits for the fdatasync after the first. */
	engine_until(rig.engines[1], calls_inside() == 1);
	CHECK(!engine_acked(rig.engines[1], cookies[1]));
	let_through(1, false);
	CHECK_EQUAL(engine_wait(rig.engines[1], cookies[1]).result, 0);
	CHECK_EQUAL(calls_inside(), 0);
	for (int i = 0; i < 2; i++)
		CHECK_EQUAL(status_of(i, 0), VIRTIO_BLK_S_OK);
	rig_down();
}

static int set_flush(int thread, int fd)
{
	struct vb_message set = {.type = VB_FLUSH_SET, .disk = (uint64_t)rig.disk, .result = fd};

	return engine_command(rig.engines[thread], set).result;
}

/* Who waits for an fdatasync shares it, whatever he asked for: were it another file, it would say nothing about his. */
TEST(no_thread_may_flush_a_file_while_another_file_may_be_flushed)
{
	int other = file_new(false, SIZE);
	struct vb_message miss = {.type = VB_FLUSH_SET, .result = VB_FLUSH_MISS};
	uint64_t cookie;

	rig_up(true);
	miss.disk = (uint64_t)rig.disk;
	/* Neither on the same thread nor while the others have the old one. */
	CHECK_EQUAL(set_flush(0, other), -EBUSY);
	CHECK_EQUAL(set_flush(0, rig.fd), 0);
	CHECK_EQUAL(set_flush(0, VB_FLUSH_MISS), 0);
	CHECK_EQUAL(set_flush(0, other), -EBUSY);
	CHECK_EQUAL(set_flush(1, VB_FLUSH_NOTHING), 0);
	/* Nor while an fdatasync of the old one is in flight. */
	ask(2, 0, VIRTIO_BLK_T_FLUSH, 0);
	engine_until(rig.engines[2], calls_inside() == 1);
	cookie = engine_send(rig.engines[2], miss);
	settle_thread(2);
	CHECK_EQUAL(set_flush(0, other), -EBUSY);
	CHECK_EQUAL(set_flush(2, other), -EBUSY);
	let_through(1, false);
	CHECK_EQUAL(engine_wait(rig.engines[2], cookie).result, 0);
	CHECK_EQUAL(status_of(2, 0), VIRTIO_BLK_S_OK);
	for (int i = 0; i < THREADS; i++)
		CHECK_EQUAL(set_flush(i, other), 0);
	CHECK_EQUAL(set_flush(1, rig.fd), -EBUSY);
	rig_down();
	close(other);
}

/* As many as a thread may owe answers: each has its place from the beginning, none can fail for want of memory. */
TEST(thousands_of_revocations_wait_at_once)
{
	enum { COUNT = 4000 };
	struct vb_message miss = {.type = VB_FLUSH_SET, .result = VB_FLUSH_MISS};
	static uint64_t cookies[COUNT];

	rig_up(true);
	miss.disk = (uint64_t)rig.disk;
	for (int round = 0; round < 2; round++) {
		struct vb_message set = {.type = VB_FLUSH_SET, .disk = (uint64_t)rig.disk, .result = rig.fd};

		CHECK_EQUAL(engine_command(rig.engines[0], set).result, 0);
		ask(0, 0, VIRTIO_BLK_T_FLUSH, 0);
		engine_until(rig.engines[0], calls_inside() == 1);
		for (int i = 0; i < COUNT; i++)
			cookies[i] = engine_send(rig.engines[0], miss);
		settle_thread(0);
		CHECK(!engine_acked(rig.engines[0], cookies[0]));
		let_through(1, false);
		for (int i = 0; i < COUNT; i++)
			CHECK_EQUAL(engine_wait(rig.engines[0], cookies[i]).result, 0);
		CHECK_EQUAL(status_of(0, 0), VIRTIO_BLK_S_OK);
	}
	rig_down();
}

/* Nobody is forgotten, however they meet. */
TEST(flushes_of_three_threads_under_load)
{
	int done[THREADS] = {0}, asked[THREADS] = {0};
	uint64_t end = now_ns() + DEADLINE;

	rig_up(false);
	while (done[0] + done[1] + done[2] < THREADS * 3000) {
		CHECK(now_ns() < end);
		for (int i = 0; i < THREADS; i++) {
			struct driver *d = &rig.drivers[i];
			int token;

			for (; asked[i] < 3; asked[i]++)
				driver_add(d, (uint16_t)asked[i], VIRTIO_BLK_T_FLUSH, 0, 0);
			while ((token = driver_reap(d, NULL)) >= 0) {
				CHECK_EQUAL(*driver_status(d, (uint16_t)token), VIRTIO_BLK_S_OK);
				if (++done[i] + 2 < 3000)
					driver_add(d, (uint16_t)token, VIRTIO_BLK_T_FLUSH, 0, 0);
			}
			driver_publish(d);
		}
	}
	CHECK_EQUAL(kernel.most_inside, 1);
	CHECK(kernel.calls < THREADS * 3000);
	rig_down();
}
