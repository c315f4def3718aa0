/* Mappings whose addresses matter, and the signal that takes a vCPU out of KVM_RUN. */
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#include <unistd.h>
#include <linux/magic.h>
#include <linux/mempolicy.h>

#ifndef MADV_POPULATE_WRITE /* Linux 5.14 */
#define MADV_POPULATE_READ 22
#define MADV_POPULATE_WRITE 23
#endif

/* Map `size` bytes at an address that equals `congruent` modulo `align` (a power of two): large pages, in the
 * CPU's tables and in the IOMMU's, need virtual and physical addresses that agree in their low bits. */
static intptr_t kvmpass_mmap(size_t size, size_t align, size_t congruent, int prot, int flags, int fd,
                             uint64_t offset)
{
	if (!size || !align || (align & (align - 1)) || size > SIZE_MAX - align)
		return -EINVAL;
	if (align <= 4096) {	/* every mapping is */
		char *made = mmap(NULL, size, prot, flags, fd, (off_t)offset);
		return made == MAP_FAILED ? -errno : (intptr_t)made;
	}
	size_t span = size + align;
	char *space = mmap(NULL, span, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (space == MAP_FAILED)
		return -errno;
	size_t skip = (congruent - (uintptr_t)space) & (align - 1);
	char *start = space + skip;
	char *made = mmap(start, size, prot, flags | MAP_FIXED, fd, (off_t)offset);
	if (made == MAP_FAILED) {
		int error = errno;
		munmap(space, span);
		return -error;
	}
	size_t page = 4096, used = (size + page - 1) & ~(page - 1);
	if (skip)
		munmap(space, skip);
	if (span - skip > used)
		munmap(start + used, span - skip - used);
	return (intptr_t)start;
}

static int kvmpass_munmap(uintptr_t address, size_t size)
{
	return RESULT(munmap((void *)address, size));
}

static int kvmpass_madvise(uintptr_t address, size_t size, int advice)
{
	return RESULT(madvise((void *)address, size, advice));
}

/* Pages to populate by any number of threads: each takes the next piece. A loop in Python would wait for the
 * interpreter's lock after each piece, while another thread runs Python, for longer than a piece takes. */
struct kvmpass_pieces {
	uintptr_t address;
	size_t size;
	size_t step;		/* bytes of a piece */
	int advice;
	size_t next;		/* where the next piece begins, in bytes from the address on */
	const int *stopped;	/* not 0: take no more */
	int failed;		/* of another thread: not 0 */
};

/* Returns 0 once there are no more pieces, or none may be taken. */
static int kvmpass_populate(struct kvmpass_pieces *pieces)
{
	while (!__atomic_load_n(pieces->stopped, __ATOMIC_RELAXED) && !__atomic_load_n(&pieces->failed, __ATOMIC_RELAXED)) {
		size_t at = __atomic_fetch_add(&pieces->next, pieces->step, __ATOMIC_RELAXED);
		if (at >= pieces->size)
			break;
		size_t left = pieces->size - at;
		size_t size = left < pieces->step ? left : pieces->step;
		if (madvise((void *)(pieces->address + at), size, pieces->advice) < 0) {
			int error = errno;
			__atomic_store_n(&pieces->failed, 1, __ATOMIC_RELAXED);
			return -error;
		}
	}
	return 0;
}

/* The policy of pages that do not exist yet. `nodes` has `bits` bits; the kernel takes one less than it is told. */
static int kvmpass_mbind(uintptr_t address, size_t size, int mode, const unsigned long *nodes, unsigned long bits)
{
	return RESULT(syscall(SYS_mbind, address, size, mode, nodes, bits + 1, 0));
}

/* The policy of this thread, MPOL_DEFAULT unless it or its parent has set one. */
static int kvmpass_get_mempolicy(int *mode)
{
	return RESULT(syscall(SYS_get_mempolicy, mode, NULL, 0, NULL, 0));
}

/* The page size in bytes of a file on hugetlbfs, or of a memfd made of huge pages; 0 for any other file. */
static int64_t kvmpass_fhugepage(int fd)
{
	struct statfs status;

	if (fstatfs(fd, &status) < 0)
		return -errno;
	return status.f_type == HUGETLBFS_MAGIC ? (int64_t)status.f_bsize : 0;
}

static void kvmpass_kicked(int signal_number)
{
	(void)signal_number;
}

/* A handler that does nothing, and no SA_RESTART: KVM_RUN returns EINTR. */
static int kvmpass_install_kick(int signal_number)
{
	struct sigaction action = { .sa_handler = kvmpass_kicked };

	sigemptyset(&action.sa_mask);
	return RESULT(sigaction(signal_number, &action, NULL));
}
