"""The fixed resources of the guest's board: port numbers and interrupt lines.

The ACPI tables and the machine's port bus must agree on them; both read them here.
"""

from __future__ import annotations

from kvmpass._dataclass import dataclass

SERIAL_PORTS = 8  # registers, one port each


@dataclass(frozen=True, slots=True)
class SerialLine:
    """The resources of a 16550."""

    port: int
    """Its first port."""
    irq: int
    """Its interrupt line (GSI, edge-triggered)."""


# The PC's bases for COM1 to COM4, which Linux names ttyS0 to ttyS3. An edge-triggered line cannot be shared, so
# COM3 and COM4 have lines of their own instead of the PC's 4 and 3.
SERIAL_LINES = (SerialLine(0x3F8, 4), SerialLine(0x2F8, 3), SerialLine(0x3E8, 10), SerialLine(0x2E8, 11))

# One block of ports for power and reset, clear of PCI's 0xcf8-0xcff (so of 0xcf9, too).
POWER_BASE, POWER_SIZE = 0x600, 8
SLEEP_CONTROL = 0x600
SLEEP_STATUS = 0x601
RESET = 0x604
RESET_VALUE = 0x06
S5_TYPE = 5  # the SLP_TYP that the DSDT's \\_S5 names

# PCI hot plug (kvmpass.board.hotplug), and the generic event device's interrupt: the PC's ACPI line.
HOTPLUG_BASE, HOTPLUG_SIZE = 0x610, 12
EVENT_GSI = 9

PCI_CONFIG_BASE, PCI_CONFIG_SIZE = 0xCF8, 8  # address and data: PCI Local Bus 3.0, section 3.2.2.3
PCI_ADDRESS_SIZE = 4  # the address is first

# INTx lines: the interrupt inputs of KVM's IOAPIC that no ISA interrupt uses.
INTX_FIRST, INTX_COUNT = 16, 8
IOAPIC_PINS = 24

# Where a PC's firmware reads the kind of a reset; Linux writes it in native_machine_emergency_restart().
WARM_RESET_WORD = 0x472
WARM_RESET_MAGIC = 0x1234


def intx_gsi(device: int, pin: int) -> int:
    """Return the GSI of an INTx pin (0: INTA) of device number ``device`` on bus 0, as in the DSDT's ``_PRT``."""
    return INTX_FIRST + (device + pin) % INTX_COUNT
