/*
 * The agent: a program of the guest that runs processes for the host, over standard input, a port of a virtio console.
 *
 * Each argument is a failure to report. If the first is "-", the guest is unusable: the agent reports, and powers off.
 * One thread waits for the port and for all processes. What a process writes is read as far as the host has granted,
 * so that one whose reader stalls waits alone; what the host may send is limited by what each process can take.
 */
#include "process.h"

#include <asm/errno.h>
#include <asm/ioctls.h>
#include <asm/poll.h>
#include <asm/signal.h>
#include <asm/termios.h>
#include <linux/fcntl.h>
#include <linux/mman.h>
#include <linux/reboot.h>
#include <linux/sched.h>
#include <linux/sched/types.h>
#include <linux/signalfd.h>
#include <linux/time.h>
#include <linux/wait.h>

#define PORT 0
#define LEFT_BEHIND_MS 300 /* for what processes still write that a process has left behind */
#define SIGNAL_BIT(number) (1ull << ((number)-1))

static struct process processes[MAX_PROCESSES];
static char **environment;
static int children; /* readable when a child has ended */

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

static uint64_t now(void)
{
	struct __kernel_timespec time;

	call2(clock_gettime, CLOCK_BOOTTIME, &time);
	return time.tv_sec * 1000ull + time.tv_nsec / 1000000;
}

static __attribute__((noreturn)) void end(bool failed)
{
	if (call0(getpid) == 1) {
		call0(sync);
		call4(reboot, LINUX_REBOOT_MAGIC1, LINUX_REBOOT_MAGIC2, LINUX_REBOOT_CMD_POWER_OFF, NULL);
	}
	for (;;)
		call1(exit_group, failed);
}

/* --- to the host */

static struct {
	struct frame head;
	uint8_t data[MAX_FRAME - sizeof(struct frame)];
} frame; /* one write each: that is one buffer of the port */

static void send(uint32_t id, enum type type, enum stream stream, uint32_t size)
{
	const uint8_t *at = (const uint8_t *)&frame;
	size_t left = sizeof(frame.head) + size;

	frame.head = (struct frame){size, id, type, stream, 0};
	while (left) {
		long done = call3(write, PORT, at, left);

		if (done == -EINTR || done == -EAGAIN)
			continue;
		if (done <= 0)
			end(true);
		at += done;
		left -= done;
	}
}

static void send_numbers(uint32_t id, enum type type, enum stream stream, uint32_t first, uint32_t second)
{
	const uint32_t numbers[] = {first, second};

	memcpy(frame.data, numbers, sizeof(numbers));
	send(id, type, stream, sizeof(numbers));
}

/* --- processes */

static void *reserve(size_t size)
{
	long at = call5(mmap, NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1);

	return at < 0 && at > -4096 ? NULL : (void *)at;
}

static struct process *find(uint32_t id)
{
	for (struct process *process = processes; process < processes + MAX_PROCESSES; process++)
		if (process->id == id)
			return process;
	return NULL;
}

static void forget(struct process *process)
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

static void forget_if_ended(struct process *process)
{
	if (!process->id || process->pid || process->start)
		return;
	for (int number = OUTPUT; number < STREAMS; number++)
		if (process->streams[number].fd >= 0)
			return;
	close_stream(process, INPUT);
	forget(process);
}

static void grant_input(struct process *process, uint32_t size)
{
	if (size)
		send_numbers(process->id, CREDIT, INPUT, size, 0);
}

static void close_input(struct process *process)
{
	process->input_at = process->input_size = 0;
	close_stream(process, INPUT);
}

static void write_input(struct process *process)
{
	uint32_t granted = 0;

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
		granted += done;
	}
	grant_input(process, granted);
	if (process->input_ended && !process->input_size)
		close_input(process);
}

static void read_output(struct process *process, enum stream number)
{
	struct stream_state *stream = &process->streams[number];
	size_t size = sizeof(frame.data);
	long done = 0;

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
}

