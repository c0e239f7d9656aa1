/* Threads of the engine leave signals to the rest of the process. */
#pragma once
#include <pthread.h>
#include <signal.h>

/* Block what may be blocked, for this thread and those it starts. Not the signals that report what a thread itself did
 * wrong: where those are blocked they end the process, and the SIGBUS guard would never be asked. */
static inline void block_signals(sigset_t *previous)
{
	static const int synchronous[] = {SIGBUS, SIGSEGV, SIGFPE, SIGILL, SIGTRAP, SIGABRT, SIGSYS};
	sigset_t set;

	sigfillset(&set);
	for (unsigned i = 0; i < sizeof(synchronous) / sizeof(synchronous[0]); i++)
		sigdelset(&set, synchronous[i]);
	pthread_sigmask(SIG_BLOCK, &set, previous);
}
