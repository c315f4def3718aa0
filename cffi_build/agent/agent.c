/*
 * The agent: a program of the guest that runs processes for the host, over standard input, a port of a virtio console.
 *
 * Each argument is a failure to report. If the first is "-", the guest is unusable: the agent reports, and powers off.
 * By other names it is the guest's init at its start (init.c), or beside the init of another initramfs (beside.c).
 * One thread waits for the port and for all processes. What a process writes is read as far as the host has granted,
 * so that one whose reader stalls waits alone; what the host may send is limited by what each process can take.
 */
#include "process.h"
#include "text.h"

#include <asm/errno.h>
#include <asm/ioctls.h>
#include <asm/poll.h>
#include <asm/signal.h>
#include <asm/termios.h>
#include <linux/fcntl.h>
#include <linux/sched.h>
#include <linux/sched/types.h>
#include <linux/signalfd.h>

#define SIGNAL_BIT(number) (1ull << ((number)-1))

static char **environment;
static int children; /* readable when a child has ended */

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
		follow_init();
		error = start_process(process, environment);
		leave_root();
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
	if (!process->input_size) { /* most of it does not wait */
		long done = call3(write, process->streams[INPUT].fd, data, size);

		if (done > 0) {
			process->consumed += done;
			data += done;
			size -= done;
		}
	}
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

	do { /* a read returns one buffer of the port, a page */
		long done = call3(read, PORT, input + size, sizeof(input) - size);

		if (done == -EAGAIN || done == -EINTR)
			break;
		if (done <= 0)
			end(true);
		size += done;
	} while (size < sizeof(input));
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
	if (call0(getpid) == 1 && equal(arguments[0], "/init"))
		start_init(arguments, environment);
	if (call0(getpid) == 1 && equal(arguments[0], "/kvmpass/beside")) {
		environment = leave_init(arguments, environment);
		count = 1; /* the others are that init's */
		unusable = false;
	}
	/* Before all others: what is in a pipe when the kernel crashes is lost. Without it only slower. */
	call3(sched_setscheduler, 0, SCHED_FIFO | SCHED_RESET_ON_FORK, &first);
	call4(rt_sigprocmask, SIG_SETMASK, &blocked, NULL, sizeof(blocked));
	children = call4(signalfd4, -1, &child, sizeof(child), O_CLOEXEC | O_NONBLOCK);
	call3(fcntl, PORT, F_SETFL, call2(fcntl, PORT, F_GETFL) | O_NONBLOCK);
	make_staging();
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
