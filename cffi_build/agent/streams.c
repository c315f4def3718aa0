/* The streams of the processes, and what the host is told of them. */
#include "process.h"

#include <asm/errno.h>
#include <asm/ioctls.h>
#include <asm/poll.h>
#include <linux/fcntl.h>
#include <linux/mman.h>
#include <linux/reboot.h>
#include <linux/time.h>
#include <linux/wait.h>

#define INPUT_GRANT (INPUT_WINDOW / 2) /* bytes granted at once, or all once nothing waits */
#define LEFT_BEHIND_MS 300 /* for what processes still write that a process has left behind */
#define STAGING_SIZE 131072 /* bytes, of twice as many pages as DATA has: one is for the header */
#define SPLICE_NONBLOCK 2 /* SPLICE_F_NONBLOCK (include/linux/splice.h) */
#define TERMINAL_BUFFERS 32768 /* bytes, more than a terminal has: the kernel limits them to 4 and 8 KiB */

struct process processes[MAX_PROCESSES];

void *memcpy(void *to, const void *from, size_t size)
{
	void *at = to;

	__asm__ volatile("rep movsb" : "+D"(at), "+S"(from), "+c"(size) : : "memory");
	return to;
}

void *memset(void *to, int byte, size_t size)
{
	void *at = to;

	__asm__ volatile("rep stosb" : "+D"(at), "+c"(size) : "a"(byte) : "memory");
	return to;
}

uint64_t now(void)
{
	struct __kernel_timespec time;

	call2(clock_gettime, CLOCK_BOOTTIME, &time);
	return time.tv_sec * 1000ull + time.tv_nsec / 1000000;
}

void end(bool failed)
{
	/* Beside another init: only if the host wants it, as that init may do without an agent. */
	if (call0(getpid) == 1 || (beside && !failed)) {
		call0(sync);
		call4(reboot, LINUX_REBOOT_MAGIC1, LINUX_REBOOT_MAGIC2, LINUX_REBOOT_CMD_POWER_OFF, NULL);
	}
	for (;;)
		call1(exit_group, failed);
}

/* --- to the host */

struct outgoing frame; /* one write each: that is one buffer of the port */

/* Whether to try again, after waiting for room: the port does not block, to be read until it is empty. */
static bool wait_for_port(long result)
{
	struct pollfd polled = {.fd = PORT, .events = POLLOUT};

	if (result == -EAGAIN)
		call3(poll, &polled, 1, -1);
	return result == -EAGAIN || result == -EINTR;
}

void send(uint32_t id, enum type type, enum stream stream, uint32_t size)
{
	const uint8_t *at = (const uint8_t *)&frame;
	size_t left = sizeof(frame.head) + size;

	frame.head = (struct frame){size, id, type, stream, 0};
	while (left) {
		long done = call3(write, PORT, at, left);

		if (wait_for_port(done))
			continue;
		if (done <= 0)
			end(true);
		at += done;
		left -= done;
	}
}

void send_numbers(uint32_t id, enum type type, enum stream stream, uint32_t first, uint32_t second)
{
	const uint32_t numbers[] = {first, second};

	memcpy(frame.data, numbers, sizeof(numbers));
	send(id, type, stream, sizeof(numbers));
}

/* --- from a pipe to the host, whose driver of the port takes the pages as they are */

static struct { int read, write; } staging = {-1, -1}; /* a pipe of the agent's own, empty between frames */

void make_staging(void)
{
	if (call2(pipe2, &staging, O_CLOEXEC | O_NONBLOCK) < 0)
		return;
	if (call3(fcntl, staging.write, F_SETPIPE_SZ, STAGING_SIZE) < STAGING_SIZE)
		staging.write = -1; /* everything is copied */
}

/* Send what is in the staging pipe, behind a header that does not count, as frames of their own. */
static void copy_staged(uint32_t id, enum stream number, size_t size)
{
	call3(read, staging.read, &frame.head, sizeof(frame.head));
	while (size) {
		long done = call3(read, staging.read, frame.data, size < sizeof(frame.data) ? size : sizeof(frame.data));

		if (done <= 0)
			end(true);
		size -= done;
		send(id, DATA, number, done);
	}
}

/* Move what a pipe has into one frame; 0 if that is too little, or the port takes no pages. */
static uint32_t splice_output(struct process *process, enum stream number)
{
	struct stream_state *stream = &process->streams[number];
	struct frame head = {.id = process->id, .type = DATA, .stream = number};
	uint32_t size = 0, moved = 0, left;
	long done;

	if (staging.write < 0 || call3(ioctl, stream->fd, FIONREAD, &size) < 0)
		return 0;
	size = size < MAX_DATA ? size : MAX_DATA;
	size = size < stream->credit ? size : stream->credit;
	if (size <= sizeof(frame.data))
		return 0;
	head.size = size;
	call3(write, staging.write, &head, sizeof(head));
	while (moved < size) {
		done = call6(splice, stream->fd, NULL, staging.write, NULL, size - moved, SPLICE_NONBLOCK);
		if (done <= 0) /* something else has read it, or it is in more buffers than there is room for */
			break;
		moved += done;
	}
	for (left = sizeof(head) + moved; left && moved == size; left -= done) {
		done = call6(splice, staging.read, NULL, PORT, NULL, left, 0);
		if (wait_for_port(done))
			done = 0;
		else if (done < 0 && left == sizeof(head) + moved) { /* nothing was taken: -ENOMEM, say, which may pass */
			if (done == -EINVAL)
				staging.write = -1; /* a port that takes no pages */
			break;
		} else if (done <= 0) /* 0: its driver has dropped what it took (drivers/char/virtio_console.c) */
			end(true);
	}
	if (left)
		copy_staged(process->id, number, moved);
	return moved;
}

