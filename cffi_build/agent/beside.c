/*
 * The agent beside the init of an initramfs that is the user's own (kvmpass/initramfs/beside.py). The kernel starts
 * this program as PID 1: it becomes that init, and leaves a child, the agent, which needs nothing of that file system.
 */
#include "process.h"
#include "text.h"

#include <asm/errno.h>
#include <asm/signal.h>
#include <linux/fcntl.h>
#include <linux/mount.h>
#include <linux/time.h>

#define PLACE "/kvmpass/mount" /* a directory */
#define MODULE "/kvmpass/modules/00" /* numbered in the order in which they are loaded */
#define INIT "/kvmpass/init" /* a symlink */
#define PORT_NAME "kvmpass.agent\n"
#define MNT_DETACH 2
#define LOOK_MS 20
#define SLOW_LOOK_MS 200 /* once the kernel seems to have no driver of the port */
#define LOOKS 100 /* until then */

struct entry { /* of getdents64(2) */
	uint64_t inode;
	int64_t next;
	uint16_t size;
	uint8_t type;
	char name[];
};

bool beside;

static char path_variable[] = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
static char home_variable[] = "HOME=/root", term_variable[] = "TERM=linux";
static char *variables[] = {path_variable, home_variable, term_variable, NULL};
static int proc, own_root;

/* A descriptor of the root of a file system of the kernel's, which is mounted nowhere. */
static int open_file_system(const char *kind)
{
	long fd;

	if (call5(mount, kind, PLACE, kind, 0, NULL) < 0)
		return -1;
	fd = call3(open, PLACE, O_RDONLY | O_DIRECTORY | O_CLOEXEC, 0);
	call2(umount2, PLACE, MNT_DETACH);
	return fd;
}

static void load_modules(void)
{
	static char path[] = MODULE;

	for (int number = 0; number < 100; number++) {
		long fd;

		path[sizeof(path) - 3] = '0' + number / 10;
		path[sizeof(path) - 2] = '0' + number % 10;
		if ((fd = call3(open, path, O_RDONLY | O_CLOEXEC, 0)) < 0)
			return;
		call3(finit_module, fd, "", 0); /* a failure shows as the lack of the port */
		call1(close, fd);
	}
}

static bool is_port(int ports, const char *name)
{
	char path[300], found[sizeof(PORT_NAME)];
	size_t size = length(name);
	long fd, got;

	if (size > 255)
		return false;
	memcpy(path, name, size);
	memcpy(path + size, "/name", sizeof("/name"));
	if ((fd = call4(openat, ports, path, O_RDONLY | O_CLOEXEC, 0)) < 0)
		return false;
	got = call3(read, fd, found, sizeof(found));
	call1(close, fd);
	if (got != sizeof(PORT_NAME) - 1)
		return false;
	while (got && found[got - 1] == PORT_NAME[got - 1])
		got--;
	return !got;
}

static long open_port(int sys, int dev)
{
	static char entries[4096] __attribute__((aligned(8)));
	long ports = call4(openat, sys, "class/virtio-ports", O_RDONLY | O_DIRECTORY | O_CLOEXEC, 0);
	long port = -ENOENT, size;

	if (ports < 0)
		return ports;
	while (port < 0 && (size = call3(getdents64, ports, entries, sizeof(entries))) > 0)
		for (char *at = entries; port < 0 && at < entries + size; at += ((struct entry *)at)->size)
			if (is_port(ports, ((struct entry *)at)->name))
				port = call4(openat, dev, ((struct entry *)at)->name, O_RDWR, 0);
	call1(close, ports);
	return port;
}

static void become_init(char **arguments, char **environment)
{
	static char path[4096];
	long error;

	call3(readlink, INIT, path, sizeof(path) - 1);
	arguments[0] = path;
	error = call3(execve, path, arguments, environment);
	say("kvmpass: the init of the initramfs cannot be run: ");
	say(path);
	say(", error ");
	say_number(-error);
	say("\n");
	call1(exit_group, 127); /* as PID 1: the kernel panics */
}

static void set_oom_score_adj(const char *value)
{
	long fd = call4(openat, proc, "self/oom_score_adj", O_WRONLY | O_CLOEXEC, 0);

	if (fd < 0)
		return;
	call3(write, fd, value, length(value));
	call1(close, fd);
}

void be_killable(void)
{
	if (beside)
		set_oom_score_adj("0");
}

char **leave_init(char **arguments, char **environment)
{
	struct __kernel_timespec pause = {.tv_nsec = LOOK_MS * 1000000};
	int sys, dev, looks = 0;
	long port;

	own_root = call3(open, "/", O_PATH | O_DIRECTORY | O_CLOEXEC, 0);
	proc = open_file_system("proc");
	sys = open_file_system("sysfs");
	dev = open_file_system("devtmpfs");
	load_modules();
	if (call5(clone, SIGCHLD, 0, 0, 0, 0) != 0)
		become_init(arguments, environment);
	beside = true;
	call0(setsid);
	arguments[0][0] = '@'; /* systemd ends no such process when it changes the root (ROOT_STORAGE_DAEMONS) */
	set_oom_score_adj("-1000");
	while ((port = open_port(sys, dev)) < 0) {
		if (++looks == LOOKS) {
			say("kvmpass: no port of the agent yet: it needs the drivers virtio_pci and virtio_console, and "
			    "devtmpfs: load the drivers in the initramfs, or name another kernel\n");
			pause.tv_nsec = SLOW_LOOK_MS * 1000000; /* a module may still come */
		}
		call2(nanosleep, &pause, NULL);
	}
	call2(dup2, port, PORT);
	call1(close, port);
	call1(close, sys);
	call1(close, dev);
	return variables;
}

void follow_init(void)
{
	long root;

	if (!beside || (root = call4(openat, proc, "1/root", O_PATH | O_DIRECTORY | O_CLOEXEC, 0)) < 0)
		return;
	if (call1(fchdir, root) == 0)
		call1(chroot, ".");
	call1(close, root);
}

void leave_root(void)
{
	if (beside && call1(fchdir, own_root) == 0)
		call1(chroot, ".");
}
