/* Small things every file of the engine uses. */
#pragma once
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <time.h>

/* Each argument is evaluated once. */
#define MIN(a, b)                                                                                                      \
	({                                                                                                             \
		__auto_type min_a = (a);                                                                               \
		__auto_type min_b = (b);                                                                               \
		min_a < min_b ? min_a : min_b;                                                                         \
	})
#define MAX(a, b)                                                                                                      \
	({                                                                                                             \
		__auto_type max_a = (a);                                                                               \
		__auto_type max_b = (b);                                                                               \
		max_a > max_b ? max_a : max_b;                                                                         \
	})
#define container_of(pointer, type, member) ((type *)((char *)(pointer)-offsetof(type, member)))

/* Memory that somebody else writes while we look at it is read through these, exactly once. */
#define load_relaxed(p) __atomic_load_n(p, __ATOMIC_RELAXED)
#define load_acquire(p) __atomic_load_n(p, __ATOMIC_ACQUIRE)
#ifdef VB_STORE_HOOK
/* A test that ends us before any store. */
void vb_store_hook(void);
#define store_relaxed(p, v) (vb_store_hook(), __atomic_store_n(p, v, __ATOMIC_RELAXED))
#define store_release(p, v) (vb_store_hook(), __atomic_store_n(p, v, __ATOMIC_RELEASE))
#else
#define store_relaxed(p, v) __atomic_store_n(p, v, __ATOMIC_RELAXED)
#define store_release(p, v) __atomic_store_n(p, v, __ATOMIC_RELEASE)
#endif

/* Every store before it is visible to everybody before any load after it is done. */
static inline void full_fence(void)
{
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
}

/* Copies bytes that the guest may change meanwhile; the compiler cannot go back and read them a second time. */
static inline void copy_once(void *to, const void *from, size_t size)
{
	memcpy(to, from, size);
	__asm__ volatile("" : : "r"(to) : "memory");
}

static inline uint64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* What a spinning thread does between two looks, so that its sibling hyperthread gets the core. */
static inline void cpu_relax(void)
{
#if defined(__x86_64__)
	__builtin_ia32_pause();
#elif defined(__aarch64__)
	__asm__ volatile("yield");
#endif
}

/* Whether [offset, offset + length) and [other, other + other_length) share a byte. Neither wraps. */
static inline bool ranges_overlap(uint64_t offset, uint64_t length, uint64_t other, uint64_t other_length)
{
	return length && other_length && offset < other + other_length && other < offset + length;
}

/* A doubly linked list with its head as sentinel. */
struct list {
	struct list *next, *prev;
};

static inline void list_init(struct list *head)
{
	head->next = head->prev = head;
}

static inline bool list_empty(const struct list *head)
{
	return head->next == head;
}

static inline void list_append(struct list *head, struct list *node)
{
	node->next = head;
	node->prev = head->prev;
	head->prev->next = node;
	head->prev = node;
}

static inline void list_remove(struct list *node)
{
	node->prev->next = node->next;
	node->next->prev = node->prev;
}

/* `node` itself may be removed inside the loop: `following` was read before. */
#define list_for_each(node, following, head)                                                                           \
	for (struct list *node = (head)->next, *following = node->next; node != (head);                                \
		node = following, following = node->next)
