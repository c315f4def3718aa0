/* A process that the host has started, and its streams. */
#pragma once

#include "frames.h"
#include "system.h"

struct stream_state {
	int fd; /* -1: closed */
	uint32_t credit; /* bytes that the host takes */
	long left; /* bytes to read before the end, once the process has ended; -1: to its own end */
	bool bulk; /* the last read has filled a frame */
};

struct process {
	uint32_t id; /* 0: none */
	int pid; /* 0: has ended, or was not started */
	bool terminal;
	struct stream_state streams[STREAMS]; /* INPUT: what the process reads, of a terminal the same descriptor */
	bool input_ended; /* the host sends no more */
	uint64_t deadline; /* in ms, of what processes that it has left behind still write; 0: none */
	uint8_t *input; /* a ring of INPUT_WINDOW bytes */
	uint32_t input_at, input_size;
	uint32_t consumed; /* bytes of input that the process has taken, and that are not granted again yet */
	uint8_t *start; /* what has arrived of START, MAX_START bytes */
	uint32_t start_size;
};

/* process.c: start what process->start describes, with the variables of the agent; 0, or the error. */
long start_process(struct process *process, char **environment);

/* --- init.c */

/* As PID 1: prepare the guest, and become the script of its init. */
__attribute__((noreturn)) void start_init(char **arguments, char **environment);

/* --- beside.c */

/* As PID 1: become the init of an initramfs of the user's. Returns in a child, once it has the port, its variables. */
char **leave_init(char **arguments, char **environment);
void follow_init(void); /* take the root of that init, which it may have changed; otherwise nothing */
void leave_root(void); /* go back: that init may want to unmount it */
void be_killable(void); /* in a process that it runs: no longer spared by the OOM killer */
extern bool beside; /* whether this is that child */

/* --- streams.c */

#define PORT 0 /* standard input */

struct outgoing {
	struct frame head;
	uint8_t data[MAX_FRAME - sizeof(struct frame)];
};

extern struct process processes[MAX_PROCESSES];
extern struct outgoing frame; /* its data is what send() sends */

uint64_t now(void); /* in ms since the guest has booted */
__attribute__((noreturn)) void end(bool failed); /* power off, or exit */
void send(uint32_t id, enum type type, enum stream stream, uint32_t size);
void send_numbers(uint32_t id, enum type type, enum stream stream, uint32_t first, uint32_t second);
void *reserve(size_t size); /* NULL: no memory */
struct process *find(uint32_t id); /* 0: a free one */
void forget(struct process *process);
void forget_if_ended(struct process *process);
void close_input(struct process *process);
void write_input(struct process *process);
void read_output(struct process *process, enum stream number);
void limit_output(struct process *process);
void make_staging(void);
void reap(void);
