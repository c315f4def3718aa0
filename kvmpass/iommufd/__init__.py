"""Objects over /dev/iommu (include/uapi/linux/iommufd.h, Documentation/userspace-api/iommufd.rst)."""

from kvmpass.iommufd.iommufd import Iommufd, IovaRanges

__all__ = ["Iommufd", "IovaRanges"]
