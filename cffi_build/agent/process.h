/* A process that the host has started, and its streams. */
#pragma once

#include "frames.h"
#include "system.h"

struct stream_state {
	int fd; /* -1: closed */
	uint32_t credit; /* bytes that the host takes */
	long left; /* bytes to read before the end, once the process has ended; -1: to its own end */
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
	uint8_t *start; /* what has arrived of START, MAX_START bytes */
	uint32_t start_size;
};

/* Start what process->start describes, with the variables of the agent; 0, or the error. */
long start_process(struct process *process, char **environment);
