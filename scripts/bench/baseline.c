/*
 * The least that an assignment costs: one container or IOAS, memory that is populated and mapped, open devices.
 *
 *	baseline type1|iommufd MIB DEVICE…	DEVICE is BDF:NODE, NODE below /dev/vfio
 *	baseline ioctl N			nanoseconds for each of N calls of KVM_CHECK_EXTENSION
 *
 * Prints "device NANOSECONDS" for each device, the first with all memory; then "add" and "remove" for 64 MiB more,
 * in a VM as well. An ioctl of descriptor -1 is a mark for a tracer.
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

#include "../../cffi_build/iommufd.h"

#define HUGE (2UL << 20)
#define MORE (64UL << 20)
#define MORE_AT (1UL << 32)

static int container = -1, iommufd = -1;
static uint32_t ioas;

static int check(int result, const char *what)
{
	if (result < 0) {
		perror(what);
		exit(1);
	}
	return result;
}

static double now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec * 1e9 + time.tv_nsec;
}

static double report(const char *what, double since)
{
	printf("%s %.0f\n", what, now() - since);
	fflush(stdout);
	ioctl(-1, 0);
	return now();
}

static void measure_ioctl(long count)
{
	int kvm = check(open("/dev/kvm", O_RDWR | O_CLOEXEC), "/dev/kvm");
	double start = now();

	for (long i = 0; i < count; i++)
		check(ioctl(kvm, KVM_CHECK_EXTENSION, KVM_CAP_USER_MEMORY), "KVM_CHECK_EXTENSION");
	printf("%.1f\n", (now() - start) / count);
}

static char *populated(size_t size)
{
	char *area = mmap(NULL, size + HUGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	if (area == MAP_FAILED)
		check(-1, "mmap");
	area = (char *)(((uintptr_t)area + HUGE - 1) & -HUGE);
	madvise(area, size, MADV_HUGEPAGE);
	check(madvise(area, size, MADV_POPULATE_WRITE), "MADV_POPULATE_WRITE");
	return area;
}

static void map(uint64_t iova, char *memory, size_t size)
{
	struct vfio_iommu_type1_dma_map type1 = {
		.argsz = sizeof(type1),
		.flags = VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE,
		.vaddr = (uintptr_t)memory,
		.iova = iova,
		.size = size,
	};
	struct kvmpass_ioas_map ioas_map = {
		.size = sizeof(ioas_map),
		.flags = KVMPASS_IOAS_FIXED_IOVA | KVMPASS_IOAS_WRITEABLE | KVMPASS_IOAS_READABLE,
		.ioas_id = ioas,
		.user_va = (uintptr_t)memory,
		.length = size,
		.iova = iova,
	};

	if (iommufd < 0)
		check(ioctl(container, VFIO_IOMMU_MAP_DMA, &type1), "VFIO_IOMMU_MAP_DMA");
	else
		check(ioctl(iommufd, KVMPASS_IOMMU_IOAS_MAP, &ioas_map), "IOMMU_IOAS_MAP");
}

static void unmap(uint64_t iova, size_t size)
{
	struct vfio_iommu_type1_dma_unmap type1 = { .argsz = sizeof(type1), .iova = iova, .size = size };
	struct kvmpass_ioas_unmap ioas_unmap = { .size = sizeof(ioas_unmap), .ioas_id = ioas, .iova = iova, .length = size };

	if (iommufd < 0)
		check(ioctl(container, VFIO_IOMMU_UNMAP_DMA, &type1), "VFIO_IOMMU_UNMAP_DMA");
	else
		check(ioctl(iommufd, KVMPASS_IOMMU_IOAS_UNMAP, &ioas_unmap), "IOMMU_IOAS_UNMAP");
}

static void attach_type1(const char *bdf, const char *node, size_t size)
{
	struct vfio_group_status status = { .argsz = sizeof(status) };
	int first = container < 0, group;

	if (first)
		container = check(open("/dev/vfio/vfio", O_RDWR | O_CLOEXEC), "/dev/vfio/vfio");
	group = check(open(node, O_RDWR | O_CLOEXEC), node);
	check(ioctl(group, VFIO_GROUP_GET_STATUS, &status), "VFIO_GROUP_GET_STATUS");
	check(ioctl(group, VFIO_GROUP_SET_CONTAINER, &container), "VFIO_GROUP_SET_CONTAINER");
	if (first) {
		check(ioctl(container, VFIO_SET_IOMMU, VFIO_TYPE1v2_IOMMU), "VFIO_SET_IOMMU");
		map(0, populated(size), size);
	}
	check(ioctl(group, VFIO_GROUP_GET_DEVICE_FD, bdf), "VFIO_GROUP_GET_DEVICE_FD");
}

static void attach_iommufd(const char *node, size_t size)
{
	int first = iommufd < 0, device = check(open(node, O_RDWR | O_CLOEXEC), node);
	struct kvmpass_vfio_bind bind = { .argsz = sizeof(bind) };
	struct kvmpass_vfio_attach attach = { .argsz = sizeof(attach) };
	struct kvmpass_ioas_alloc alloc = { .size = sizeof(alloc) };

	if (first) {
		iommufd = check(open("/dev/iommu", O_RDWR | O_CLOEXEC), "/dev/iommu");
		check(ioctl(iommufd, KVMPASS_IOMMU_IOAS_ALLOC, &alloc), "IOMMU_IOAS_ALLOC");
		ioas = alloc.out_ioas_id;
	}
	bind.iommufd = iommufd;
	attach.pt_id = ioas;
	check(ioctl(device, KVMPASS_VFIO_DEVICE_BIND_IOMMUFD, &bind), "VFIO_DEVICE_BIND_IOMMUFD");
	check(ioctl(device, KVMPASS_VFIO_DEVICE_ATTACH_IOMMUFD_PT, &attach), "VFIO_DEVICE_ATTACH_IOMMUFD_PT");
	if (first)
		map(0, populated(size), size);
}

static void change_memory(void)
{
	int kvm = check(open("/dev/kvm", O_RDWR | O_CLOEXEC), "/dev/kvm");
	int vm = check(ioctl(kvm, KVM_CREATE_VM, 0), "KVM_CREATE_VM");
	double start = now();
	char *memory = populated(MORE);
	struct kvm_userspace_memory_region slot = {
		.guest_phys_addr = MORE_AT, .memory_size = MORE, .userspace_addr = (uintptr_t)memory,
	};

	check(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &slot), "KVM_SET_USER_MEMORY_REGION");
	map(MORE_AT, memory, MORE);
	start = report("add", start);
	unmap(MORE_AT, MORE);
	slot.memory_size = 0;
	check(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &slot), "KVM_SET_USER_MEMORY_REGION");
	munmap(memory, MORE);
	report("remove", start);
}

int main(int argc, char **argv)
{
	if (argc == 3 && !strcmp(argv[1], "ioctl")) {
		measure_ioctl(atol(argv[2]));
		return 0;
	}
	if (argc < 4)
		return 2;

	size_t size = strtoul(argv[2], NULL, 10) << 20;
	char bdf[32], path[80];

	for (int i = 3; i < argc; i++) {
		const char *node = strrchr(argv[i], ':') + 1;
		double start = now();

		snprintf(bdf, sizeof(bdf), "%.*s", (int)(node - argv[i] - 1), argv[i]);
		snprintf(path, sizeof(path), "/dev/vfio/%s", node);
		if (!strcmp(argv[1], "type1"))
			attach_type1(bdf, path, size);
		else
			attach_iommufd(path, size);
		report("device", start);
	}
	change_memory();
	return 0;
}