/* What processes that it has left behind have written until now is the rest. */
static void limit_output(struct process *process)
{
	process->deadline = 0;
	for (int number = OUTPUT; number < STREAMS; number++) {
		struct stream_state *stream = &process->streams[number];
		int size = 0;

		if (stream->fd < 0)
			continue;
		call3(ioctl, stream->fd, FIONREAD, &size);
		stream->left = size;
		if (!size)
			close_stream(process, number);
	}
	forget_if_ended(process);
}

static void reap(void)
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

/* --- from the host */

static void refuse(struct process *process, uint32_t id, long error)
{
	send_numbers(id, REFUSED, 0, -error, 0);
	if (process)
		forget(process);
}

static void on_start(uint32_t id, bool more, const uint8_t *data, uint32_t size)
{
	struct process *process = find(id);
	long error;

	if (!process) {
		if (!(process = find(0))) {
			refuse(NULL, id, -EAGAIN);
			return;
		}
		process->id = id;
		process->start = reserve(MAX_START);
		process->input = reserve(INPUT_WINDOW);
		for (int number = 0; number < STREAMS; number++)
			process->streams[number].fd = -1;
	}
	if (!process->start || !process->input)
		error = -ENOMEM;
	else if (size > MAX_START - process->start_size)
		error = -E2BIG;
	else {
		memcpy(process->start + process->start_size, data, size);
		process->start_size += size;
		if (more)
			return;
		error = start_process(process, environment);
	}
	if (error < 0) {
		refuse(process, id, error);
		return;
	}
	call2(munmap, process->start, MAX_START);
	process->start = NULL;
}

static void on_input(struct process *process, const uint8_t *data, uint32_t size)
{
	if (process->streams[INPUT].fd < 0)
		return;
	if (size > INPUT_WINDOW - process->input_size) /* more than was granted */
		end(true);
	while (size) {
		uint32_t at = (process->input_at + process->input_size) % INPUT_WINDOW, part = INPUT_WINDOW - at;

		if (part > size)
			part = size;
		memcpy(process->input + at, data, part);
		process->input_size += part;
		data += part;
		size -= part;
	}
	write_input(process);
}

static void on_frame(const struct frame *head, const uint8_t *data)
{
	struct process *process = head->id ? find(head->id) : NULL;
	uint32_t number = 0;

	if (head->size >= sizeof(number))
		memcpy(&number, data, sizeof(number));
	switch (head->type) {
	case START:
		if (head->id && (!process || process->start))
			on_start(head->id, head->stream, data, head->size);
		return;
	case PING:
		send(head->id, PONG, 0, 0);
		return;
	case POWER_OFF:
		end(false);
	default:
		break;
	}
	if (!process || process->start) /* it has ended meanwhile */
		return;
	switch (head->type) {
	case DATA:
		on_input(process, data, head->size);
		break;
	case END:
		process->input_ended = true;
		if (!process->input_size && !process->terminal)
			close_input(process);
		break;
	case CREDIT:
		if (head->stream == OUTPUT || head->stream == ERRORS)
			process->streams[head->stream].credit += number;
		break;
	case SIGNAL:
		/* Its group, or before it has made one, the process itself. */
		if (process->pid && call2(kill, -process->pid, number) < 0)
			call2(kill, process->pid, number);
		break;
	case RESIZE:
		if (process->terminal && process->streams[OUTPUT].fd >= 0) {
			struct winsize size = {.ws_row = number, .ws_col = number >> 16};

			call3(ioctl, process->streams[OUTPUT].fd, TIOCSWINSZ, &size);
		}
		break;
	default:
		break;
	}
}

