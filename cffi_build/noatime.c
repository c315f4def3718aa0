/* Preloaded into virtiofsd: open files without O_NOATIME.
 *
 * An overlay in the guest opens the files below it with O_NOATIME (fs/overlayfs/file.c), FUSE passes that on, and the
 * kernel refuses it to everybody but a file's owner (open(2)): nobody but root could run a program of the host. Where
 * mounts are read-only, no access time changes anyway.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdarg.h>
#include <sys/syscall.h>
#include <unistd.h>

int openat64(int directory, const char *path, int flags, ...)
{
	va_list rest;
	mode_t mode;

	va_start(rest, flags);
	mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;
	va_end(rest);
	return syscall(SYS_openat, directory, path, flags & ~O_NOATIME, mode);
}

int openat(int directory, const char *path, int flags, ...) __attribute__((alias("openat64")));

/* What both are with _FORTIFY_SOURCE, where no file is created. */
int __openat64_2(int directory, const char *path, int flags)
{
	return openat64(directory, path, flags);
}

int __openat_2(int directory, const char *path, int flags) __attribute__((alias("__openat64_2")));
