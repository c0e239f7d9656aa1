/* Contains the SIGBUS of a front-end that truncates the memory file it shares with us. */
#pragma once
#include "common.h"

/* Put [address, address + size) under guard; the same range may be added several times. Slot or -errno.
 * Context: any thread. */
int sigbus_guard_add(uint64_t address, uint64_t size);
void sigbus_guard_remove(int slot);

/* Whether an access to the range has faulted since it came under guard. Context: any thread. */
bool sigbus_guard_faulted(int slot);

/* Grows whenever any guarded range faults: a cheap way to learn that nothing has. Context: any thread. */
uint32_t sigbus_faults(void);
