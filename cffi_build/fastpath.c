/* Registers that a guest reads without Python: some of their bytes are emulated, the others are read from a file.
 *
 * KVM has a fast path too: exits that it handles without the rest of its run loop (EXIT_FASTPATH_REENTER_GUEST,
 * arch/x86/kvm/x86.c). Everything else, and all that could go wrong, is for Python. */
#include <errno.h>
#include <pthread.h>
#include <stdint.h>
#include <string.h>
#include <unistd.h>

struct kvmpass_registers {
	uint64_t gpa;  /* of the first one: a multiple of 8 */
	uint64_t size; /* bytes, also of `values` and `emulated` */
	const uint8_t *values;   /* what emulated bytes read as; Python changes them at any time */
	const uint8_t *emulated; /* 0xff for each emulated byte, 0 for one of the file */
	int fd;
	uint64_t offset; /* of the first one in the file */
	uint64_t exit_start, exit_end; /* in between, relative to the first one, Python reads */
	uint64_t *reads; /* counts them */
};

/* The lock is held for reading during an access, also of the file: once the writer has it, no thread uses what was in
 * the table before. It prefers writers, as the guest decides how often it reads. */
struct kvmpass_fastpath {
	pthread_rwlock_t lock;
	const struct kvmpass_registers *table; /* by address, not overlapping */
	uint32_t count;
};

static int kvmpass_fastpath_init(struct kvmpass_fastpath *path)
{
	pthread_rwlockattr_t attributes;
	int result = pthread_rwlockattr_init(&attributes);

	if (!result)
		result = pthread_rwlockattr_setkind_np(&attributes, PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP);
	if (!result)
		result = pthread_rwlock_init(&path->lock, &attributes);
	return -result;
}

static int kvmpass_fastpath_set(struct kvmpass_fastpath *path, const struct kvmpass_registers *table, uint32_t count)
{
	int result = pthread_rwlock_wrlock(&path->lock);

	if (result)
		return -result;
	path->table = table;
	path->count = count;
	return -pthread_rwlock_unlock(&path->lock);
}

static const struct kvmpass_registers *kvmpass_registers_at(const struct kvmpass_fastpath *path, uint64_t gpa)
{
	uint32_t low = 0, high = path->count;

	while (low < high) {
		uint32_t middle = low + (high - low) / 2;
		const struct kvmpass_registers *found = &path->table[middle];

		if (gpa < found->gpa)
			high = middle;
		else if (gpa - found->gpa >= found->size)
			low = middle + 1;
		else
			return found;
	}
	return NULL;
}

static void kvmpass_registers_read(const struct kvmpass_registers *from, uint64_t at, uint32_t size, uint8_t *data)
{
	uint8_t values[8], emulated[8], own[8];
	int all = 1;

	/* Whole and at once: Python writes a register with one store while others may read it. */
	memcpy(values, from->values + (at & ~7ULL), 8);
	memcpy(emulated, from->emulated + (at & ~7ULL), 8);
	for (uint32_t i = 0; i < size; i++)
		all &= emulated[(at & 7) + i] == 0xff;
	if (!all) {
		ssize_t done;

		do
			done = pread(from->fd, own, size, (off_t)(from->offset + at));
		while (done < 0 && errno == EINTR);
		if (done != (ssize_t)size) /* as an empty bus */
			memset(own, 0xff, size);
	}
	for (uint32_t i = 0; i < size; i++)
		data[i] = emulated[(at & 7) + i] ? values[(at & 7) + i] : own[i];
}

/* Read `size` bytes at `gpa` into `data`. Return 1, or 0 if Python has to. */
static int kvmpass_fastpath_read(struct kvmpass_fastpath *path, uint64_t gpa, uint32_t size, uint8_t *data)
{
	int done = 0;

	/* Linux reads aligned dwords, or parts of one; what crosses one is two accesses of the device. */
	if (!size || size > 4 || (gpa & 3) + size > 4 || pthread_rwlock_rdlock(&path->lock))
		return 0;
	const struct kvmpass_registers *found = kvmpass_registers_at(path, gpa);

	if (found) {
		uint64_t at = gpa - found->gpa;

		if (found->exit_start == found->exit_end || at + size <= found->exit_start || at >= found->exit_end) {
			kvmpass_registers_read(found, at, size, data);
			__atomic_fetch_add(found->reads, 1, __ATOMIC_RELAXED);
			done = 1;
		}
	}
	pthread_rwlock_unlock(&path->lock);
	return done;
}
