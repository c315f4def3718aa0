/* One function for each ioctl of /dev/iommu, and of VFIO's devices with it: -errno or the result out (iommufd.h). */
#include <fcntl.h>
#include "iommufd.h"

struct kvmpass_iova_ranges {
	uint64_t alignment;
	uint32_t count; /* of ranges: first and last I/O virtual address */
	struct kvmpass_range ranges[KVMPASS_MAX_RANGES];
};

static int iommufd_destroy(int iommufd, uint32_t id)
{
	struct kvmpass_iommu_destroy destroy = { sizeof(destroy), id };

	return RESULT(ioctl(iommufd, KVMPASS_IOMMU_DESTROY, &destroy));
}

static int iommufd_ioas_alloc(int iommufd, uint32_t *ioas)
{
	struct kvmpass_ioas_alloc alloc = { .size = sizeof(alloc) };
	int result = RESULT(ioctl(iommufd, KVMPASS_IOMMU_IOAS_ALLOC, &alloc));

	*ioas = alloc.out_ioas_id;
	return result;
}

static int iommufd_ioas_iova_ranges(int iommufd, uint32_t ioas, struct kvmpass_iova_ranges *out)
{
	struct kvmpass_iova_range found[KVMPASS_MAX_RANGES];
	struct kvmpass_ioas_iova_ranges ranges = {
		.size = sizeof(ranges),
		.ioas_id = ioas,
		.num_iovas = KVMPASS_MAX_RANGES,
		.allowed_iovas = (uintptr_t)found,
	};
	int result = RESULT(ioctl(iommufd, KVMPASS_IOMMU_IOAS_IOVA_RANGES, &ranges));

	if (result < 0)
		return result;
	out->alignment = ranges.out_iova_alignment;
	out->count = ranges.num_iovas;
	for (uint32_t i = 0; i < ranges.num_iovas; i++)
		out->ranges[i] = (struct kvmpass_range){ found[i].start, found[i].last };
	return 0;
}

static int iommufd_ioas_map(int iommufd, uint32_t flags, uint32_t ioas, uint64_t hva, uint64_t length, uint64_t iova)
{
	struct kvmpass_ioas_map map = {
		.size = sizeof(map),
		.flags = flags,
		.ioas_id = ioas,
		.user_va = hva,
		.length = length,
		.iova = iova,
	};

	return RESULT(ioctl(iommufd, KVMPASS_IOMMU_IOAS_MAP, &map));
}

static int iommufd_ioas_map_file(int iommufd, uint32_t flags, uint32_t ioas, int fd, uint64_t start, uint64_t length,
                                 uint64_t iova)
{
	struct kvmpass_ioas_map_file map = {
		.size = sizeof(map),
		.flags = flags,
		.ioas_id = ioas,
		.fd = fd,
		.start = start,
		.length = length,
		.iova = iova,
	};

	return RESULT(ioctl(iommufd, KVMPASS_IOMMU_IOAS_MAP_FILE, &map));
}

static int iommufd_ioas_unmap(int iommufd, uint32_t ioas, uint64_t iova, uint64_t length, uint64_t *unmapped)
{
	struct kvmpass_ioas_unmap unmap = { sizeof(unmap), ioas, iova, length };
	int result = RESULT(ioctl(iommufd, KVMPASS_IOMMU_IOAS_UNMAP, &unmap));

	*unmapped = unmap.length;
	return result;
}

static int iommufd_hwpt_alloc(int iommufd, uint32_t flags, uint32_t devid, uint32_t ioas, uint32_t *hwpt)
{
	struct kvmpass_hwpt_alloc alloc = { .size = sizeof(alloc), .flags = flags, .dev_id = devid, .pt_id = ioas };
	int result = RESULT(ioctl(iommufd, KVMPASS_IOMMU_HWPT_ALLOC, &alloc));

	*hwpt = alloc.out_hwpt_id;
	return result;
}

