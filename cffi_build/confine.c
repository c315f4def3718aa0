/* Start a program that serves files by vhost-user, confined: kvmpass/files/daemon.py says what from.
 *
 *   confine UID GID ro|rw SOURCE COVER... -- PROGRAM ARGUMENT...
 *
 * Standard output is a library to preload into the program. Standard input is a SOCK_SEQPACKET socket to kvmpass. It
 * gets one message: "ok" with a socket that is connected to the program's descriptor 3, or "STEP ERRNO". Once the other
 * end is closed, be it by the death of kvmpass, everything here ends.
 *
 * Three processes. This one stays in the namespaces it came from: it gives the second one its user ID, and waits for
 * it. The second is process 1 of a PID namespace: when it ends, the kernel kills the program. It makes the mounts. The
 * third becomes the program, in a second user and mount namespace, where those mounts are locked
 * (mount_namespaces(7)): not even a program that was taken over can undo them.
 *
 * The program has no network. All its mounts are read-only, nosuid and nodev; /tmp is SOURCE with all that is mounted
 * below it, writable for rw, and each COVER in it is an empty directory, or an empty file if it is no directory. UID
 * and GID, 0 in the program's user namespace, are its own; -1: those of the caller.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/mount.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#ifndef MOUNT_ATTR_NODEV
#error "mount_setattr needs the kernel headers of Linux 5.12 or later"
#endif
#define AT_RECURSIVE_ 0x8000 /* in linux/fcntl.h, which cannot be included beside fcntl.h */

enum { CONTROL, LIBRARY, LISTENER = 3, PRELOADED };
static const char PLACE[] = "/tmp";     /* where the program finds SOURCE: a directory that every host has */
static const rlim_t MOST_FILES = 1 << 19; /* each inode that the guest knows is a descriptor of the program */
static const int FAILED = 125;

static void report(const char *text, int fd)
{
	char space[CMSG_SPACE(sizeof(int))] = { 0 };
	struct iovec data = { (void *)text, strlen(text) };
	struct msghdr message = { .msg_iov = &data, .msg_iovlen = 1 };

	if (fd >= 0) {
		message.msg_control = space;
		message.msg_controllen = sizeof(space);
		struct cmsghdr *header = CMSG_FIRSTHDR(&message);
		header->cmsg_level = SOL_SOCKET;
		header->cmsg_type = SCM_RIGHTS;
		header->cmsg_len = CMSG_LEN(sizeof(int));
		memcpy(CMSG_DATA(header), &fd, sizeof(int));
	}
	sendmsg(CONTROL, &message, MSG_NOSIGNAL);
}

static long check(long result, const char *step)
{
	char text[128];

	if (result < 0) {
		snprintf(text, sizeof(text), "%s %d", step, errno);
		report(text, -1);
		_exit(FAILED);
	}
	return result;
}

static int write_file(int proc, const char *process, const char *name, const char *text)
{
	char path[64];

	snprintf(path, sizeof(path), "%s/%s", process, name);
	int fd = openat(proc, path, O_WRONLY | O_CLOEXEC);
	if (fd < 0)
		return -1;
	ssize_t written = write(fd, text, strlen(text));
	int error = errno;
	close(fd);
	errno = error;
	return written < 0 ? -1 : 0;
}

/* Map user and group 0 of a process's new user namespace. `proc`: a descriptor of /proc. */
static void map_users(int proc, const char *process, uid_t uid, gid_t gid)
{
	char text[64];

	snprintf(text, sizeof(text), "0 %u 1\n", uid);
	check(write_file(proc, process, "uid_map", text), "uid_map");
	check(write_file(proc, process, "setgroups", "deny"), "setgroups"); /* before gid_map: user_namespaces(7) */
	snprintf(text, sizeof(text), "0 %u 1\n", gid);
	check(write_file(proc, process, "gid_map", text), "gid_map");
}

