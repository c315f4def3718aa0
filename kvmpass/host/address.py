"""PCI addresses."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Self

from kvmpass._dataclass import dataclass
from kvmpass.errors import BadAddress

PATTERN = r"[0-9a-f]{4,8}:[0-9a-f]{2}:[01][0-9a-f]\.[0-7]"
"""An address as the kernel writes it."""
_HEX = frozenset("0123456789abcdefABCDEF")


@dataclass(frozen=True, slots=True, order=True)
class Bdf:
    """The address of a PCI function."""

    domain: int
    """16 bits; 32 on hosts with VMD."""
    bus: int
    """8 bits."""
    device: int
    """5 bits."""
    function: int
    """3 bits."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse ``dddd:bb:dd.f`` or ``bb:dd.f`` (domain 0), hexadecimal. Raises ``BadAddress``."""
        place, _, function = text.strip().rpartition(".")
        words = place.split(":")
        if len(words) == 2:
            words.insert(0, "0000")
        # By hand: to compile a regular expression takes longer than all parsing of most commands.
        if (
            [len(word) for word in words[1:]] == [2, 2]
            and 4 <= len(words[0]) <= 8
            and _HEX.issuperset("".join(words))
        ):
            domain, bus, device = (int(word, 16) for word in words)
            if device <= 0x1F and len(function) == 1 and function in "01234567":
                return cls(domain, bus, device, int(function))
        raise BadAddress(
            f"{text!r} is not a PCI address: expected [dddd:]bb:dd.f in hexadecimal, such as 0000:01:00.0",
            "kvmpass list shows the addresses of this host's devices",
        )

    @property
    def function_0(self) -> Self:
        """The first function of the same device."""
        return type(self)(self.domain, self.bus, self.device, 0)

    def __str__(self) -> str:
        return f"{self.domain:04x}:{self.bus:02x}:{self.device:02x}.{self.function}"


def on_path(path: str) -> list[Bdf]:
    """Return the PCI functions among the components of a path in sysfs, from the root on."""
    return [Bdf.parse(part) for part in path.split("/") if re.fullmatch(PATTERN, part)]


def parse_distinct(addresses: Iterable[Bdf | str]) -> tuple[Bdf, ...]:
    """Parse addresses. Raises ``BadAddress``, also for a duplicate."""
    bdfs = tuple(Bdf.parse(address) if isinstance(address, str) else address for address in addresses)
    for bdf in bdfs:
        if bdfs.count(bdf) > 1:
            raise BadAddress(f"{bdf} is named twice", "name each device once")
    return bdfs
