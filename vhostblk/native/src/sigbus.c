/*
 * sigbus.c: the SIGBUS guard of guest memory.
 *
 * A mapping of a file raises SIGBUS where the file has no page: beyond its end after a truncation. The handler puts
 * anonymous zero pages over the whole guarded range, marks it, and lets the access go on. Whoever uses that memory
 * looks at the mark and stops. A SIGBUS anywhere else goes to whom it would have gone to without us.
 *
 * This is the only process-wide state of the engine, because signal handlers are process-wide. The handler takes no
 * lock: slots live in a static array, and it looks only at atomics. The range it faulted in cannot leave the table
 * meanwhile, because the faulting thread holds the snapshot that put it there.
 */
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>
#include "sigbus.h"

/* Front-ends decide how many there are. Linux gives a process four times as many mappings. */
#define GUARD_SLOTS 16384
#define GUARD_BUCKET_BITS 12

struct guard_slot {
	uint64_t start;
	uint64_t end;   /* 0: the slot is free. Pair [G1]: stored last, looked at first and again at the end */
	uint32_t users; /* under the lock */
	uint32_t faulted;
	uint32_t next; /* under the lock: 1 + the number of the next one of its bucket, or that is free; 0: none */
};

static struct guard_slot slots[GUARD_SLOTS];
static uint32_t slots_used; /* none beyond was ever in use */
/* Under the lock: slots in use by their ranges, and free ones, as in `next`. A map of hundreds of regions is exchanged for
 * one more or one less, and all of them are looked for. */
static uint32_t buckets[1 << GUARD_BUCKET_BITS];
static uint32_t vacant;
static uint32_t faults;
static bool installed; /* under the lock */
static struct sigaction previous;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static struct guard_slot *slot_of(uint64_t address)
{
	uint32_t used = load_acquire(&slots_used);

	for (uint32_t i = 0; i < used; i++) {
		uint64_t end = load_acquire(&slots[i].end); /* [G1] */

		if (address < end && address >= load_acquire(&slots[i].start) && end == load_acquire(&slots[i].end))
			return &slots[i];
	}
	return NULL;
}

/* Pages of hugetlbfs can only be replaced whole: try the page sizes there are, the smallest first. */
static bool replace_pages(uint64_t start, uint64_t end)
{
	static const uint64_t page_sizes[] = {4096, 65536, 2u << 20, 1u << 30};

	for (size_t i = 0; i < sizeof(page_sizes) / sizeof(page_sizes[0]); i++) {
		uint64_t first = start & ~(page_sizes[i] - 1);
		uint64_t last = (end + page_sizes[i] - 1) & ~(page_sizes[i] - 1);

		if (mmap((void *)first, last - first, PROT_READ | PROT_WRITE,
			    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0) != MAP_FAILED)
			return true;
	}
	return false;
}

/* Mark every slot that holds the address: snapshots may cut the same memory in different ways. */
static void mark_faulted(uint64_t address)
{
	for (uint32_t i = 0; i < load_acquire(&slots_used); i++)
		if (address < load_acquire(&slots[i].end) && address >= load_acquire(&slots[i].start))
			store_release(&slots[i].faulted, 1);
	__atomic_fetch_add(&faults, 1, __ATOMIC_RELEASE);
}

static void call_previous(int signal, siginfo_t *info, void *context)
{
	if (previous.sa_flags & SA_SIGINFO) {
		previous.sa_sigaction(signal, info, context);
	} else if (previous.sa_handler == SIG_DFL || (previous.sa_handler == SIG_IGN && info->si_code > 0)) {
		/* Back to the default: the access faults again, or the signal comes again, and ends us. */
		sigaction(SIGBUS, &(struct sigaction){.sa_handler = SIG_DFL}, NULL);
		if (info->si_code <= 0)
			raise(signal);
	} else if (previous.sa_handler != SIG_IGN) {
		previous.sa_handler(signal);
	}
}

static void on_sigbus(int signal, siginfo_t *info, void *context)
{
	uint64_t address = (uint64_t)(uintptr_t)info->si_addr;
	struct guard_slot *slot = info->si_code > 0 ? slot_of(address) : NULL;
	int saved = errno;

	/* Marked first: whoever reads zeroes must be able to know why. */
	if (slot)
		mark_faulted(address);
	if (!slot || !replace_pages(slot->start, load_acquire(&slot->end)))
		call_previous(signal, info, context);
	errno = saved;
}

static int install(void)
{
	struct sigaction action = {.sa_sigaction = on_sigbus, .sa_flags = SA_SIGINFO | SA_ONSTACK};

	if (installed)
		return 0;
	sigemptyset(&action.sa_mask);
	if (sigaction(SIGBUS, &action, &previous))
		return -errno;
	installed = true;
	return 0;
}

static uint32_t *bucket_of(uint64_t start, uint64_t end)
{
	/* Addresses end in zeroes: what is mixed is in the upper bits. */
	return &buckets[(start + end) * 0x9e3779b97f4a7c15u >> (64 - GUARD_BUCKET_BITS)];
}

/* A slot that is free, taken from where it is listed; -ENOSPC: there is none. */
static int take_slot(void)
{
	uint32_t slot = vacant;

	if (!slot)
		return slots_used < GUARD_SLOTS ? (int)slots_used : -ENOSPC;
	vacant = slots[slot - 1].next;
	return (int)slot - 1;
}

static int use_slot(uint64_t start, uint64_t end)
{
	uint32_t *bucket = bucket_of(start, end);
	int number;

	for (uint32_t slot = *bucket; slot; slot = slots[slot - 1].next)
		if (slots[slot - 1].start == start && slots[slot - 1].end == end) {
			slots[slot - 1].users++;
			return (int)slot - 1;
		}
	number = take_slot();
	if (number < 0)
		return number;
	slots[number].users = 1;
	slots[number].next = *bucket;
	*bucket = (uint32_t)number + 1;
	store_relaxed(&slots[number].faulted, 0);
	store_release(&slots[number].start, start);
	store_release(&slots[number].end, end); /* [G1] */
	if ((uint32_t)number == slots_used)
		store_release(&slots_used, slots_used + 1);
	return number;
}

int sigbus_guard_add(uint64_t address, uint64_t size)
{
	int slot;

	pthread_mutex_lock(&lock);
	slot = install();
	if (!slot)
		slot = use_slot(address, address + size);
	pthread_mutex_unlock(&lock);
	return slot;
}

static void free_slot(struct guard_slot *slot, uint32_t number)
{
	uint32_t *link = bucket_of(slot->start, slot->end);

	while (*link != number + 1)
		link = &slots[*link - 1].next;
	*link = slot->next;
	slot->next = vacant;
	vacant = number + 1;
	store_release(&slot->end, 0); /* [G1] */
}

void sigbus_guard_remove(int slot)
{
	pthread_mutex_lock(&lock);
	if (!--slots[slot].users)
		free_slot(&slots[slot], (uint32_t)slot);
	pthread_mutex_unlock(&lock);
}

bool sigbus_guard_faulted(int slot)
{
	return load_acquire(&slots[slot].faulted);
}

uint32_t sigbus_faults(void)
{
	return load_acquire(&faults);
}