static int clone_tree(int fd, const char *path, int flags)
{
	return check(syscall(SYS_open_tree, fd, path, flags | OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC), "open_tree");
}

static void restrict_mounts(int fd, const char *path, int flags, uint64_t attributes)
{
	struct mount_attr wanted = { .attr_set = attributes };

	check(syscall(SYS_mount_setattr, fd, path, flags | AT_RECURSIVE_, &wanted, sizeof(wanted)), "mount_setattr");
}

static void move_tree(int tree, const char *path)
{
	check(syscall(SYS_move_mount, tree, "", AT_FDCWD, path, MOVE_MOUNT_F_EMPTY_PATH), "move_mount");
	close(tree);
}

/* On a file system of its own at PLACE, where SOURCE is mounted over it. */
static int make_empty_file(void)
{
	unsigned long flags = MS_NOSUID | MS_NODEV | MS_NOEXEC;
	char path[64];

	check(syscall(SYS_mount, "none", PLACE, "tmpfs", flags, "mode=0555"), "mount_tmpfs");
	snprintf(path, sizeof(path), "%s/empty", PLACE);
	int fd = check(open(path, O_RDONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0444), "open");
	restrict_mounts(AT_FDCWD, PLACE, 0, MOUNT_ATTR_RDONLY);
	return fd;
}

static long mount_empty(const char *path)
{
	return syscall(SYS_mount, "none", path, "tmpfs", MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC, "mode=0555");
}

/* In a mount namespace of our own. */
static void make_mounts(const char *source, int writable, char **covers)
{
	uint64_t attributes = MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV;
	char path[4096];

	check(syscall(SYS_mount, "none", "/", NULL, MS_REC | MS_PRIVATE, NULL), "mount");
	int tree = clone_tree(AT_FDCWD, source, AT_RECURSIVE_);
	restrict_mounts(tree, "", AT_EMPTY_PATH, attributes | (writable ? 0 : MOUNT_ATTR_RDONLY));
	restrict_mounts(AT_FDCWD, "/", 0, attributes | MOUNT_ATTR_RDONLY);
	int empty = make_empty_file();
	move_tree(tree, PLACE);
	check(chdir(PLACE), "chdir"); /* may the user be in it? The program would end without an answer */
	check(chdir("/"), "chdir");
	for (; *covers; covers++) {
		snprintf(path, sizeof(path), "%s%s", PLACE, *covers);
		/* What is not found is below another cover, what cannot be reached is out of the program's reach, too. */
		if (mount_empty(path) == 0 || errno == ENOENT || errno == EACCES)
			continue;
		if (errno != ENOTDIR)
			check(-1, "mount_tmpfs");
		move_tree(clone_tree(empty, "", AT_EMPTY_PATH), path);
	}
	close(empty);
}

/* What a guest writes to a directory stays there, and other users may run it: no file gets a set-user-ID or
 * set-group-ID bit, whatever else the program may do. openat2 and io_uring have modes that a filter cannot see, and are
 * refused as by a kernel without them. */
static void forbid_set_id(void)
{
#define ARGUMENT(n) offsetof(struct seccomp_data, args[n]) /* its lower half: a mode has 32 bits */
#define LOAD(at) BPF_STMT(BPF_LD | BPF_W | BPF_ABS, at)
#define RETURN(what) BPF_STMT(BPF_RET | BPF_K, what)
/* The mode is argument n of this call. */
#define MODE(number, n)                                               \
	BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, number, 0, 4), LOAD(ARGUMENT(n)), \
	BPF_JUMP(BPF_JMP | BPF_JSET | BPF_K, S_ISUID | S_ISGID, 0, 1), RETURN(SECCOMP_RET_ERRNO | EPERM), \
	RETURN(SECCOMP_RET_ALLOW)
