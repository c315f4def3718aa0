/*
 * Writes and reads a BAR of memory through sysfs: bar RESOURCE, for a file such as
 * /sys/bus/pci/devices/0000:00:01.0/resource2.
 *
 * Its first, middle and last page get words that say where they are, are read back after all were written, and stay
 * for a reader on the other side.
 */
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define PAGE 4096ull
#define WORDS (PAGE / 8)
#define MARK 0x6b766d7000000000ull

int main(int argc, char **argv)
{
	struct stat status;
	int file = argc == 2 ? open(argv[1], O_RDWR) : -1;

	if (file < 0 || fstat(file, &status)) {
		perror("open");
		return 1;
	}
	uint64_t size = (uint64_t)status.st_size, at[] = { 0, size / 2, size - PAGE };
	volatile uint64_t *bar = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);

	if (bar == MAP_FAILED) {
		perror("mmap");
		return 1;
	}
	for (unsigned page = 0; page < 3; page++)
		for (unsigned i = 0; i < WORDS; i++)
			bar[at[page] / 8 + i] = MARK + at[page] + i;
	for (unsigned page = 0; page < 3; page++)
		for (unsigned i = 0; i < WORDS; i++)
			if (bar[at[page] / 8 + i] != MARK + at[page] + i) {
				printf("wrong at %#llx\n", (unsigned long long)(at[page] + i * 8));
				return 1;
			}
	printf("size %llu\n", (unsigned long long)size);
	return 0;
}
