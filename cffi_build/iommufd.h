/*
 * The ABI of /dev/iommu, and of VFIO's character devices over it, declared here: Linux 6.2 and 6.6 brought them, 6.19
 * dma-bufs of BARs, and the headers of the build machine may be older. Layouts and numbers are those of include/uapi/linux/iommufd.h and vfio.h,
 * which tests/unit/iommufd/test_abi.py compares where they are installed.
 */
#ifndef KVMPASS_IOMMUFD_H
#define KVMPASS_IOMMUFD_H

#include <stdint.h>
#include <linux/ioctl.h>

#define KVMPASS_IOMMUFD(number) _IO(';', number)
#define KVMPASS_IOMMU_DESTROY KVMPASS_IOMMUFD(0x80)
#define KVMPASS_IOMMU_IOAS_ALLOC KVMPASS_IOMMUFD(0x81)
#define KVMPASS_IOMMU_IOAS_IOVA_RANGES KVMPASS_IOMMUFD(0x84)
#define KVMPASS_IOMMU_IOAS_MAP KVMPASS_IOMMUFD(0x85)
#define KVMPASS_IOMMU_IOAS_UNMAP KVMPASS_IOMMUFD(0x86)
#define KVMPASS_IOMMU_HWPT_ALLOC KVMPASS_IOMMUFD(0x89)
#define KVMPASS_IOMMU_GET_HW_INFO KVMPASS_IOMMUFD(0x8a)
#define KVMPASS_IOMMU_HWPT_SET_DIRTY_TRACKING KVMPASS_IOMMUFD(0x8b) /* Linux 6.7, and the next */
#define KVMPASS_IOMMU_HWPT_GET_DIRTY_BITMAP KVMPASS_IOMMUFD(0x8c)
#define KVMPASS_IOMMU_IOAS_MAP_FILE KVMPASS_IOMMUFD(0x8f) /* Linux 6.13 */

/* Flags of map and map file. */
#define KVMPASS_IOAS_FIXED_IOVA (1u << 0)
#define KVMPASS_IOAS_WRITEABLE (1u << 1)
#define KVMPASS_IOAS_READABLE (1u << 2)

/* In each of iommufd's: `size` is the size of the structure in bytes. */
struct kvmpass_iommu_destroy {
	uint32_t size;
	uint32_t id;
};

struct kvmpass_ioas_alloc {
	uint32_t size;
	uint32_t flags; /* 0 */
	uint32_t out_ioas_id;
};

struct kvmpass_iova_range {
	uint64_t start;
	uint64_t last;
};

struct kvmpass_ioas_iova_ranges {
	uint32_t size;
	uint32_t ioas_id;
	uint32_t num_iovas; /* in: room in the array; out: ranges that there are */
	uint32_t reserved; /* 0 */
	uint64_t allowed_iovas; /* address of an array of struct kvmpass_iova_range */
	uint64_t out_iova_alignment;
};

struct kvmpass_ioas_map {
	uint32_t size;
	uint32_t flags;
	uint32_t ioas_id;
	uint32_t reserved; /* 0 */
	uint64_t user_va;
	uint64_t length;
	uint64_t iova;
};

struct kvmpass_ioas_map_file {
	uint32_t size;
	uint32_t flags;
	uint32_t ioas_id;
	int32_t fd;
	uint64_t start; /* in the file */
	uint64_t length;
	uint64_t iova;
};

struct kvmpass_ioas_unmap {
	uint32_t size;
	uint32_t ioas_id;
	uint64_t iova;
	uint64_t length; /* out: bytes that were mapped */
};

#define KVMPASS_IOMMU_HWPT_ALLOC_DIRTY_TRACKING (1u << 1)

struct kvmpass_hwpt_alloc {
	uint32_t size;
	uint32_t flags;
	uint32_t dev_id;
	uint32_t pt_id; /* the IOAS */
	uint32_t out_hwpt_id;
	uint32_t reserved; /* 0 */
	uint32_t data_type; /* 0: no data, as in the next two */
	uint32_t data_len;
	uint64_t data_uptr;
};

#define KVMPASS_IOMMU_HW_CAP_DIRTY_TRACKING (1u << 0)

struct kvmpass_hw_info {
	uint32_t size;
	uint32_t flags; /* 0 */
	uint32_t dev_id;
	uint32_t data_len; /* 0: no data */
	uint64_t data_uptr;
	uint32_t out_data_type;
	uint32_t reserved; /* 0 */
	uint64_t out_capabilities; /* Linux 6.7 */
};

#define KVMPASS_IOMMU_HWPT_DIRTY_TRACKING_ENABLE (1u << 0)

struct kvmpass_hwpt_set_dirty_tracking {
	uint32_t size;
	uint32_t flags;
	uint32_t hwpt_id;
	uint32_t reserved; /* 0 */
};

struct kvmpass_hwpt_get_dirty_bitmap {
	uint32_t size;
	uint32_t hwpt_id;
	uint32_t flags; /* 0: the bits are cleared in the tables */
	uint32_t reserved; /* 0 */
	uint64_t iova;
	uint64_t length;
	uint64_t page_size; /* of each bit */
	uint64_t data; /* address of the bitmap, words of 64 bits, to which bits are added */
};

#define KVMPASS_VFIO(number) _IO(';', 100 + (number))
#define KVMPASS_VFIO_DEVICE_BIND_IOMMUFD KVMPASS_VFIO(18)
#define KVMPASS_VFIO_DEVICE_ATTACH_IOMMUFD_PT KVMPASS_VFIO(19)
#define KVMPASS_VFIO_DEVICE_DETACH_IOMMUFD_PT KVMPASS_VFIO(20)

#define KVMPASS_VFIO_BIND_TOKEN (1u << 0) /* Linux 6.17 */

/* In each of VFIO's: `argsz` is the size of the structure in bytes. */
struct kvmpass_vfio_bind {
	uint32_t argsz;
	uint32_t flags;
	int32_t iommufd;
	uint32_t out_devid;
	uint64_t token_uuid_ptr; /* 16 bytes; Linux 6.17, unless the flag is set not read */
};

struct kvmpass_vfio_attach {
	uint32_t argsz;
	uint32_t flags; /* 0 */
	uint32_t pt_id; /* in: an IOAS; out: what the device was attached to */
};

struct kvmpass_vfio_detach {
	uint32_t argsz;
	uint32_t flags; /* 0 */
};

#define KVMPASS_VFIO_DEVICE_FEATURE KVMPASS_VFIO(17)
#define KVMPASS_VFIO_FEATURE_GET (1u << 16)
#define KVMPASS_VFIO_FEATURE_PROBE (1u << 18)
#define KVMPASS_VFIO_FEATURE_DMA_BUF 11 /* Linux 6.19 */

struct kvmpass_vfio_feature {
	uint32_t argsz;
	uint32_t flags; /* the feature's number, and what to do with it */
};

struct kvmpass_vfio_dma_range {
	uint64_t offset; /* in the BAR */
	uint64_t length;
};

/* Behind struct kvmpass_vfio_feature; as many ranges follow as it says. */
struct kvmpass_vfio_dma_buf {
	uint32_t region_index; /* number of the BAR */
	uint32_t open_flags; /* of the descriptor */
	uint32_t flags; /* 0 */
	uint32_t nr_ranges;
};

#endif