/* It is argument n if the flags, the argument before, create a file. */
#define CREATING(number, n)                                           \
	BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, number, 0, 6), LOAD(ARGUMENT((n) - 1)), \
	BPF_JUMP(BPF_JMP | BPF_JSET | BPF_K, O_CREAT | (O_TMPFILE & ~O_DIRECTORY), 0, 3), LOAD(ARGUMENT(n)), \
	BPF_JUMP(BPF_JMP | BPF_JSET | BPF_K, S_ISUID | S_ISGID, 0, 1), RETURN(SECCOMP_RET_ERRNO | EPERM), \
	RETURN(SECCOMP_RET_ALLOW)
#define ABSENT(number) BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, number, 0, 1), RETURN(SECCOMP_RET_ERRNO | ENOSYS)
	struct sock_filter filter[] = {
		LOAD(offsetof(struct seccomp_data, arch)),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, AUDIT_ARCH_X86_64, 1, 0),
		RETURN(SECCOMP_RET_KILL_PROCESS),
		LOAD(offsetof(struct seccomp_data, nr)),
		BPF_JUMP(BPF_JMP | BPF_JGE | BPF_K, 0x40000000, 0, 1), /* x32 */
		RETURN(SECCOMP_RET_KILL_PROCESS),
		MODE(SYS_chmod, 1), MODE(SYS_fchmod, 1), MODE(SYS_fchmodat, 2), MODE(452 /* fchmodat2 */, 2),
		MODE(SYS_creat, 1), MODE(SYS_mknod, 1), MODE(SYS_mknodat, 2), MODE(SYS_mkdir, 1), MODE(SYS_mkdirat, 2),
		CREATING(SYS_open, 2), CREATING(SYS_openat, 3),
		ABSENT(SYS_openat2), ABSENT(SYS_io_uring_setup),
		RETURN(SECCOMP_RET_ALLOW),
	};
	struct sock_fprog program = { .len = sizeof(filter) / sizeof(*filter), .filter = filter };

	check(prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program), "seccomp");
}

/* The abstract socket exists in this network namespace only: nobody else can connect. */
static int connect_listener(int listener)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	socklen_t size = sizeof(address);

	check(bind(listener, (struct sockaddr *)&address, sizeof(address.sun_family)), "bind"); /* unix(7): autobind */
	check(listen(listener, 1), "listen");
	check(getsockname(listener, (struct sockaddr *)&address, &size), "getsockname");
	int client = check(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0), "socket");
	check(connect(client, (struct sockaddr *)&address, size), "connect");
	return client;
}

