"""The guest's ACPI tables for a layout and a number of CPUs.

The platform is *hardware-reduced* (ACPI 6.5, section 3.11.1): no PM timer, no SCI, no 8259, no PIT. The tables
describe the CPUs (MADT), the PCI bus (MCFG, DSDT), the serial ports (DSDT), and how to power off and reset (FADT:
sleep registers and reset register, all in port space).
"""

from __future__ import annotations

import struct

from kvmpass import ports
from kvmpass.boot import aml
from kvmpass.errors import LayoutError
from kvmpass.kvm.system import check_apic_ids
from kvmpass.layout import IO_WINDOW_BASE, IO_WINDOW_SIZE, IOAPIC_BASE, LOCAL_APIC_BASE, MIB, Layout

RSDP_BASE = 0xF0000  # where kernels search for it that ignore boot_params.acpi_rsdp_addr
TABLES_BASE, TABLES_END = 0xE0000, 0xF0000

OEM_ID = b"KVMPAS"
OEM_TABLE = b"KVMPASS "
CREATOR = b"KVMP"

# FADT, table 5.10 (fixed feature flags) and 5.11 (IA-PC boot flags).
WBINVD, PROC_C1, POWER_BUTTON, SLEEP_BUTTON = 1 << 0, 1 << 2, 1 << 4, 1 << 5
RESET_REG_SUP, HW_REDUCED_ACPI = 1 << 10, 1 << 20
VGA_NOT_PRESENT, NO_ASPM, NO_CMOS_RTC = 1 << 2, 1 << 4, 1 << 5

PCI_HOST_UUID = "33db4d5b-1ff7-401c-9657-7441c03dd766"
# PCI Firmware Specification, table 4-6: PME, AER, the PCIe capability structure, LTR. Hot plug is ACPI's, not native.
OSC_GRANTED = 1 << 2 | 1 << 3 | 1 << 4 | 1 << 5


def _checksum(data: bytes | bytearray) -> int:
    return -sum(data) & 0xFF


def table(signature: bytes, revision: int, body: bytes) -> bytes:
    """Encode a system description table: the 36-byte header with its checksum, then ``body``."""
    header = struct.pack("<4sIBB6s8sI4sI", signature, 36 + len(body), revision, 0, OEM_ID, OEM_TABLE, 1, CREATOR, 1)
    whole = bytearray(header + body)
    whole[9] = _checksum(whole)
    return bytes(whole)


def _generic_address(port: int) -> bytes:
    """Encode a Generic Address Structure for one byte of port space."""
    return struct.pack("<BBBBQ", 1, 8, 0, 1, port)


def fadt(dsdt: int) -> bytes:
    """Encode the Fixed ACPI Description Table, revision 6.3, with the DSDT's address."""
    body = bytearray(276 - 36)

    def put(offset: int, data: bytes) -> None:
        body[offset - 36 : offset - 36 + len(data)] = data

    flags = WBINVD | PROC_C1 | POWER_BUTTON | SLEEP_BUTTON | RESET_REG_SUP | HW_REDUCED_ACPI
    put(40, struct.pack("<I", dsdt))
    put(109, struct.pack("<H", VGA_NOT_PRESENT | NO_ASPM | NO_CMOS_RTC))
    put(112, struct.pack("<I", flags))
    put(116, _generic_address(ports.RESET))
    put(128, bytes([ports.RESET_VALUE]))
    put(131, b"\x03")  # minor version
    put(140, struct.pack("<Q", dsdt))
    put(244, _generic_address(ports.SLEEP_CONTROL))
    put(256, _generic_address(ports.SLEEP_STATUS))
    put(268, OEM_TABLE)  # hypervisor vendor identity
    return table(b"FACP", 6, bytes(body))


