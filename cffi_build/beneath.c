/* Paths that are resolved beneath a directory, whatever others make of its entries meanwhile. */
#include <linux/openat2.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <unistd.h>

static int kvmpass_openat2(int directory, const char *path, uint64_t flags, uint64_t mode, uint64_t resolve)
{
	struct open_how how = { .flags = flags, .mode = mode, .resolve = resolve };

	return RESULT(syscall(SYS_openat2, directory, path, &how, sizeof(how)));
}
