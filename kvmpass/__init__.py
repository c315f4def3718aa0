"""kvmpass: PCI device assignment on AMD hosts."""