def madt(cpus: int) -> bytes:
    """Encode the Multiple APIC Description Table: APIC ID = CPU number, one IOAPIC with inputs from GSI 0 on.

    PCAT_COMPAT is clear: there is no 8259 to disable.
    """
    body = struct.pack("<II", LOCAL_APIC_BASE, 0)
    for cpu in range(cpus):
        body += struct.pack("<BBBBI", 0, 8, cpu, cpu, 1)
    body += struct.pack("<BBBBII", 1, 12, 0, 0, IOAPIC_BASE, 0)
    return table(b"APIC", 5, body)


def mcfg(layout: Layout) -> bytes:
    """Encode the MCFG: the ECAM window of segment 0, for as many buses as it holds."""
    last_bus = layout.ecam.size // MIB - 1
    return table(b"MCFG", 1, bytes(8) + struct.pack("<QHBBI", layout.ecam.start, 0, 0, last_bus, 0))


def _device(path: str, hid: bytes, uid: int, *terms: bytes) -> bytes:
    return aml.device(path, aml.name("_HID", hid), aml.name("_UID", aml.integer(uid)), *terms)


def _resources(*descriptors: bytes) -> bytes:
    return aml.name("_CRS", aml.resources(*descriptors))


SLOTS = range(1, 32)  # the host bridge, in slot 0, cannot be unplugged


def _hotplug() -> list[bytes]:
    """Encode the PCI root's hotplug: the controller's registers, a device for each slot, and the method that scans.

    Notifications (ACPI 6.5, table 5.186): 1 device check, 3 eject request.
    """
    slots = [
        aml.device(
            f"S{slot:02X}",
            aml.name("_ADR", aml.integer(slot << 16)),
            aml.name("_SUN", aml.integer(slot)),
            aml.method("_EJ0", 1, aml.store(aml.integer(1 << slot), aml.name_string("PEJ0"))),
        )
        for slot in SLOTS
    ]
    scan = []
    for local, register, notification in ((0, "PUP0", 1), (1, "PDN0", 3)):
        scan.append(aml.store(aml.name_string(register), aml.local(local)))
        scan += [
            aml.if_(aml.and_(aml.local(local), aml.integer(1 << slot)), aml.notify(f"S{slot:02X}", notification))
            for slot in SLOTS
        ]
    return [
        aml.port_region("PHPR", ports.HOTPLUG_BASE, ports.HOTPLUG_SIZE),
        aml.dword_fields("PHPR", "PUP0", "PDN0", "PEJ0"),
        *slots,
        aml.method("PSCN", 0, *scan, serialized=True),
    ]


def _event_device() -> bytes:
    """Encode the generic event device (ACPI 6.5, section 5.6.9): its interrupt signals changed slots."""
    handler = aml.method("_EVT", 1, aml.name_string("\\_SB.PC00.PSCN"), serialized=True)
    return _device("GED0", aml.string("ACPI0013"), 0, _resources(aml.interrupt_level(ports.EVENT_GSI)), handler)


def _pci_root(layout: Layout) -> bytes:
    buses = layout.ecam.size // MIB
    windows = [
        aml.bus_numbers(0, buses),
        aml.io(ports.PCI_CONFIG_BASE, ports.PCI_CONFIG_SIZE),
        aml.io_window(IO_WINDOW_BASE, IO_WINDOW_SIZE),
        aml.memory_window(layout.mmio32.start, layout.mmio32.size),
    ]
    if layout.mmio64.size:
        windows.append(aml.memory_window(layout.mmio64.start, layout.mmio64.size))
    routes = [
        aml.package(*map(aml.integer, (number << 16 | 0xFFFF, pin, 0, ports.intx_gsi(number, pin))))
        for number in range(32)
        for pin in range(4)
    ]
    return _device(
        "PC00",
        aml.eisa_id("PNP0A08"),
        0,
        aml.name("_CID", aml.eisa_id("PNP0A03")),
        aml.name("_SEG", aml.ZERO),
        aml.name("_BBN", aml.ZERO),
        _resources(*windows),
        aml.name("_PRT", aml.package(*routes)),
        _osc(),
        *_hotplug(),
    )