static void read_port(void)
{
	static uint8_t input[2 * MAX_FRAME];
	static uint32_t size;
	uint32_t at = 0;
	struct frame head;
	long done = call3(read, PORT, input + size, sizeof(input) - size);

	if (done == -EAGAIN || done == -EINTR)
		return;
	if (done <= 0)
		end(true);
	size += done;
	while (size - at >= sizeof(head)) {
		memcpy(&head, input + at, sizeof(head));
		if (head.size > MAX_FRAME - sizeof(head))
			end(true);
		if (size - at < sizeof(head) + head.size)
			break;
		on_frame(&head, input + at + sizeof(head));
		at += sizeof(head) + head.size;
	}
	size -= at;
	memcpy(input, input + at, size); /* forwards, to a lower address: they may overlap */
}

/* --- the loop */

static void wait_and_serve(void)
{
	static struct pollfd polled[2 + MAX_PROCESSES * STREAMS];
	struct pollfd *at = polled + 2;
	uint64_t time = now();
	int timeout = -1;

	polled[0] = (struct pollfd){.fd = PORT, .events = POLLIN};
	polled[1] = (struct pollfd){.fd = children, .events = POLLIN};
	for (struct process *process = processes; process < processes + MAX_PROCESSES; process++) {
		for (int number = 0; number < STREAMS; number++, at++) {
			struct stream_state *stream = &process->streams[number];
			bool wanted = process->id && (number == INPUT ? process->input_size : stream->credit);

			/* Without a descriptor: poll reports the other end's close always. */
			*at = (struct pollfd){.fd = wanted ? stream->fd : -1, .events = number ? POLLIN : POLLOUT};
		}
		if (process->deadline) {
			int left = process->deadline > time ? process->deadline - time : 0;

			timeout = timeout < 0 || left < timeout ? left : timeout;
		}
	}
	if (call3(poll, polled, at - polled, timeout) < 0)
		return;
	/* Output first: what a process has written comes before its end. */
	at = polled + 2;
	for (struct process *process = processes; process < processes + MAX_PROCESSES; process++)
		for (int number = 0; number < STREAMS; number++, at++) {
			if (!at->revents || process->streams[number].fd < 0)
				continue;
			if (number == INPUT)
				write_input(process);
			else
				read_output(process, number);
		}
	if (polled[1].revents) {
		struct signalfd_siginfo information;

		call3(read, children, &information, sizeof(information));
		reap();
	}
	if (polled[0].revents)
		read_port();
	time = now();
	for (struct process *process = processes; process < processes + MAX_PROCESSES; process++) {
		if (process->deadline && process->deadline <= time)
			limit_output(process);
		forget_if_ended(process);
	}
}

static __attribute__((noreturn, used)) void run(long *stack)
{
	const uint64_t blocked = SIGNAL_BIT(SIGCHLD) | SIGNAL_BIT(SIGPIPE), child = SIGNAL_BIT(SIGCHLD);
	const struct sched_param first = {.sched_priority = 1};
	long count = stack[0];
	char **arguments = (char **)(stack + 1);
	bool unusable = count > 1 && arguments[1][0] == '-' && !arguments[1][1];

	environment = arguments + count + 1;
	/* Before all others: what is in a pipe when the kernel crashes is lost. Without it only slower. */
	call3(sched_setscheduler, 0, SCHED_FIFO | SCHED_RESET_ON_FORK, &first);
	call4(rt_sigprocmask, SIG_SETMASK, &blocked, NULL, sizeof(blocked));
	children = call4(signalfd4, -1, &child, sizeof(child), O_CLOEXEC | O_NONBLOCK);
	send_numbers(0, HELLO, 0, VERSION, now());
	for (long number = 1 + unusable; number < count; number++) {
		size_t size = length(arguments[number]);

		size = size < sizeof(frame.data) ? size : sizeof(frame.data);
		memcpy(frame.data, arguments[number], size);
		send(0, FAILURE, 0, size);
	}
	if (unusable || children < 0)
		end(true);
	send(0, READY, 0, 0);
	for (;;)
		wait_and_serve();
}

__asm__(".globl _start\n"
	"_start:\n"
	"	xor %ebp, %ebp\n"
	"	mov %rsp, %rdi\n"
	"	and $-16, %rsp\n"
	"	call run\n");
