"""Pseudonyms for addresses and serial numbers in a recording: the same value gets the same one everywhere.

Replaced: addresses of network interfaces (MAC) and of the network (IPv4, IPv6, in text and in the tables of
``/proc/net``), serial numbers, UUIDs and world-wide names, this machine's name, names of users in paths. Addresses
of one network stay in one network, so that routes keep their meaning. Everything else stays: PCI addresses, models,
interface names, mount points, names of processes.
"""

from __future__ import annotations

import hmac
import ipaddress
import os
import re
import secrets
from collections.abc import Callable

from kvmpass._lazy import lazy_pattern

_MAC = lazy_pattern(r"(?<![0-9a-fA-F:])(?:[0-9a-fA-F]{2}[:-]){5,19}[0-9a-fA-F]{2}(?![0-9a-fA-F:])")
_MAC_NAME = lazy_pattern(r"(?<=enx)[0-9a-f]{12}\b")
_UUID = lazy_pattern(r"\b[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}\b")
_VOLUME = lazy_pattern(r"(?<=UUID=)[0-9A-Za-z-]{4,36}")
_IPV4 = lazy_pattern(r"(?<![\d.])(?:\d{1,3}\.){3}\d{1,3}(?![\d.])")
_IPV6 = lazy_pattern(r"(?<![0-9a-zA-Z:.])[0-9a-fA-F:]*:[0-9a-fA-F:]*:[0-9a-fA-F]+(?![0-9a-zA-Z:.])")
# What follows one of these words is a serial number, to the end of the word or, for USB's, of the line.
_SERIAL = lazy_pattern(
    r"(?P<before>\b(?:serial(?:[ _]?(?:number|no))?|uniq|s/n|wwid|wwn|wwpn|wwnn|nguid|eui64)\b[ :=\"]+)"
    r"(?P<number>[^\s\",;]+)",
    re.IGNORECASE,
)
_USB_SERIAL = lazy_pattern(r"(?P<before>SerialNumber: )(?P<number>.+)")
_WORLD_WIDE = lazy_pattern(
    r"\b(?P<before>(?:wwn|nvme|scsi|ata|eui|naa|uuid)[-.](?:0x)?)(?P<number>[0-9a-fA-F]{12,32})\b"
)
_NQN = lazy_pattern(r"(?P<before>\bnqn\.)(?P<number>[^\s\",]+)")
_HOME = lazy_pattern(r"(?P<before>/(?:home|media|run/media)/)(?P<number>[^/\s\\]+)")
_SERIAL_FILES = frozenset(
    {"serial", "wwid", "unique_id", "nguid", "eui", "uuid", "subsysnqn", "hostnqn", "hostid", "vpd_pg80", "vpd_pg83"}
)
_TABLES = frozenset({"route", "ipv6_route", "tcp", "tcp6", "udp", "udp6"})
_HEX_ADDRESS = lazy_pattern(r"(?<![0-9A-Fa-f])(?:[0-9A-Fa-f]{32}|[0-9A-Fa-f]{8})(?![0-9A-Fa-f])")
_UNTOUCHED = frozenset({"osrelease", "modules.dep", "modules.builtin", "cpuinfo", "meminfo", "iomem"})
_PRIVATE = frozenset({0, 10, 127, 169, 172, 192})
_SERIAL_CAPABILITY = 0x0003  # PCI Express 5.0, 7.9.3


