/*
 * The least that an assignment costs: one VFIO type 1 container, memory that is populated and mapped, an open device.
 *
 *	baseline GROUP BDF MIB	prints "attached"
 *	baseline ioctl N		prints nanoseconds for each of N calls of KVM_CHECK_EXTENSION
 */
#include <fcntl.h>
#include <linux/kvm.h>
#include <linux/vfio.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define HUGE (2UL << 20)

static int check(int result, const char *what)
{
	if (result < 0) {
		perror(what);
		exit(1);
	}
	return result;
}

static void measure_ioctl(long count)
{
	struct timespec start, end;
	int kvm = check(open("/dev/kvm", O_RDWR | O_CLOEXEC), "/dev/kvm");

	clock_gettime(CLOCK_MONOTONIC, &start);
	for (long i = 0; i < count; i++)
		check(ioctl(kvm, KVM_CHECK_EXTENSION, KVM_CAP_USER_MEMORY), "KVM_CHECK_EXTENSION");
	clock_gettime(CLOCK_MONOTONIC, &end);
	printf("%.1f\n", ((end.tv_sec - start.tv_sec) * 1e9 + (end.tv_nsec - start.tv_nsec)) / count);
}

int main(int argc, char **argv)
{
	if (argc == 3 && !strcmp(argv[1], "ioctl")) {
		measure_ioctl(atol(argv[2]));
		return 0;
	}
	if (argc != 4)
		return 2;

	char node[64];
	size_t size = strtoul(argv[3], NULL, 10) << 20;
	struct vfio_group_status status = { .argsz = sizeof(status) };

	snprintf(node, sizeof(node), "/dev/vfio/%s", argv[1]);
	int container = check(open("/dev/vfio/vfio", O_RDWR | O_CLOEXEC), "/dev/vfio/vfio");
	int group = check(open(node, O_RDWR | O_CLOEXEC), node);

	check(ioctl(group, VFIO_GROUP_GET_STATUS, &status), "VFIO_GROUP_GET_STATUS");
	check(ioctl(group, VFIO_GROUP_SET_CONTAINER, &container), "VFIO_GROUP_SET_CONTAINER");
	check(ioctl(container, VFIO_SET_IOMMU, VFIO_TYPE1v2_IOMMU), "VFIO_SET_IOMMU");

	char *area = mmap(NULL, size + HUGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (area == MAP_FAILED)
		check(-1, "mmap");
	char *memory = (char *)(((uintptr_t)area + HUGE - 1) & -HUGE);

	madvise(memory, size, MADV_HUGEPAGE);
	check(madvise(memory, size, MADV_POPULATE_WRITE), "MADV_POPULATE_WRITE");

	struct vfio_iommu_type1_dma_map map = {
		.argsz = sizeof(map),
		.flags = VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE,
		.vaddr = (uintptr_t)memory,
		.size = size,
	};

	check(ioctl(container, VFIO_IOMMU_MAP_DMA, &map), "VFIO_IOMMU_MAP_DMA");
	check(ioctl(group, VFIO_GROUP_GET_DEVICE_FD, argv[2]), "VFIO_GROUP_GET_DEVICE_FD");
	puts("attached");
	fflush(stdout);
	return 0;
}
