/*
 * A load for a guest's disk that knows what every block must contain: reads, writes, flushes, discards and zero-writes.
 *
 *	guest_load DEVICE WORKERS STOP PROGRESS
 *
 * Each worker is a process with a part of the disk of its own, on a processor of its own in turn, so all queues are
 * busy; a read has one right answer. The file PROGRESS always says how many requests the slowest worker has done.
 * When the file STOP appears, every worker reads its whole part once more. Exit status 0: no request has failed and
 * every byte was right.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

enum { BLOCK = 4096, BLOCKS = 512, LONGEST = 16, MOST_WORKERS = 64, LANDINGS = 32 };

#define UNKNOWN UINT32_MAX /* after a discard */

struct worker {
	int number;
	int fd;
	uint64_t random;
	uint32_t version[BLOCKS]; /* 0: zeroes */
	uint32_t last_version;
	uint64_t *buffer;
	/*
	 * What is read goes to one after the other, and stays for a while. Only the device writes there: a migration that
	 * misses what it wrote leaves something else there, and nobody else's write makes up for it.
	 */
	struct landing {
		uint64_t *memory;
		uint32_t blocks; /* 0: nothing was read yet */
		uint64_t sum;
	} landings[LANDINGS];
	uint32_t next_landing;
};

static volatile uint64_t *done; /* one for each worker, shared */

static uint64_t mix(uint64_t x)
{
	x ^= x >> 30;
	x *= 0xbf58476d1ce4e5b9u;
	x ^= x >> 27;
	x *= 0x94d049bb133111ebu;
	return x ^ x >> 31;
}

static uint32_t below(struct worker *self, uint32_t limit)
{
	self->random += 0x9e3779b97f4a7c15u;
	return mix(self->random) % limit;
}

static uint64_t word(const struct worker *self, uint32_t block, uint32_t version, uint32_t index)
{
	uint64_t seed = (uint64_t)self->number << 48 | (uint64_t)block << 32 | version;

	return version ? mix(seed) + index : 0;
}

static off_t place(const struct worker *self, uint32_t block)
{
	return ((off_t)self->number * BLOCKS + block) * BLOCK;
}

static void fail(const struct worker *self, const char *what, uint32_t block)
{
	printf("worker %d, block %u: %s: %s\n", self->number, block, what, strerror(errno));
	fflush(stdout);
	_exit(1);
}

static uint64_t sum(const struct landing *landing)
{
	uint64_t result = 0;

	for (uint32_t i = 0; i < landing->blocks * (BLOCK / 8); i++)
		result = result * 0x100000001b3 + landing->memory[i];
	return result;
}

static void read_and_compare(struct worker *self, uint32_t first, uint32_t count)
{
	struct landing *landing = &self->landings[self->next_landing++ % LANDINGS];

	if (sum(landing) != landing->sum) {
		printf("worker %d: what was read some time ago has changed in memory\n", self->number);
		fflush(stdout);
		_exit(1);
	}
	if (pread(self->fd, landing->memory, count * BLOCK, place(self, first)) != (ssize_t)count * BLOCK)
		fail(self, "read", first);
	landing->blocks = count;
	landing->sum = sum(landing);
	for (uint32_t block = 0; block < count; block++) {
		uint32_t version = self->version[first + block];

		for (uint32_t i = 0; version != UNKNOWN && i < BLOCK / 8; i++) {
			uint64_t found = landing->memory[block * (BLOCK / 8) + i];
			uint64_t wanted = word(self, first + block, version, i);

			if (found == wanted)
				continue;
			printf("worker %d, block %u, word %u: %#llx, not %#llx of version %u\n", self->number,
				first + block, i, (unsigned long long)found, (unsigned long long)wanted, version);
			fflush(stdout);
			_exit(1);
		}
	}
}

static void write_blocks(struct worker *self, uint32_t first, uint32_t count)
{
	uint32_t version = ++self->last_version;

	for (uint32_t block = 0; block < count; block++) {
		self->version[first + block] = version;
		for (uint32_t i = 0; i < BLOCK / 8; i++)
			self->buffer[block * (BLOCK / 8) + i] = word(self, first + block, version, i);
	}
	if (pwrite(self->fd, self->buffer, count * BLOCK, place(self, first)) != (ssize_t)count * BLOCK)
		fail(self, "write", first);
}

static void clear(struct worker *self, uint32_t first, uint32_t count, int is_discard)
{
	uint64_t range[2] = {place(self, first), (uint64_t)count * BLOCK};

	if (ioctl(self->fd, is_discard ? BLKDISCARD : BLKZEROOUT, range))
		fail(self, is_discard ? "discard" : "zero-write", first);
	for (uint32_t block = 0; block < count; block++)
		self->version[first + block] = is_discard ? UNKNOWN : 0;
}

static int work(struct worker *self, const char *stop)
{
	for (uint64_t requests = 0; access(stop, F_OK); requests++) {
		uint32_t kind = below(self, 100);
		uint32_t count = 1 + below(self, below(self, 4) ? 4 : LONGEST);
		uint32_t first = below(self, BLOCKS - count + 1);

		if (kind < 40)
			read_and_compare(self, first, count);
		else if (kind < 85)
			write_blocks(self, first, count);
		else if (kind < 90)
			clear(self, first, count, 0);
		else if (kind < 95)
			clear(self, first, count, 1);
		else if (fdatasync(self->fd))
			fail(self, "flush", first);
		done[self->number] = requests + 1;
	}
	for (uint32_t block = 0; block < BLOCKS; block += LONGEST)
		read_and_compare(self, block, LONGEST);
	return 0;
}

static int run_worker(int number, const char *device, const char *stop)
{
	static struct worker self;
	cpu_set_t processor;

	self.number = number;
	self.random = mix(number + 1);
	CPU_ZERO(&processor);
	CPU_SET(number % sysconf(_SC_NPROCESSORS_ONLN), &processor);
	sched_setaffinity(0, sizeof(processor), &processor);
	self.fd = open(device, O_RDWR | O_DIRECT);
	if (self.fd < 0 || posix_memalign((void **)&self.buffer, BLOCK, LONGEST * BLOCK))
		fail(&self, device, 0);
	for (int i = 0; i < LANDINGS; i++)
		if (posix_memalign((void **)&self.landings[i].memory, BLOCK, LONGEST * BLOCK))
			fail(&self, "memory", 0);
	return work(&self, stop);
}

static void tell(const char *path, const char *next, uint64_t slowest)
{
	FILE *file = fopen(next, "w");

	if (!file || fprintf(file, "%llu\n", (unsigned long long)slowest) < 0 || fclose(file) || rename(next, path))
		perror(path);
}

int main(int argc, char **argv)
{
	int workers = argc == 5 ? atoi(argv[2]) : 0;
	int left = workers, status = 0;
	char next[256];

	if (workers < 1 || workers > MOST_WORKERS)
		return 2;
	snprintf(next, sizeof(next), "%s.next", argv[4]);
	done = mmap(NULL, MOST_WORKERS * sizeof(*done), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	for (int number = 0; number < workers; number++)
		if (!fork())
			_exit(run_worker(number, argv[1], argv[3]));
	while (left) {
		uint64_t slowest = UINT64_MAX;
		int ended;

		while (left && waitpid(-1, &ended, WNOHANG) > 0) {
			left--;
			status |= ended != 0;
		}
		for (int number = 0; number < workers; number++)
			slowest = done[number] < slowest ? done[number] : slowest;
		tell(argv[4], next, slowest);
		usleep(10000);
	}
	return status;
}