/* --- processes */

void *reserve(size_t size)
{
	long at = call5(mmap, NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1);

	return at < 0 && at > -4096 ? NULL : (void *)at;
}

struct process *find(uint32_t id)
{
	for (struct process *process = processes; process < processes + MAX_PROCESSES; process++)
		if (process->id == id)
			return process;
	return NULL;
}

void forget(struct process *process)
{
	if (process->start)
		call2(munmap, process->start, MAX_START);
	if (process->input)
		call2(munmap, process->input, INPUT_WINDOW);
	memset(process, 0, sizeof(*process));
}

static void close_stream(struct process *process, enum stream number)
{
	struct stream_state *stream = &process->streams[number];

	if (stream->fd < 0)
		return;
	if (!(process->terminal && (number == INPUT || number == OUTPUT) &&
	      process->streams[INPUT + OUTPUT - number].fd >= 0)) /* of a terminal the last one closes both */
		call1(close, stream->fd);
	stream->fd = -1;
	send(process->id, END, number, 0);
}

void forget_if_ended(struct process *process)
{
	if (!process->id || process->pid || process->start)
		return;
	for (int number = OUTPUT; number < STREAMS; number++)
		if (process->streams[number].fd >= 0)
			return;
	close_stream(process, INPUT);
	forget(process);
}

/* A pipe that was full takes a page at a time: a grant for each would be a frame each way for each page. */
static void grant_input(struct process *process)
{
	if (!process->consumed || (process->input_size && process->consumed < INPUT_GRANT))
		return;
	send_numbers(process->id, CREDIT, INPUT, process->consumed, 0);
	process->consumed = 0;
}

void close_input(struct process *process)
{
	process->input_at = process->input_size = 0;
	close_stream(process, INPUT);
}

void write_input(struct process *process)
{
	while (process->input_size) {
		uint32_t size = INPUT_WINDOW - process->input_at;
		long done;

		if (size > process->input_size)
			size = process->input_size;
		done = call3(write, process->streams[INPUT].fd, process->input + process->input_at, size);
		if (done == -EAGAIN)
			break;
		if (done <= 0) { /* nobody reads it */
			close_input(process);
			return;
		}
		process->input_at = (process->input_at + done) % INPUT_WINDOW;
		process->input_size -= done;
		process->consumed += done;
	}
	grant_input(process);
	if (process->input_ended && !process->input_size)
		close_input(process);
}

static bool readable(int fd)
{
	struct pollfd polled = {.fd = fd, .events = POLLIN};

	return call3(poll, &polled, 1, 0) > 0 && polled.revents & POLLIN;
}

void read_output(struct process *process, enum stream number)
{
	struct stream_state *stream = &process->streams[number];
	size_t size = sizeof(frame.data);
	long done = 0;

	/* Once what is left is counted it is read: a splice could take more. */
	if (stream->bulk && stream->left < 0 && (done = splice_output(process, number))) {
		stream->credit -= done;
		return;
	}
	if (size > stream->credit)
		size = stream->credit;
	if (stream->left >= 0 && size > (size_t)stream->left)
		size = stream->left;
	if (size)
		done = call3(read, stream->fd, frame.data, size);
	if (done == -EAGAIN || done == -EINTR)
		return;
	if (done <= 0) { /* of a terminal the end is EIO */
		close_stream(process, number);
		return;
	}
	stream->credit -= done;
	if (stream->left >= 0)
		stream->left -= done;
	send(process->id, DATA, number, done);
	stream->bulk = done == sizeof(frame.data);
	/* What holds it open may be silent: poll would not report the end. */
	if (!stream->left || (stream->left > 0 && !readable(stream->fd)))
		close_stream(process, number);
}

/* What processes that it has left behind have written until now is the rest. */
void limit_output(struct process *process)
{
	process->deadline = 0;
	for (int number = OUTPUT; number < STREAMS; number++) {
		struct stream_state *stream = &process->streams[number];
		struct pollfd polled = {.fd = stream->fd};
		int size = 0;

		if (stream->fd < 0)
			continue;
		/* No process has left it open: it is read to its end. */
		if (call3(poll, &polled, 1, 0) > 0 && polled.revents & POLLHUP)
			continue;
		/* Of a terminal FIONREAD counts 4 KiB at most: the rest comes when that is read. */
		if (!process->terminal)
			call3(ioctl, stream->fd, FIONREAD, &size);
		else if (readable(stream->fd))
			size = TERMINAL_BUFFERS;
		stream->left = size;
		if (!size)
			close_stream(process, number);
	}
	forget_if_ended(process);
}

void reap(void)
{
	int status, pid;

	while ((pid = call4(wait4, -1, &status, WNOHANG, NULL)) > 0) {
		for (struct process *process = processes; process < processes + MAX_PROCESSES; process++) {
			if (process->pid != pid)
				continue;
			process->pid = 0;
			process->deadline = now() + LEFT_BEHIND_MS;
			/* As wait(2): the signal, or the exit status. */
			send_numbers(process->id, EXITED, 0, status & 0x7f, status >> 8 & 0xff);
			break;
		}
	}
}
