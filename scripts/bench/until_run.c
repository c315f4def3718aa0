/*
 * How long a program takes to its first KVM_RUN, and how much CPU: whatever VMM it is, and without its help.
 *
 *	until_run SECONDS PROGRAM [ARGUMENT…]
 *
 * A filter of system calls (seccomp(2)) tells this process of the call before it is made. Then the program is killed,
 * as it is after so many seconds without one. Prints nanoseconds from its start, and of CPU time in user mode; the end
 * of the process costs none.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/kvm.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define LISTENER 100

static void fail(const char *what)
{
	perror(what);
	_exit(125);
}

static void start(char **words)
{
	struct sock_filter code[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_ioctl, 0, 3),
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args[1])),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, KVM_RUN, 0, 1),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_USER_NOTIF),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
	};
	struct sock_fprog program = { .len = sizeof(code) / sizeof(*code), .filter = code };
	int listener;

	if (prctl(PR_SET_PDEATHSIG, SIGKILL) || prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
		fail("prctl");
	listener = syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_NEW_LISTENER, &program);
	if (listener < 0)
		fail("seccomp");
	if (dup3(listener, LISTENER, O_CLOEXEC) < 0)
		fail("dup3");
	close(listener);
	execvp(words[0], words);
	fail(words[0]);
}

int main(int argc, char **argv)
{
	struct pollfd first = { .fd = LISTENER, .events = POLLIN };
	struct timespec before, after;
	struct rusage used;
	int seconds, found;
	pid_t pid;

	seconds = argc < 3 ? 0 : atoi(argv[1]);
	if (seconds < 1 || seconds > 3600) {
		fprintf(stderr, "usage: until_run SECONDS PROGRAM [ARGUMENT...], 1 to 3600 seconds\n");
		return 2;
	}
	clock_gettime(CLOCK_MONOTONIC, &before);
	/* The descriptors are shared until the child runs the program: then the listener is here. */
	pid = syscall(SYS_clone, CLONE_FILES | CLONE_VFORK | SIGCHLD, NULL, NULL, NULL, 0);
	if (pid < 0)
		fail("clone");
	if (!pid)
		start(argv + 2);
	while ((found = poll(&first, 1, seconds * 1000)) < 0)
		if (errno != EINTR)
			fail("poll");
	clock_gettime(CLOCK_MONOTONIC, &after);
	kill(pid, SIGKILL);
	if (wait4(pid, NULL, 0, &used) < 0)
		fail("wait4");
	if (!found) {
		fprintf(stderr, "%s: no KVM_RUN within %d s: killed\n", argv[2], seconds);
		return 1;
	}
	if (!(first.revents & POLLIN)) {
		fprintf(stderr, "%s: ended without KVM_RUN\n", argv[2]);
		return 1;
	}
	printf("%lld %lld\n", (after.tv_sec - before.tv_sec) * 1000000000LL + after.tv_nsec - before.tv_nsec,
	       used.ru_utime.tv_sec * 1000000000LL + used.ru_utime.tv_usec * 1000LL);
	return 0;
}
