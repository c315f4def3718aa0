/* One function for each VFIO ioctl: scalars in, -errno or the result out (include/uapi/linux/vfio.h). */
#include <errno.h>
#include <stdint.h>
#include <string.h>
#include <sys/ioctl.h>
#include <linux/vfio.h>

/* Linux 6.5: devices that were opened by their own character device are told apart by an iommufd's numbers. */
#ifndef VFIO_PCI_HOT_RESET_FLAG_DEV_ID
#define VFIO_PCI_HOT_RESET_FLAG_DEV_ID (1 << 0)
#define VFIO_PCI_HOT_RESET_FLAG_DEV_ID_OWNED (1 << 1)
#endif

#define KVMPASS_MAX_RANGES 64
#define KVMPASS_MAX_DEPENDENT 1024 /* functions that share one reset: a few buses' worth */
#define KVMPASS_MAX_IRQS 2048 /* MSI-X table size, PCI Local Bus 3.0 section 6.8.2 */

struct kvmpass_range {
	uint64_t first;
	uint64_t second;
};

struct kvmpass_iommu_info {
	uint32_t count; /* of ranges: first and last I/O virtual address, both usable */
	struct kvmpass_range ranges[KVMPASS_MAX_RANGES];
};

struct kvmpass_device_info {
	uint32_t flags;
	uint32_t num_regions;
	uint32_t num_irqs;
};

struct kvmpass_region_info {
	uint32_t flags;
	uint32_t has_sparse;
	uint64_t size;
	uint64_t offset;
	uint32_t count; /* of areas: offset in the region and size, both in bytes */
	struct kvmpass_range areas[KVMPASS_MAX_RANGES];
};

struct kvmpass_irq_info {
	uint32_t flags;
	uint32_t count;
};

struct kvmpass_dependent_device {
	uint32_t id; /* of the IOMMU group, or the iommufd's: see flags */
	uint16_t segment;
	uint8_t bus;
	uint8_t devfn;
};

struct kvmpass_hot_reset_info {
	uint32_t flags;
	uint32_t count;
	struct kvmpass_dependent_device devices[KVMPASS_MAX_DEPENDENT];
};

/* The capability at `offset` in an answer of `size` bytes, or NULL where it does not fit. */
static const struct vfio_info_cap_header *kvmpass_capability(const void *answer, uint32_t size, uint32_t offset,
                                                             uint32_t needed)
{
	if (!offset || offset > size || size - offset < needed)
		return NULL;
	return (const void *)((const char *)answer + offset);
}

static int vfio_get_api_version(int container)
{
	return RESULT(ioctl(container, VFIO_GET_API_VERSION));
}

static int vfio_check_extension(int container, int extension)
{
	return RESULT(ioctl(container, VFIO_CHECK_EXTENSION, extension));
}

static int vfio_set_iommu(int container, int type)
{
	return RESULT(ioctl(container, VFIO_SET_IOMMU, type));
}

static int vfio_iommu_get_info(int container, struct kvmpass_iommu_info *out)
{
	union {
		struct vfio_iommu_type1_info info;
		char space[8192];
	} answer = { .info = { .argsz = sizeof(answer) } };
	int result = RESULT(ioctl(container, VFIO_IOMMU_GET_INFO, &answer));

	if (result < 0)
		return result;
	if (answer.info.argsz > sizeof(answer))
		return -E2BIG;
	*out = (struct kvmpass_iommu_info){ 0 };
	uint32_t next = answer.info.flags & VFIO_IOMMU_INFO_CAPS ? answer.info.cap_offset : 0;
	const struct vfio_info_cap_header *head;

	while ((head = kvmpass_capability(&answer, sizeof(answer), next, sizeof(*head)))) {
		if (head->id == VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE) {
			const struct vfio_iommu_type1_info_cap_iova_range *cap = (const void *)head;

			if (cap->nr_iovas > KVMPASS_MAX_RANGES)
				return -E2BIG;
			out->count = cap->nr_iovas;
			for (uint32_t i = 0; i < cap->nr_iovas; i++)
				out->ranges[i] = (struct kvmpass_range){ cap->iova_ranges[i].start, cap->iova_ranges[i].end };
		}
		if (head->next <= next)
			break;
		next = head->next;
	}
	return 0;
}

static int vfio_iommu_map_dma(int container, uint32_t flags, uint64_t hva, uint64_t iova, uint64_t size)
{
	struct vfio_iommu_type1_dma_map map = {
		.argsz = sizeof(map),
		.flags = flags,
		.vaddr = hva,
		.iova = iova,
		.size = size,
	};

	return RESULT(ioctl(container, VFIO_IOMMU_MAP_DMA, &map));
}

static int vfio_iommu_unmap_dma(int container, uint32_t flags, uint64_t iova, uint64_t size, uint64_t *unmapped)
{
	struct vfio_iommu_type1_dma_unmap unmap = {
		.argsz = sizeof(unmap),
		.flags = flags,
		.iova = iova,
		.size = size,
	};
	int result = RESULT(ioctl(container, VFIO_IOMMU_UNMAP_DMA, &unmap));

	*unmapped = unmap.size;
	return result;
}

static int vfio_group_get_status(int group)
{
	struct vfio_group_status status = { .argsz = sizeof(status) };
	int result = RESULT(ioctl(group, VFIO_GROUP_GET_STATUS, &status));

	return result < 0 ? result : (int)status.flags;
}

static int vfio_group_set_container(int group, int container)
{
	return RESULT(ioctl(group, VFIO_GROUP_SET_CONTAINER, &container));
}

