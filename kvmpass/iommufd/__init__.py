"""Objects over /dev/iommu (include/uapi/linux/iommufd.h, Documentation/userspace-api/iommufd.rst)."""

from kvmpass.iommufd.iommufd import HwInfo, Iommufd, IovaRanges

__all__ = ["HwInfo", "Iommufd", "IovaRanges"]
