"""Files of kernels: a bzImage, a module."""

from __future__ import annotations

import struct

from kvmpass.layout import MIB

CODE = bytes(range(256)) * 64  # 16 KiB
SETUP_SECTORS = 27


def bzimage(**fields: tuple[int, str, int]) -> bytes:
    """A bzImage of protocol 2.15; ``fields`` replace (offset, struct format, value) of the header."""
    values: dict[str, tuple[int, str, int]] = {
        "setup_sects": (0x1F1, "<B", SETUP_SECTORS),
        "syssize": (0x1F4, "<I", len(CODE) // 16),
        "boot_flag": (0x1FE, "<H", 0xAA55),
        "jump": (0x200, "<H", 0x6AEB),
        "magic": (0x202, "<I", 0x53726448),
        "version": (0x206, "<H", 0x020F),
        "kernel_version": (0x20E, "<H", 0x3000 - 0x200),
        "loadflags": (0x211, "<B", 0x01),
        "initrd_addr_max": (0x22C, "<I", 0x7FFF_FFFF),
        "kernel_alignment": (0x230, "<I", 0x20_0000),
        "relocatable": (0x234, "<B", 1),
        "xloadflags": (0x236, "<H", 0x3),
        "cmdline_size": (0x238, "<I", 2047),
        "pref_address": (0x258, "<Q", 16 * MIB),
        "init_size": (0x260, "<I", 8 * MIB),
    }
    values.update(fields)
    data = bytearray((SETUP_SECTORS + 1) * 512)
    for offset, form, value in values.values():
        struct.pack_into(form, data, offset, value)
    data[0x3000:0x3020] = b"6.12.1-test (someone) #1 SMP\0\0\0\0"
    return bytes(data) + CODE


def module(**info: str | list[str]) -> bytes:
    """An ELF relocatable with section names and .modinfo."""
    pairs = [(key, item) for key, value in info.items() for item in ([value] if isinstance(value, str) else value)]
    content = b"".join(f"{key}={value}".encode() + b"\0" for key, value in pairs)
    names = b"\0.shstrtab\0.modinfo\0"
    header = b"\x7fELF\x02\x01\x01" + bytes(9)
    header += struct.pack("<HHIQQQIHHHHHH", 1, 62, 1, 0, 0, 64 + len(names) + len(content), 0, 64, 0, 0, 64, 3, 1)
    sections = bytes(64)
    sections += struct.pack("<IIQQQQIIQQ", 1, 3, 0, 0, 64, len(names), 0, 0, 1, 0)
    sections += struct.pack("<IIQQQQIIQQ", 11, 1, 0, 0, 64 + len(names), len(content), 0, 0, 1, 0)
    return header + names + content + sections


def vmlinux(*segments: tuple[int, bytes, int], entry: int = 16 * MIB, **fields: tuple[int, str, int]) -> bytes:
    """An ELF program whose ``segments`` are (address, content, bytes in memory); ``fields`` are as of ``bzimage``."""
    segments = segments or ((16 * MIB, b"code" * 1024, 4096), (18 * MIB, b"data" * 512, 8192))
    table, content = b"", b""
    start = 64 + 56 * len(segments)
    for address, data, span in segments:
        table += struct.pack("<IIQQQQQQ", 1, 5, start + len(content), 0, address, len(data), span, 0x20_0000)
        content += data
    header = b"\x7fELF\x02\x01\x01" + bytes(9)
    header += struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, entry, 64, 0, 0, 64, 56, len(segments), 64, 0, 0)
    made = bytearray(header + table + content)
    for offset, form, value in fields.values():
        struct.pack_into(form, made, offset, value)
    return bytes(made)


def bzimage_of(payload: bytes, **fields: tuple[int, str, int]) -> bytes:
    """A bzImage with a compressed kernel: ``payload``, whose last four bytes are the decompressed size."""
    code = (CODE[:1024] + payload).ljust(-(-(1024 + len(payload)) // 16) * 16, b"\0")
    values = {
        "syssize": (0x1F4, "<I", len(code) // 16),
        "payload_offset": (0x248, "<I", 1024),
        "payload_length": (0x24C, "<I", len(payload)),
    }
    return bzimage(**(values | fields))[: -len(CODE)] + code
