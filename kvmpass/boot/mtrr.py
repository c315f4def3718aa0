"""Memory types as set by firmware: the MTRRs (AMD64 manual volume 2, section 7.7).

Memory is write-back, except the VGA window, the firmware area below 1 MiB, and the range from the 32-bit window for
BARs to 4 GiB. BARs above 4 GiB need no range: a driver's page attributes (PAT) decide. With the MTRRs disabled, as
after a processor's reset, Linux before 6.2 disables PAT too, and maps write-combining BARs uncached.
"""

from __future__ import annotations

from kvmpass.layout import GIB, MMIO32_BASE

DEF_TYPE = 0x2FF
ENABLE, FIXED_ENABLE = 1 << 11, 1 << 10
UNCACHED, WRITE_PROTECTED, WRITE_BACK = 0, 5, 6
PHYS_BASE0, PHYS_MASK0, VALID = 0x200, 0x201, 1 << 11
FIX64K_00000, FIX16K_80000, FIX16K_A0000 = 0x250, 0x258, 0x259
FIX4K_C0000 = range(0x268, 0x270)  # eight of them, to 0xFFFFF


def mtrrs(phys_bits: int) -> dict[int, int]:
    """Return values by MSR, the same for each CPU, in the order of writing. ``phys_bits``: of the guest's CPUID."""
    every = 0x0101_0101_0101_0101  # a type for each eighth of a fixed range
    return {
        FIX64K_00000: WRITE_BACK * every,
        FIX16K_80000: WRITE_BACK * every,
        FIX16K_A0000: UNCACHED * every,
        **dict.fromkeys(FIX4K_C0000, WRITE_PROTECTED * every),
        PHYS_BASE0: MMIO32_BASE | UNCACHED,
        PHYS_MASK0: (1 << phys_bits) - (4 * GIB - MMIO32_BASE) | VALID,
        DEF_TYPE: ENABLE | FIXED_ENABLE | WRITE_BACK,
    }
