"""Memory types as firmware leaves them: the MTRRs (AMD64 manual volume 2, section 7.7).

All memory is write-back but for the VGA window, firmware's area below 1 MiB and what lies between the 32-bit window
for BARs and 4 GiB. BARs above that need no range: a driver's page attributes (PAT) decide. With the MTRRs off, as
after a processor's reset, Linux before 6.2 gives up PAT too and maps write-combining BARs uncached.
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
    """Values by MSR, for each CPU alike, in the order to be written. ``phys_bits``: of the guest's CPUID."""
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
