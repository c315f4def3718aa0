/* The protocol between the host and the agent. kvmpass/guest/frames.py describes it, and has the same numbers. */
#pragma once

#include <stdint.h>

#define VERSION 2
#define MAX_FRAME 32768 /* bytes with the header: what Linux copies into one buffer of a port */
#define MAX_DATA 65536 /* bytes of DATA from here: what a pipe has room for */
#define MAX_START 1048576
#define MAX_PROCESSES 65
#define INPUT_WINDOW 131072

enum type {
	START = 1, DATA = 2, END = 3, CREDIT = 4, SIGNAL = 5, RESIZE = 6, PING = 7, POWER_OFF = 8,
	HELLO = 16, FAILURE = 17, READY = 18, EXITED = 19, REFUSED = 20, PONG = 21,
};

enum stream { INPUT = 0, OUTPUT = 1, ERRORS = 2, STATUS = 3, STREAMS = 4 };

enum stage { SET_UP = 0, CHANGE_ROOT = 1, CHANGE_DIRECTORY = 2, EXECUTE = 3 };

#define WITH_INPUT 1
#define WITH_TERMINAL 2
#define WITH_ERRORS_IN_OUTPUT 4

struct frame {
	uint32_t size; /* of what follows the header */
	uint32_t id;
	uint8_t type;
	uint8_t stream; /* of START: whether more of it follows */
	uint16_t unused;
};

struct start {
	uint32_t flags;
	uint32_t window; /* bytes of each stream that the host takes before it grants more */
	uint16_t rows, columns;
	uint32_t arguments, variables;
	/* Strings, each with its zero: root, directory, arguments, variables. */
};
