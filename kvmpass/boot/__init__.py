"""What a Linux guest finds at boot: the boot protocol, ACPI tables, CPUID, the memory map."""
