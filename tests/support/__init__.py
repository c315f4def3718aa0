"""What tests share: hosts, kernels and devices that are made up, and witnesses in the emulated host."""
