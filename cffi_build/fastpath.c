/* Registers that a guest accesses without Python: a file's, such as VFIO's, and emulated ones, which it reads.
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
	uint64_t size; /* bytes: a multiple of 8; also of `values` and `emulated` */
	const uint8_t *values;   /* what emulated bytes read as; Python changes them at any time */
	const uint8_t *emulated; /* 0xff for each emulated byte, 0 for one of the file; NULL if all are the file's */
	int fd;
	uint64_t offset; /* of the first one in the file */
	uint64_t exit_start, exit_end; /* in between, relative to the first one, Python reads */
	uint64_t *counts; /* of reads and of writes */
};

/* The lock is held for reading during an access, also of the file: once the writer has it, no thread uses what was in
 * the table before. It prefers writers, as the guest decides how often it accesses registers. */
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

static void kvmpass_file_read(const struct kvmpass_registers *from, uint64_t at, uint32_t size, uint8_t *data)
{
	ssize_t done;

	do
		done = pread(from->fd, data, size, (off_t)(from->offset + at));
	while (done < 0 && errno == EINTR);
	if (done != (ssize_t)size) /* as an empty bus */
		memset(data, 0xff, size);
}

static void kvmpass_file_write(const struct kvmpass_registers *to, uint64_t at, uint32_t size, const uint8_t *data)
{
	ssize_t done;

	do
		done = pwrite(to->fd, data, size, (off_t)(to->offset + at));
	while (done < 0 && errno == EINTR); /* any other failure: lost, as on an empty bus */
}

static int kvmpass_emulated_read(const struct kvmpass_registers *from, uint64_t at, uint32_t size, uint8_t *data)
{
	uint8_t values[8], emulated[8], own[8];
	int all = 1;

	/* Linux reads aligned dwords, or parts of one; what crosses one is two accesses of the device. */
	if (size > 4 || (at & 3) + size > 4)
		return 0;
	if (from->exit_start != from->exit_end && at + size > from->exit_start && at < from->exit_end)
		return 0;
	/* Whole and at once: Python writes a register with one store while others may read it. */
	memcpy(values, from->values + (at & ~7ULL), 8);
	memcpy(emulated, from->emulated + (at & ~7ULL), 8);
	for (uint32_t i = 0; i < size; i++)
		all &= emulated[(at & 7) + i] == 0xff;
	if (!all)
		kvmpass_file_read(from, at, size, own);
	for (uint32_t i = 0; i < size; i++)
		data[i] = emulated[(at & 7) + i] ? values[(at & 7) + i] : own[i];
	return 1;
}

/* Read `size` bytes at `gpa` into `data`, or write them. Return 1, or 0 if Python has to. */
static int kvmpass_fastpath_access(struct kvmpass_fastpath *path, uint64_t gpa, uint32_t size, int is_write,
                                   uint8_t *data)
{
	int done = 0;

	if (!size || size > 8 || (gpa & 7) + size > 8 || pthread_rwlock_rdlock(&path->lock))
		return 0;
	const struct kvmpass_registers *found = kvmpass_registers_at(path, gpa);

	if (found && found->emulated) {
		done = !is_write && kvmpass_emulated_read(found, gpa - found->gpa, size, data);
	} else if (found) {
		if (is_write)
			kvmpass_file_write(found, gpa - found->gpa, size, data);
		else
			kvmpass_file_read(found, gpa - found->gpa, size, data);
		done = 1;
	}
	if (done)
		__atomic_fetch_add(&found->counts[!!is_write], 1, __ATOMIC_RELAXED);
	pthread_rwlock_unlock(&path->lock);
	return done;
}