/* The third process. */
static void become_program(int proc, int null, char **program)
{
	int listener = check(socket(AF_UNIX, SOCK_STREAM, 0), "socket"), client = connect_listener(listener);
	char library[32];

	check(unshare(CLONE_NEWUSER | CLONE_NEWNS), "unshare");
	map_users(proc, "self", 0, 0);
	check(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl");
	forbid_set_id();
	/* Descriptors that are open already come first: each dup2 closes what was there. */
	listener = check(fcntl(listener, F_DUPFD, PRELOADED + 1), "fcntl");
	null = check(fcntl(null, F_DUPFD, PRELOADED + 1), "fcntl");
	report("ok", client);
	dup2(LIBRARY, PRELOADED);
	dup2(listener, LISTENER);
	dup2(null, STDIN_FILENO);
	dup2(null, STDOUT_FILENO);
	syscall(SYS_close_range, PRELOADED + 1, ~0U, 0);
	snprintf(library, sizeof(library), "/proc/self/fd/%d", PRELOADED);
	setenv("LD_PRELOAD", library, 1);
	execv(program[0], program);
	dprintf(STDERR_FILENO, "%s: %s\n", program[0], strerror(errno));
	_exit(FAILED);
}

static int status_of(pid_t process)
{
	int status;

	while (waitpid(process, &status, 0) < 0)
		if (errno != EINTR)
			return FAILED;
	return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

/* The second process. `parent`: a socket to the first one. */
static void contain(int parent, uid_t uid, char **arguments, char **covers, char **program)
{
	char byte;
	const char *access = arguments[0], *source = arguments[1];
	int null = check(open("/dev/null", O_RDWR | O_CLOEXEC), "open"); /* before the mounts are nodev */

	if (read(parent, &byte, 1) != 1)
		_exit(FAILED);
	if (uid != (uid_t)-1) {
		check(setresgid(0, 0, 0), "setresgid");
		check(setresuid(0, 0, 0), "setresuid");
		check(prctl(PR_SET_DUMPABLE, 1, 0, 0, 0), "prctl"); /* else /proc/self belongs to root: proc(5) */
	}
	check(prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0), "prctl"); /* no change of users from here on */
	if (recv(parent, &byte, 1, MSG_DONTWAIT) == 0) /* it has ended before */
		_exit(FAILED);
	if (unshare(CLONE_NEWIPC) < 0 && errno != EINVAL) /* a kernel without it has no System V IPC */
		check(-1, "unshare");
	int proc = clone_tree(AT_FDCWD, "/proc", AT_RECURSIVE_); /* writable, as the others are soon not */
	make_mounts(source, !strcmp(access, "rw"), covers);
	pid_t child = check(fork(), "fork");
	if (child == 0)
		become_program(proc, null, program);
	struct pollfd ends[] = {
		{ .fd = CONTROL, .events = POLLIN },
		{ .fd = check(syscall(SYS_pidfd_open, child, 0), "pidfd_open"), .events = POLLIN },
	};
	while (poll(ends, 2, -1) < 0 && errno == EINTR)
		;
	_exit(ends[1].revents ? status_of(child) : 0);
}

static void limit(int resource, rlim_t most)
{
	struct rlimit limits;

	check(getrlimit(resource, &limits), "getrlimit");
	limits.rlim_max = limits.rlim_max < most ? limits.rlim_max : most;
	limits.rlim_cur = limits.rlim_max;
	check(setrlimit(resource, &limits), "setrlimit");
}

int main(int count, char **arguments)
{
	char **covers = arguments + 5, **program = covers, name[16];
	int sync[2];

	while (program < arguments + count && strcmp(*program, "--"))
		program++;
	if (count < 7 || program >= arguments + count - 1) {
		fprintf(stderr, "usage: %s UID GID ro|rw SOURCE COVER... -- PROGRAM ARGUMENT...\n", arguments[0]);
		return FAILED;
	}
	*program++ = NULL;
	uid_t uid = strtol(arguments[1], NULL, 10);
	gid_t gid = strtol(arguments[2], NULL, 10);
	setsid(); /* a terminal's signals are for kvmpass */
	limit(RLIMIT_NOFILE, MOST_FILES);
	limit(RLIMIT_CORE, 0);
	if (uid != (uid_t)-1)
		check(setgroups(0, NULL), "setgroups"); /* not possible in a user namespace that it is denied to */
	check(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, sync), "socketpair");
	int namespaces = CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET;
	pid_t child = check(syscall(SYS_clone, namespaces | SIGCHLD, 0, 0, 0, 0), "clone");
	if (child == 0) {
		close(sync[0]);
		contain(sync[1], uid, arguments + 3, covers, program);
	}
	close(sync[1]);
	int proc = check(open("/proc", O_PATH | O_DIRECTORY | O_CLOEXEC), "open");
	snprintf(name, sizeof(name), "%d", child);
	map_users(proc, name, uid == (uid_t)-1 ? geteuid() : uid, gid == (gid_t)-1 ? getegid() : gid);
	if (uid != (uid_t)-1) {
		check(setresgid(gid, gid, gid), "setresgid");
		check(setresuid(uid, uid, uid), "setresuid");
	}
	check(write(sync[0], "", 1), "write");
	close(CONTROL);
	return status_of(child);
}