static int iommufd_get_hw_info(int iommufd, uint32_t devid, uint64_t *capabilities)
{
	struct kvmpass_hw_info info = { .size = sizeof(info), .dev_id = devid };
	int result = RESULT(ioctl(iommufd, KVMPASS_IOMMU_GET_HW_INFO, &info));

	*capabilities = info.out_capabilities;
	return result;
}

static int iommufd_hwpt_set_dirty_tracking(int iommufd, uint32_t hwpt, uint32_t flags)
{
	struct kvmpass_hwpt_set_dirty_tracking set = { .size = sizeof(set), .flags = flags, .hwpt_id = hwpt };

	return RESULT(ioctl(iommufd, KVMPASS_IOMMU_HWPT_SET_DIRTY_TRACKING, &set));
}

static int iommufd_hwpt_get_dirty_bitmap(int iommufd, uint32_t hwpt, uint64_t iova, uint64_t length,
                                         uint64_t page_size, uint64_t *bitmap)
{
	struct kvmpass_hwpt_get_dirty_bitmap get = {
		.size = sizeof(get),
		.hwpt_id = hwpt,
		.iova = iova,
		.length = length,
		.page_size = page_size,
		.data = (uintptr_t)bitmap,
	};

	return RESULT(ioctl(iommufd, KVMPASS_IOMMU_HWPT_GET_DIRTY_BITMAP, &get));
}

/* `token`: 16 bytes, or NULL. */
static int vfio_device_bind_iommufd(int device, int iommufd, const uint8_t *token, uint32_t *devid)
{
	struct kvmpass_vfio_bind bind = {
		.argsz = sizeof(bind),
		.flags = token ? KVMPASS_VFIO_BIND_TOKEN : 0,
		.iommufd = iommufd,
		.token_uuid_ptr = (uintptr_t)token,
	};
	int result = RESULT(ioctl(device, KVMPASS_VFIO_DEVICE_BIND_IOMMUFD, &bind));

	*devid = bind.out_devid;
	return result;
}

static int vfio_device_attach_iommufd_pt(int device, uint32_t ioas)
{
	struct kvmpass_vfio_attach attach = { .argsz = sizeof(attach), .pt_id = ioas };

	return RESULT(ioctl(device, KVMPASS_VFIO_DEVICE_ATTACH_IOMMUFD_PT, &attach));
}

/* Whether the device has a feature that can be read: 0, or -ENOTTY and others. */
static int vfio_device_feature_probe(int device, uint32_t feature)
{
	struct kvmpass_vfio_feature probe = {
		.argsz = sizeof(probe),
		.flags = feature | KVMPASS_VFIO_FEATURE_GET | KVMPASS_VFIO_FEATURE_PROBE,
	};

	return RESULT(ioctl(device, KVMPASS_VFIO_DEVICE_FEATURE, &probe));
}

/* One range of a BAR as a dma-buf: its descriptor. */
static int vfio_device_feature_dma_buf(int device, uint32_t bar, uint64_t offset, uint64_t length)
{
	struct {
		struct kvmpass_vfio_feature feature;
		struct kvmpass_vfio_dma_buf dma_buf;
		struct kvmpass_vfio_dma_range range;
	} get = {
		.feature = { sizeof(get), KVMPASS_VFIO_FEATURE_DMA_BUF | KVMPASS_VFIO_FEATURE_GET },
		.dma_buf = { .region_index = bar, .open_flags = O_RDWR | O_CLOEXEC, .nr_ranges = 1 },
		.range = { offset, length },
	};

	return RESULT(ioctl(device, KVMPASS_VFIO_DEVICE_FEATURE, &get));
}

static int vfio_device_detach_iommufd_pt(int device)
{
	struct kvmpass_vfio_detach detach = { .argsz = sizeof(detach) };

	return RESULT(ioctl(device, KVMPASS_VFIO_DEVICE_DETACH_IOMMUFD_PT, &detach));
}
