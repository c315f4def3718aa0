"""What the kernel says of the host beside sysfs: its log, its command line, processes and mounts."""
