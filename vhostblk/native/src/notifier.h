/* Signalling eventfds of a front-end without ever waiting for it. */
#pragma once
#include <linux/aio_abi.h>
#include "common.h"

/* One per thread. */
struct notifier {
	aio_context_t context; /* 0: not to be had */
	int file;              /* empty */
};

/* Whether a write to the fd may wait: it is without O_NONBLOCK. -1 is fine. */
bool notifier_may_wait(int fd);
void notifier_init(struct notifier *notifier);
void notifier_deinit(struct notifier *notifier);
void notifier_signal(struct notifier *notifier, int fd, bool may_wait);
