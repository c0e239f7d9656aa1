/*
 * notifier.c: call and error fds.
 *
 * A write to an eventfd without O_NONBLOCK waits while the counter is full, which its owner can bring about at any
 * moment, and O_NONBLOCK is a property that both sides share, so it stays as it is. But the kernel itself never waits
 * when it signals an eventfd. So where a write might, the kernel is asked: an asynchronous read (io_submit) of an empty
 * file has ended at once, and its end signals the eventfd. That is slower than a write, and containers allow it.
 */
#include "notifier.h"
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

/* Reads whose results nobody has fetched yet. */
#define READS 32

bool notifier_may_wait(int fd)
{
	int flags = fd >= 0 ? fcntl(fd, F_GETFL) : O_NONBLOCK;

	return flags < 0 || !(flags & O_NONBLOCK);
}

void notifier_init(struct notifier *notifier)
{
	*notifier = (struct notifier){.file = memfd_create("vhostblk-notifier", MFD_CLOEXEC)};
	if (notifier->file >= 0 && syscall(SYS_io_setup, READS, &notifier->context))
		notifier->context = 0;
}

static void fetch_results(struct notifier *notifier)
{
	struct io_event events[READS];
	struct timespec at_once = {0};

	syscall(SYS_io_getevents, notifier->context, 0, READS, events, &at_once);
}

static void let_kernel_signal(struct notifier *notifier, int fd)
{
	struct iocb read = {
		.aio_lio_opcode = IOCB_CMD_PREAD,
		.aio_fildes = (uint32_t)notifier->file,
		.aio_flags = IOCB_FLAG_RESFD,
		.aio_resfd = (uint32_t)fd,
	};
	struct iocb *reads[] = {&read};

	/* What is no eventfd is not signalled: it is not what vhost-user wants there. */
	if (syscall(SYS_io_submit, notifier->context, 1, reads) < 0 && errno == EAGAIN) {
		fetch_results(notifier);
		syscall(SYS_io_submit, notifier->context, 1, reads);
	}
}

static void write_one(int fd)
{
	uint64_t one = 1;
	ssize_t ignored = write(fd, &one, sizeof(one));

	/* A full counter is EAGAIN: it has been signalled as much as can be. */
	(void)ignored;
}

static bool has_room(int fd)
{
	struct pollfd writable = {.fd = fd, .events = POLLOUT};

	return poll(&writable, 1, 0) == 1 && writable.revents & POLLOUT;
}

void notifier_signal(struct notifier *notifier, int fd, bool may_wait)
{
	if (!may_wait)
		write_one(fd);
	else if (!has_room(fd))
		return; /* the kernel would signal it all the same, but the counter would overflow */
	else if (notifier->context)
		let_kernel_signal(notifier, fd);
	else
		write_one(fd); /* a kernel without io_submit: the fd may have been filled since the look */
}

void notifier_deinit(struct notifier *notifier)
{
	if (notifier->context)
		syscall(SYS_io_destroy, notifier->context);
	if (notifier->file >= 0)
		close(notifier->file);
}
