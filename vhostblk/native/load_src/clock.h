/* A clock that costs little: the processor's counter where it runs at one speed and on all cores alike. */
#pragma once
#include "../src/common.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

/* CPUID 8000_0007h, EDX bit 8: the counter neither stops nor changes its speed. Without it, and on other processors,
 * a tick is a nanosecond of CLOCK_MONOTONIC. */
static inline bool clock_has_tsc(void)
{
#if defined(__x86_64__)
	unsigned a = 0, b = 0, c = 0, d = 0;

	return __get_cpuid(0x80000007, &a, &b, &c, &d) && (d & 1u << 8);
#else
	return false;
#endif
}

/* `tsc` is what clock_has_tsc said. Not ordered against the loads and stores around it: out of order by some ten
 * nanoseconds, which is what ordering it would cost. */
static inline uint64_t clock_ticks(bool tsc)
{
#if defined(__x86_64__)
	if (tsc)
		return __builtin_ia32_rdtsc();
#else
	(void)tsc;
#endif
	return now_ns();
}
