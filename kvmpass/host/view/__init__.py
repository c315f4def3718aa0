"""PCI devices and IOMMU groups of this host, for display: inventory, description, filters, events."""
