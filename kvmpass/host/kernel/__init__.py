"""Sources besides sysfs: the kernel's log and command line, modules, processes and mounts."""
