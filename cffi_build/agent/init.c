/*
 * The guest's init at its start: PID 1 mounts file systems and shows the kernel's errors, then becomes init.sh, which
 * would start a process for each of these (kvmpass/initramfs).
 */
#include "process.h"
#include "text.h"

#include <asm/errno.h>

#define SCRIPT "/kvmpass/init.sh"
#define QUIET " quiet loglevel=3" /* kvmpass/boot/cmdline.py */
#define HOST_NAME "kvmpass"
/* Of syslog(2); the kernel's own header is not among those for programs (include/linux/syslog.h). */
#define SYSLOG_READ_ALL 3
#define SYSLOG_CONSOLE_LEVEL 8
#define SYSLOG_SIZE_BUFFER 10
#define ERRORS_TOO 4 /* console level: messages below it are printed */
#define ERROR_PREFIX "<3>"

static const struct {
	const char *place, *kind, *options;
	bool optional; /* not every kernel has it */
} mounts[] = {
	{"/dev", "devtmpfs", NULL, false},
	{"/dev/pts", "devpts", NULL, false},
	{"/dev/shm", "tmpfs", NULL, false},
	{"/proc", "proc", NULL, false},
	{"/sys", "sysfs", NULL, false},
	{"/tmp", "tmpfs", NULL, false},
	{"/run", "tmpfs", "mode=0755", false},
	{"/sys/kernel/debug", "debugfs", NULL, true},
	{"/sys/kernel/tracing", "tracefs", NULL, true},
};

/* Errors about what the guest lacks on purpose: ports for PCI (kvmpass/guest/options.py), AMD-V (kvmpass/boot/cpuid.py). */
static const char *const expected_errors[] = {
	"PCI: Fatal: No config space access function found",
	"kvm_amd: SVM not supported by CPU",
	NULL,
};

static const struct {
	const char *target, *path;
} links[] = {
	{"/proc/self/fd", "/dev/fd"}, {"fd/0", "/dev/stdin"}, {"fd/1", "/dev/stdout"}, {"fd/2", "/dev/stderr"},
};

static void mount_all(void)
{
	for (size_t at = 0; at < sizeof(mounts) / sizeof(*mounts); at++) {
		long error;

		call2(mkdir, mounts[at].place, 0755); /* those in /dev */
		error = call5(mount, mounts[at].kind, mounts[at].place, mounts[at].kind, 0, mounts[at].options);
		if (error < 0 && !mounts[at].optional) {
			say("kvmpass: ");
			say(mounts[at].place);
			say(" was not mounted");
			if (error == -ENODEV) {
				say(": the kernel has no ");
				say(mounts[at].kind);
			} else {
				say(", error ");
				say_number(-error);
			}
			say("\n");
		}
	}
	for (size_t at = 0; at < sizeof(links) / sizeof(*links); at++)
		call2(symlink, links[at].target, links[at].path);
}

/* Whether the command line has a level for the console after that of kvmpass. */
static bool level_is_chosen(void)
{
	static const char *const words[] = {" quiet ", " loglevel=", " debug ", " ignore_loglevel "};
	static char line[4096]; /* COMMAND_LINE_SIZE is 2048 */
	long fd = call3(open, "/proc/cmdline", 0, 0), got = 0;
	char *rest;

	if (fd >= 0) {
		got = call3(read, fd, line + 1, sizeof(line) - 3);
		call1(close, fd);
	}
	if (got <= 0)
		return false;
	line[0] = line[got] = ' '; /* the latter instead of the line's end */
	rest = after(line, QUIET);
	for (size_t at = 0; at < sizeof(words) / sizeof(*words); at++)
		if (after(rest ? rest : line, words[at]))
			return true;
	return false;
}

static bool is_expected(char *line)
{
	for (const char *const *at = expected_errors; *at; at++)
		if (after(line, *at))
			return true;
	return false;
}

/* Let the kernel print its errors, and print those from before, unless the user has chosen a level. */
static void show_errors(void)
{
	long size = call3(syslog, SYSLOG_SIZE_BUFFER, NULL, 0), got;
	char *at, *log = size > 0 ? reserve(size + 1) : NULL; /* the last byte stays zero */

	call3(syslog, SYSLOG_CONSOLE_LEVEL, NULL, ERRORS_TOO);
	if (!log)
		return;
	got = call3(syslog, SYSLOG_READ_ALL, log, size);
	for (at = log; got > 0 && at < log + got;) {
		char *line = at, *end = after(line, "\n");
		bool expected;

		if (!end)
			break;
		at = end;
		if (!begins(line, ERROR_PREFIX))
			continue;
		end[-1] = 0;
		expected = is_expected(line);
		end[-1] = '\n'; /* one write: each to the console takes some exits more than its bytes */
		line += length(ERROR_PREFIX);
		if (!expected)
			call3(write, 2, line, end - line);
	}
	call2(munmap, log, size + 1);
}

void start_init(char **arguments, char **environment)
{
	static char script[] = SCRIPT;
	long error;

	mount_all();
	call2(sethostname, HOST_NAME, sizeof(HOST_NAME) - 1);
	if (!level_is_chosen())
		show_errors();
	arguments[0] = script;
	error = call3(execve, script, arguments, environment);
	say("kvmpass: " SCRIPT " cannot be run, error ");
	say_number(-error);
	say("\n");
	call1(exit_group, 127); /* as PID 1: the kernel panics */
	__builtin_unreachable();
}