def _osc() -> bytes:
    """Encode the host bridge's Operating System Capabilities: grant ``OSC_GRANTED`` only."""
    status, control = aml.name_string("CDW1"), aml.name_string("CDW3")
    wanted = aml.local(0)
    granted = aml.if_(
        aml.equal(aml.arg(0), aml.uuid_buffer(PCI_HOST_UUID)),
        aml.dword_field(aml.arg(3), 8, "CDW3"),
        aml.store(control, wanted),
        aml.and_(control, aml.integer(OSC_GRANTED), control),
        aml.if_(aml.not_equal(control, wanted), aml.or_(status, aml.integer(0x10), status)),
        aml.if_(aml.not_equal(aml.arg(1), aml.ONE), aml.or_(status, aml.integer(0x08), status)),
    )
    unknown = aml.else_(aml.or_(status, aml.integer(0x04), status))
    body = (aml.dword_field(aml.arg(3), 0, "CDW1"), granted, unknown, aml.return_(aml.arg(3)))
    return aml.method("_OSC", 4, *body, serialized=True)


def _serial(number: int, line: ports.SerialLine) -> bytes:
    resources = _resources(aml.io(line.port, ports.SERIAL_PORTS), aml.irq_edge(line.irq))
    return _device(f"COM{number}", aml.eisa_id("PNP0501"), number, resources)


def dsdt(layout: Layout, serial_ports: int) -> bytes:
    r"""Encode the DSDT: PCI root, the motherboard's resources, generic event device, serial ports, ``\_S5``."""
    resources = _resources(
        aml.memory32_fixed(layout.ecam.start, layout.ecam.size),
        aml.io(ports.POWER_BASE, ports.POWER_SIZE),
        aml.io(ports.HOTPLUG_BASE, ports.HOTPLUG_SIZE),
    )
    board = _device("MBRD", aml.eisa_id("PNP0C02"), 0, resources)
    serial = [_serial(number, line) for number, line in enumerate(ports.SERIAL_LINES[:serial_ports], 1)]
    sleep = aml.name("\\_S5", aml.package(aml.integer(ports.S5_TYPE), aml.ZERO))
    return table(b"DSDT", 2, aml.scope("\\_SB", _pci_root(layout), _event_device(), board, *serial) + sleep)


def rsdp(xsdt: int) -> bytes:
    """Encode the Root System Description Pointer, revision 2, with the XSDT's address."""
    head = bytearray(struct.pack("<8sB6sBI", b"RSD PTR ", 0, OEM_ID, 2, 0))
    head[8] = _checksum(head)
    whole = bytearray(bytes(head) + struct.pack("<IQB3x", 36, xsdt, 0))
    whole[32] = _checksum(whole)
    return bytes(whole)


def build_tables(layout: Layout, cpus: int, serial_ports: int = len(ports.SERIAL_LINES)) -> dict[int, bytes]:
    """Return all tables of a machine by guest-physical address, up to ``TABLES_END``, and the RSDP at ``RSDP_BASE``.

    ``serial_ports``: how many they describe, from COM1 on. Raises ``LayoutError`` for more than 255 CPUs.
    """
    check_apic_ids(cpus)
    placed: dict[int, bytes] = {}
    at = TABLES_BASE

    def place(data: bytes) -> int:
        nonlocal at
        start, at = at, (at + len(data) + 15) & ~15
        if at > TABLES_END:
            raise LayoutError(f"the ACPI tables for {cpus} CPUs need more than {TABLES_END - TABLES_BASE} bytes")
        placed[start] = data
        return start

    dsdt_at = place(dsdt(layout, serial_ports))
    others = [place(fadt(dsdt_at)), place(madt(cpus)), place(mcfg(layout))]
    xsdt_at = place(table(b"XSDT", 1, struct.pack(f"<{len(others)}Q", *others)))
    placed[RSDP_BASE] = rsdp(xsdt_at)
    return placed
