"""The ACPI tables: pointers, lengths and checksums, and Intel's compiler as the oracle."""

from __future__ import annotations

import itertools
import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from kvmpass import ports
from kvmpass.boot import acpi, aml
from kvmpass.errors import LayoutError
from kvmpass.layout import ECAM_BASE, ECAM_SIZE, GIB, MIB, MMIO32_BASE, MMIO32_SIZE, Layout, Range
from kvmpass.pci.barspace import IO_WINDOW

LAYOUT = Layout(
    (Range(0, 512 * MIB),),
    Range(MMIO32_BASE, MMIO32_SIZE),
    Range(512 * GIB, 64 * GIB),
    Range(ECAM_BASE, ECAM_SIZE),
    (),
)


def by_signature(tables: dict[int, bytes]) -> dict[bytes, bytes]:
    return {data[:4]: data for data in tables.values()}


@pytest.mark.parametrize("cpus", [1, 2, 64, 255])
def test_pointers_lengths_and_checksums(cpus: int) -> None:
    memory = acpi.build_tables(LAYOUT, cpus)
    for data in memory.values():
        assert sum(data) & 0xFF == 0
    rsdp = memory[acpi.RSDP_BASE]
    assert sum(rsdp[:20]) & 0xFF == 0
    (xsdt_at,) = struct.unpack_from("<Q", rsdp, 24)
    xsdt = memory[xsdt_at]
    pointers = struct.unpack_from(f"<{(len(xsdt) - 36) // 8}Q", xsdt, 36)
    assert [memory[pointer][:4] for pointer in pointers] == [b"FACP", b"APIC", b"MCFG"]
    (dsdt_at,) = struct.unpack_from("<Q", memory[pointers[0]], 140)
    assert memory[dsdt_at][:4] == b"DSDT"
    for gpa, data in memory.items():
        if gpa != acpi.RSDP_BASE:
            assert struct.unpack_from("<I", data, 4)[0] == len(data)
    placed = sorted((gpa, gpa + len(data)) for gpa, data in memory.items())
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(placed))
    assert placed[0][0] >= 0xE0000
    assert placed[-1][1] <= 0x100000


def test_madt_names_every_cpu() -> None:
    data = by_signature(acpi.build_tables(LAYOUT, 255))[b"APIC"]
    found: dict[int, list[int]] = {0: [], 1: []}
    at = 44
    while at < len(data):
        kind, length = data[at], data[at + 1]
        found[kind].append(data[at + 3])
        at += length
    assert found[0] == list(range(255))
    assert len(found[1]) == 1


def test_fadt_is_hardware_reduced_with_reset_and_sleep_registers() -> None:
    data = by_signature(acpi.build_tables(LAYOUT, 1))[b"FACP"]
    (flags,) = struct.unpack_from("<I", data, 112)
    assert flags & 1 << 20
    assert flags & 1 << 10
    registers = {offset: struct.unpack_from("<BBBBQ", data, offset) for offset in (116, 244, 256)}
    assert {offset: (space, port) for offset, (space, _, _, _, port) in registers.items()} == {
        116: (1, ports.RESET),
        244: (1, ports.SLEEP_CONTROL),
        256: (1, ports.SLEEP_STATUS),
    }
    assert data[128] == ports.RESET_VALUE


def test_too_many_cpus_are_refused() -> None:
    """The 8-bit APIC ID 255 is broadcast; higher IDs need x2APIC."""
    for cpus in (256, 10000):
        with pytest.raises(LayoutError, match=f"{cpus} CPUs: a guest takes 255"):
            acpi.build_tables(LAYOUT, cpus)


@pytest.mark.parametrize("size", [0, 62, 63, 64, 0xFFD, 0xFFE, 0xFFF, 0x10000, 0xFFFFF])
def test_pkg_length_counts_itself(size: int) -> None:
    encoded = aml.pkg_length(size)
    more = encoded[0] >> 6
    value = encoded[0] & 0x3F if not more else encoded[0] & 0xF | int.from_bytes(encoded[1:], "little") << 4
    assert len(encoded) == 1 + more
    assert value == size + len(encoded)


def test_names_and_integers() -> None:
    assert aml.name_string("\\_SB.PC00") == b"\\\x2e_SB_PC00"
    assert aml.name_string("\\") == b"\\\x00"
    assert aml.integer(0xFFFF) == b"\x0b\xff\xff"
    assert aml.integer(1 << 32) == b"\x0e" + (1 << 32).to_bytes(8, "little")
    assert aml.eisa_id("PNP0A08") == b"\x0c\x41\xd0\x0a\x08"
    with pytest.raises(ValueError, match="64 bits"):
        aml.integer(1 << 64)
    assert aml.name_string("\\_SB.PC00.S01") == b"\\\x2f\x03_SB_PC00S01_"
    with pytest.raises(ValueError, match="invalid name"):
        aml.name_string("A.LONGNAME")


@pytest.mark.parametrize("mmio64", [Range(512 * GIB, 64 * GIB), Range(0, 0)])
def test_iasl_disassembles_and_recompiles_the_tables(tmp_path: Path, mmio64: Range) -> None:
    iasl = shutil.which("iasl")
    if iasl is None:
        pytest.skip("no iasl: apt-get install acpica-tools makes it run")
    layout = Layout(LAYOUT.ram, LAYOUT.mmio32, mmio64, LAYOUT.ecam, ())
    for signature, data in by_signature(acpi.build_tables(layout, 255)).items():
        if signature.startswith(b"RSD"):
            continue
        source = tmp_path / signature.decode()
        source.with_suffix(".dat").write_bytes(data)
        subprocess.run([iasl, "-d", source.with_suffix(".dat")], check=True, capture_output=True, cwd=tmp_path)
        again = subprocess.run(
            [iasl, "-oa", source.with_suffix(".dsl")], check=True, capture_output=True, text=True, cwd=tmp_path
        )
        assert "0 Errors, 0 Warnings, 0 Remarks" in again.stdout
        if signature == b"DSDT":
            text = source.with_suffix(".dsl").read_text()
            for line in ports.SERIAL_LINES:
                assert f"0x{line.port:04X}," in text
            assert "Name (\\_S5," in text
            ports_for_bars = re.search(
                r"WordIO.*?0x(\w+),\s+// Range Minimum.*?0x(\w+),\s+// Range Maximum", text, re.S
            )
            assert ports_for_bars, "the guest must put I/O BARs where they are decoded"
            assert [int(number, 16) for number in ports_for_bars.groups()] == [IO_WINDOW.start, IO_WINDOW.last]
            assert text.count("WordIO") == 1
            assert "Unknown" not in text
            # Recompiled bytes are the same, except the compiler fields in the header.
            assert source.with_suffix(".aml").read_bytes()[36:] == data[36:]