class Anonymity:
    """One set of pseudonyms: each object has its own.

    Synchronization: for one thread.
    """

    def __init__(self, host: str | None = None) -> None:
        self._key = secrets.token_bytes(16)
        self._known: dict[tuple[str, str], str] = {}
        host = os.uname().nodename.partition(".")[0] if host is None else host
        self._host = re.compile(rf"\b{re.escape(host)}\b") if len(host) > 2 and host != "localhost" else None

    def name(self, path: str) -> str:
        """Return a path of the tree with pseudonyms."""
        return "/".join(self.text(part) for part in path.split("/"))

    def content(self, path: str, kind: str, data: bytes) -> bytes:
        """Return the content of a file, or the target of a link (``kind`` is ``link``), with pseudonyms."""
        file = path.rpartition("/")[2]
        if kind == "link":
            return self.name(data.decode(errors="surrogateescape")).encode(errors="surrogateescape")
        if not data or file in _UNTOUCHED or path.endswith("/tables/IVRS"):
            return data
        if file == "config":
            return _without_serial(data)
        text = data.decode(errors="surrogateescape")
        if file in _SERIAL_FILES:
            text = self._number("serial", text.strip()) + "\n"
        elif file in _TABLES and "proc/" in path:
            text = self.text(_HEX_ADDRESS.sub(lambda found: self._hex(found[0], file), text))
        else:
            text = self.text(text)
        return text.encode(errors="surrogateescape")

    def text(self, text: str) -> str:
        """Return any text with pseudonyms."""
        for pattern in (_USB_SERIAL, _SERIAL, _WORLD_WIDE, _NQN):
            text = pattern.sub(lambda found: found["before"] + self._number("serial", found["number"]), text)
        text = _HOME.sub(lambda found: found["before"] + self._number("user", found["number"]), text)
        text = _UUID.sub(lambda found: self._uuid(found[0]), text)
        text = _VOLUME.sub(lambda found: found[0] if _UUID.fullmatch(found[0]) else self._volume(found[0]), text)
        text = _MAC.sub(lambda found: self._mac(found[0]), text)
        text = _MAC_NAME.sub(lambda found: self._mac(found[0]).replace(":", ""), text)
        text = _IPV4.sub(lambda found: self._address(found[0]), text)
        text = _IPV6.sub(lambda found: self._address(found[0]), text)
        return text if self._host is None else self._host.sub("host", text)

    # --- one kind each

    def _once(self, kind: str, value: str, make: Callable[[int], str]) -> str:
        key = kind, value.lower()
        if key not in self._known:
            self._known[key] = make(sum(known == kind for known, _ in self._known) + 1)
        return self._known[key]

    def _number(self, kind: str, value: str) -> str:
        return value if value.startswith(f"{kind}-") else self._once(kind, value, lambda count: f"{kind}-{count}")

    def _uuid(self, value: str) -> str:
        return self._once("uuid", value, lambda count: f"00000000-0000-4000-8000-{count:012x}")

    def _volume(self, value: str) -> str:
        return self._once("volume", value, lambda count: f"{count:04X}-0000")

    def _mac(self, value: str) -> str:
        plain = value.replace(":", "").replace("-", "")
        if set(plain) <= {"0"} or set(plain.lower()) == {"f"}:
            return value
        return self._once(
            "mac", plain, lambda count: f"02:00:00:{count >> 16:02x}:{count >> 8 & 255:02x}:{count & 255:02x}"
        )

    def _address(self, value: str) -> str:
        try:
            found = ipaddress.ip_address(value)
        except ValueError:  # a version, a time
            return value
        if isinstance(found, ipaddress.IPv4Address):
            return str(ipaddress.IPv4Address(self._ipv4(int(found))))
        return str(ipaddress.IPv6Address(self._ipv6(int(found))))

    def _hex(self, value: str, table: str) -> str:
        """Replace an address of ``/proc/net``.

        IPv4 is in host order, IPv6 in words of host order, except for routes: those are in network order.
        """
        swapped = bytes.fromhex(value)
        if len(value) == 8:
            if table == "ipv6_route":  # metrics and flags
                return value
            return self._ipv4(int.from_bytes(swapped, "little")).to_bytes(4, "little").hex().upper()
        if table == "ipv6_route":
            return self._ipv6(int.from_bytes(swapped, "big")).to_bytes(16, "big").hex()
        words = b"".join(swapped[at : at + 4][::-1] for at in range(0, 16, 4))
        mapped = self._ipv6(int.from_bytes(words, "big")).to_bytes(16, "big")
        return b"".join(mapped[at : at + 4][::-1] for at in range(0, 16, 4)).hex().upper()

    def _ipv4(self, value: int) -> int:
        first = value >> 24
        if first in (0, 127) or first >= 224 or bin(value).count("01") == 0:  # none, loopback, multicast, a mask
            return value
        return self._bits(value, 32, 8) & 0xFF_FFFF | (first if first in _PRIVATE else 198) << 24

    def _ipv6(self, value: int) -> int:
        if value >> 32 == 0xFFFF:
            return 0xFFFF << 32 | self._ipv4(value & 0xFFFF_FFFF)
        return value if value < 1 << 16 else self._bits(value, 128, 16)

    def _bits(self, value: int, width: int, kept: int) -> int:
        """Flip each bit after the first ``kept`` by a hash of those before it: common prefixes stay common."""
        result = value
        for at in range(width - kept - 1, -1, -1):
            prefix = f"{width}:{at}:{value >> (at + 1):x}".encode()
            result ^= (hmac.digest(self._key, prefix, "sha256")[0] & 1) << at
        return result


def _without_serial(config: bytes) -> bytes:
    """Return configuration space without the Device Serial Number."""
    at, data = 0x100, bytearray(config)
    for _ in range(960):  # include/uapi/linux/pci_regs.h: as many as fit
        if not 0x100 <= at <= len(data) - 12:
            break
        header = int.from_bytes(data[at : at + 4], "little")
        if header & 0xFFFF == _SERIAL_CAPABILITY:
            data[at + 4 : at + 12] = bytes(8)
        at = header >> 20 & 0xFFC
    return bytes(data)
