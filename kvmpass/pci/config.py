"""Configuration space: register offsets (PCI Local Bus 3.0, section 6.1) and the list of capabilities."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

COMMAND = 0x04
STATUS = 0x06
HEADER_TYPE = 0x0E
BAR0 = 0x10
ROM = 0x30
CAPABILITIES = 0x34
INTERRUPT_LINE = 0x3C
INTERRUPT_PIN = 0x3D
HEADER_SIZE = 0x40
CONVENTIONAL_SIZE = 0x100
EXTENDED_SIZE = 0x1000

COMMAND_IO = 1 << 0
COMMAND_MEMORY = 1 << 1
COMMAND_MASTER = 1 << 2
STATUS_CAPABILITIES = 1 << 4

CAP_MSIX = 0x11
CAP_EXPRESS = 0x10

_MAX_CAPABILITIES = 48  # what fits: 192 bytes, 4 at least for each


@dataclass(frozen=True, slots=True)
class Capability:
    id: int
    offset: int


def capabilities(read: Callable[[int, int], int]) -> list[Capability]:
    """Walk the list with ``read(offset, size)``. A loop or a pointer into the header ends it."""
    found: list[Capability] = []
    if not read(STATUS, 2) & STATUS_CAPABILITIES:
        return found
    offset = read(CAPABILITIES, 1) & ~3
    while HEADER_SIZE <= offset < CONVENTIONAL_SIZE and len(found) < _MAX_CAPABILITIES:
        if any(capability.offset == offset for capability in found):
            break
        found.append(Capability(read(offset, 1), offset))
        offset = read(offset + 1, 1) & ~3
    return found
