/* From the description of a process to its start. */
#include "process.h"

#include <asm/errno.h>
#include <asm/ioctls.h>
#include <asm/signal.h>
#include <asm/termios.h>
#include <linux/fcntl.h>
#include <linux/mman.h>

#define MAX_ARGUMENTS 65536

struct ends { int read, write; };

static long make_pipe(struct ends *ends)
{
	ends->read = ends->write = -1;
	return call2(pipe2, ends, O_CLOEXEC);
}

static void close_end(int fd)
{
	if (fd >= 0)
		call1(close, fd);
}

static bool same_variable(const char *a, const char *b)
{
	for (; *a == *b; a++, b++)
		if (!*a || *a == '=')
			return true;
	return false;
}

static const char *variable(char **environment, const char *name)
{
	for (; *environment; environment++)
		if (same_variable(*environment, name))
			return *environment + length(name);
	return "";
}

/* As execvpe(3): a name without a slash is searched in PATH, and a text without a first line of #! is a script. */
static long execute(const char *name, char **arguments, char **environment)
{
	static char path[4096];
	const char *places = variable(environment, "PATH=");
	long error = -ENOENT, result;
	bool search = *name != 0;

	for (const char *at = name; *at; at++)
		search = search && *at != '/';
	do {
		size_t size = 0;

		if (search) {
			for (; *places && *places != ':'; places++)
				if (size < sizeof(path) / 2)
					path[size++] = *places;
			if (size)
				path[size++] = '/';
		}
		if (size + length(name) >= sizeof(path))
			return -ENAMETOOLONG;
		memcpy(path + size, name, length(name) + 1);
		result = call3(execve, path, arguments, environment);
		if (result == -ENOEXEC) {
			arguments[-1] = "sh";
			arguments[0] = path;
			return call3(execve, "/bin/sh", arguments - 1, environment);
		}
		if (result != -ENOENT && result != -ENOTDIR)
			error = result;
	} while (search && *places++);
	return error;
}

/* Return the next string of what is left, NULL if there is none. */
static char *next(char **at, char *end)
{
	char *text = *at;

	for (char *c = text; c < end; c++)
		if (!*c) {
			*at = c + 1;
			return text;
		}
	return NULL;
}

/* In the child: return the stage that has failed, and its error. */
static enum stage become(struct process *process, char **environment, long *error)
{
	static char *arguments[MAX_ARGUMENTS + 2], *variables[MAX_ARGUMENTS + 1];
	struct start *start = (struct start *)process->start;
	char *at = (char *)(start + 1), *end = (char *)process->start + process->start_size;
	char *root = next(&at, end), *directory = root ? next(&at, end) : NULL;
	uint32_t count = 0;

	*error = -E2BIG;
	if (start->arguments > MAX_ARGUMENTS || start->variables > MAX_ARGUMENTS)
		return EXECUTE;
	*error = -EINVAL;
	if (!directory || !start->arguments)
		return SET_UP;
	for (uint32_t number = 0; number < start->arguments; number++) /* the first place is for an interpreter */
		if (!(arguments[1 + number] = next(&at, end)))
			return SET_UP;
	for (; count < start->variables; count++)
		if (!(variables[count] = next(&at, end)))
			return SET_UP;
	for (; *environment && count < MAX_ARGUMENTS; environment++) {
		bool replaced = false;

		for (uint32_t number = 0; number < start->variables; number++)
			replaced = replaced || same_variable(variables[number], *environment);
		if (!replaced)
			variables[count++] = *environment;
	}
	if (*root && ((*error = call1(chroot, root)) < 0 || (*error = call1(chdir, "/")) < 0))
		return CHANGE_ROOT;
	if (*directory && (*error = call1(chdir, directory)) < 0)
		return CHANGE_DIRECTORY;
	*error = execute(arguments[1], arguments + 1, variables);
	return EXECUTE;
}

static void child(struct process *process, char **environment, const int fds[STREAMS])
{
	uint64_t none = 0;
	int32_t report[2];
	long error;

	call0(setsid);
	be_killable();
	if (process->terminal)
		call3(ioctl, fds[INPUT], TIOCSCTTY, 0);
	for (int number = INPUT; number <= ERRORS; number++)
		call2(dup2, fds[number], number);
	call4(rt_sigprocmask, SIG_SETMASK, &none, NULL, sizeof(none));
	report[0] = become(process, environment, &error);
	report[1] = -error;
	call3(write, fds[STATUS], report, sizeof(report));
	call1(exit_group, 127);
}

static void non_blocking(int fd)
{
	if (fd >= 0)
		call3(fcntl, fd, F_SETFL, call2(fcntl, fd, F_GETFL) | O_NONBLOCK);
}

static long open_terminal(struct start *start, int *user)
{
	struct winsize size = {.ws_row = start->rows, .ws_col = start->columns};
	int locked = 0;
	long fd = call3(open, "/dev/ptmx", O_RDWR | O_NOCTTY | O_CLOEXEC, 0);

	if (fd < 0)
		return fd;
	call3(ioctl, fd, TIOCSPTLCK, &locked);
	call3(ioctl, fd, TIOCSWINSZ, &size);
	*user = call3(ioctl, fd, TIOCGPTPEER, O_RDWR | O_NOCTTY | O_CLOEXEC);
	if (*user >= 0)
		return fd;
	close_end(fd);
	return *user;
}

long start_process(struct process *process, char **environment)
{
	struct start *start = (struct start *)process->start;
	struct ends input = {-1, -1}, output = {-1, -1}, errors = {-1, -1}, status = {-1, -1};
	int user = -1;
	long error, pid = -EINVAL;

	if (process->start_size < sizeof(*start))
		return -EINVAL;
	process->terminal = start->flags & WITH_TERMINAL;
	if ((error = make_pipe(&status)) < 0)
		return error;
	if (process->terminal) {
		if ((error = output.read = input.write = open_terminal(start, &user)) < 0)
			input.write = output.read = -1;
	} else {
		if (start->flags & WITH_INPUT)
			error = make_pipe(&input);
		else
			error = input.read = call3(open, "/dev/null", O_RDWR | O_CLOEXEC, 0);
		if (error >= 0 && (error = make_pipe(&output)) >= 0 && !(start->flags & WITH_ERRORS_IN_OUTPUT))
			error = make_pipe(&errors);
	}
	if (error >= 0) {
		const int fds[STREAMS] = {
			process->terminal ? user : input.read, process->terminal ? user : output.write,
			process->terminal ? user : errors.write >= 0 ? errors.write : output.write, status.write,
		};

		pid = error = call5(clone, SIGCHLD, 0, 0, 0, 0);
		if (pid == 0)
			child(process, environment, fds);
	}
	close_end(input.read);
	close_end(output.write);
	close_end(errors.write);
	close_end(status.write);
	close_end(user);
	if (error < 0) {
		close_end(input.write);
		close_end(errors.read);
		close_end(status.read);
		if (output.read != input.write)
			close_end(output.read);
		return error;
	}
	non_blocking(input.write);
	non_blocking(output.read);
	non_blocking(errors.read);
	non_blocking(status.read);
	process->pid = pid;
	process->streams[INPUT] = (struct stream_state){input.write, 0, -1, false};
	process->streams[OUTPUT] = (struct stream_state){output.read, start->window, -1, false};
	process->streams[ERRORS] = (struct stream_state){errors.read, start->window, -1, false};
	/* One byte more than the report: at 0 its end would not be seen. */
	process->streams[STATUS] = (struct stream_state){status.read, 2 * sizeof(int32_t) + 1, -1, false};
	return 0;
}