static int vfio_group_unset_container(int group)
{
	return RESULT(ioctl(group, VFIO_GROUP_UNSET_CONTAINER));
}

static int vfio_group_get_device_fd(int group, const char *name)
{
	return RESULT(ioctl(group, VFIO_GROUP_GET_DEVICE_FD, name));
}

static int vfio_device_get_info(int device, struct kvmpass_device_info *out)
{
	struct vfio_device_info info = { .argsz = sizeof(info) };
	int result = RESULT(ioctl(device, VFIO_DEVICE_GET_INFO, &info));

	if (result < 0)
		return result;
	*out = (struct kvmpass_device_info){ info.flags, info.num_regions, info.num_irqs };
	return 0;
}

static int vfio_device_get_region_info(int device, uint32_t index, struct kvmpass_region_info *out)
{
	union {
		struct vfio_region_info info;
		char space[4096];
	} answer = { .info = { .argsz = sizeof(answer), .index = index } };
	int result = RESULT(ioctl(device, VFIO_DEVICE_GET_REGION_INFO, &answer));

	if (result < 0)
		return result;
	if (answer.info.argsz > sizeof(answer))
		return -E2BIG;
	*out = (struct kvmpass_region_info){
		.flags = answer.info.flags,
		.size = answer.info.size,
		.offset = answer.info.offset,
	};
	uint32_t next = answer.info.flags & VFIO_REGION_INFO_FLAG_CAPS ? answer.info.cap_offset : 0;
	const struct vfio_info_cap_header *head;

	while ((head = kvmpass_capability(&answer, sizeof(answer), next, sizeof(*head)))) {
		if (head->id == VFIO_REGION_INFO_CAP_SPARSE_MMAP) {
			const struct vfio_region_info_cap_sparse_mmap *cap = (const void *)head;

			if (cap->nr_areas > KVMPASS_MAX_RANGES)
				return -E2BIG;
			out->has_sparse = 1;
			out->count = cap->nr_areas;
			for (uint32_t i = 0; i < cap->nr_areas; i++)
				out->areas[i] = (struct kvmpass_range){ cap->areas[i].offset, cap->areas[i].size };
		}
		if (head->next <= next)
			break;
		next = head->next;
	}
	return 0;
}

static int vfio_device_get_irq_info(int device, uint32_t index, struct kvmpass_irq_info *out)
{
	struct vfio_irq_info info = { .argsz = sizeof(info), .index = index };
	int result = RESULT(ioctl(device, VFIO_DEVICE_GET_IRQ_INFO, &info));

	if (result < 0)
		return result;
	*out = (struct kvmpass_irq_info){ info.flags, info.count };
	return 0;
}

static int vfio_device_set_irqs(int device, uint32_t flags, uint32_t index, uint32_t start, uint32_t count,
                                const int32_t *eventfds)
{
	union {
		struct vfio_irq_set set;
		char space[sizeof(struct vfio_irq_set) + KVMPASS_MAX_IRQS * sizeof(int32_t)];
	} request;
	size_t data = flags & VFIO_IRQ_SET_DATA_EVENTFD ? count * sizeof(int32_t) : 0;

	if (count > KVMPASS_MAX_IRQS)
		return -E2BIG;
	request.set = (struct vfio_irq_set){
		.argsz = (uint32_t)(sizeof(request.set) + data),
		.flags = flags,
		.index = index,
		.start = start,
		.count = count,
	};
	if (data)
		memcpy(request.set.data, eventfds, data);
	return RESULT(ioctl(device, VFIO_DEVICE_SET_IRQS, &request));
}

static int vfio_device_reset(int device)
{
	return RESULT(ioctl(device, VFIO_DEVICE_RESET));
}

static int vfio_device_get_pci_hot_reset_info(int device, struct kvmpass_hot_reset_info *out)
{
	union {
		struct vfio_pci_hot_reset_info info;
		char space[sizeof(struct vfio_pci_hot_reset_info) +
		           KVMPASS_MAX_DEPENDENT * sizeof(struct vfio_pci_dependent_device)];
	} answer = { .info = { .argsz = sizeof(answer) } };
	int result = RESULT(ioctl(device, VFIO_DEVICE_GET_PCI_HOT_RESET_INFO, &answer));

	if (result < 0)
		return result;
	if (answer.info.count > KVMPASS_MAX_DEPENDENT)
		return -E2BIG;
	out->flags = answer.info.flags;
	out->count = answer.info.count;
	for (uint32_t i = 0; i < answer.info.count; i++) {
		const struct vfio_pci_dependent_device *one = &answer.info.devices[i];

		out->devices[i] =
			(struct kvmpass_dependent_device){ one->group_id, one->segment, one->bus, one->devfn };
	}
	return 0;
}

static int vfio_device_pci_hot_reset(int device, uint32_t count, const int32_t *groups)
{
	union {
		struct vfio_pci_hot_reset reset;
		char space[sizeof(struct vfio_pci_hot_reset) + KVMPASS_MAX_DEPENDENT * sizeof(int32_t)];
	} request;

	if (count > KVMPASS_MAX_DEPENDENT)
		return -E2BIG;
	request.reset = (struct vfio_pci_hot_reset){
		.argsz = (uint32_t)(sizeof(request.reset) + count * sizeof(int32_t)),
		.count = count,
	};
	if (count)
		memcpy(request.reset.group_fds, groups, count * sizeof(int32_t));
	return RESULT(ioctl(device, VFIO_DEVICE_PCI_HOT_RESET, &request));
}
