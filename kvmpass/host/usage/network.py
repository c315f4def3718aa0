"""Network interfaces of a device: routes and connections through them, bridges and bonds over them."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from functools import lru_cache

from kvmpass._dataclass import dataclass
from kvmpass._lazy import lazy_pattern
from kvmpass.host.look import Look
from kvmpass.host.sysfs import PciDevice
from kvmpass.host.usage import Use

_NETWORK = (0x02, 0x0D)  # base classes: network, wireless
_INFINIBAND = 0x0207
_ESTABLISHED = "01"  # include/net/tcp_states.h; of UDP: connected
_MOST_NAMED = 3
_ADDRESS = lazy_pattern(r"(?:^|,)(?:addr|mountaddr|traddr)=([0-9a-fA-F.:]+)")

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


@dataclass(frozen=True, slots=True)
class Route:
    """One route of the main table."""

    network: Network
    """The destination."""
    interface: str
    """The output interface."""
    metric: int
    """The lowest wins among routes to the same network."""


def network(look: Look, device: PciDevice) -> Iterator[Use]:
    """Yield default routes, connections, network file systems, bridges, bonds, VLANs; or a hidden interface."""
    names = look.below("sys/class/net", device.bdf)
    if not names:
        yield from _elsewhere(look, device)
    for name in names:
        above = _above(look, name)
        default = next(
            (upper for upper in above if any(_is_default(look, route, upper) for route in routes(look))), ""
        )
        if default:
            yield Use(f"the default route goes through {name}{_via(name, default)}")
        yield from _memberships(look, name, above)
        peers = sorted({str(peer) for peer, interface in traffic(look) if interface in above})
        if peers and not default:
            more = f" and {len(peers) - _MOST_NAMED} more" if len(peers) > _MOST_NAMED else ""
            yield Use(f"{name} carries connections to {', '.join(peers[:_MOST_NAMED])}{more}")


def idle_routes(look: Look, device: PciDevice) -> list[str]:
    """Return the networks behind its interfaces: traffic without connections is not visible."""
    found = []
    for name in look.below("sys/class/net", device.bdf):
        above = _above(look, name)
        networks = [str(route.network) for route in routes(look) if route.interface in above and _is_shared(route)]
        if networks:
            found.append(f"{name} reaches {' and '.join(networks[:_MOST_NAMED])}")
    return found


def _is_shared(route: Route) -> bool:
    """Whether other machines are in that network: not a local address, not one that every interface has."""
    own = route.network.num_addresses == 1
    return not (own or route.network.is_link_local or route.network.is_multicast or route.network.is_loopback)


def _is_default(look: Look, route: Route, interface: str) -> bool:
    return route.interface == interface and route.network.prefixlen == 0


def _via(name: str, other: str) -> str:
    return "" if other == name else f" (through {other})"


def _above(look: Look, name: str) -> list[str]:
    """Return the interface, and all on top of it: bonds, bridges, VLANs, at any depth."""
    found, queue = [name], [name]
    while queue:
        for entry in look.sysfs.names("sys/class/net", queue.pop()):
            upper = entry.removeprefix("upper_")
            if entry.startswith("upper_") and upper not in found:
                found.append(upper)
                queue.append(upper)
    return found


def _memberships(look: Look, name: str, above: list[str]) -> Iterator[Use]:
    sysfs = look.sysfs
    master = sysfs.link("sys/class/net", name, "master")
    for upper in above[1:] if master is None else [master]:
        files = sysfs.names("sys/class/net", upper)
        kind = next((word for word in ("bridge", "bonding") if word in files), "")
        if kind or upper == master:
            what = {"bridge": "the bridge ", "bonding": "the bond "}.get(kind, "")
            yield Use(f"{name} is a port of {what}{upper}")
        elif f"upper_{upper}" in sysfs.names("sys/class/net", name):
            yield Use(f"{name} carries the interface {upper}")


def _elsewhere(look: Look, device: PciDevice) -> Iterator[Use]:
    """Yield a possible use: an interface in another network namespace is not visible, and neither is its device."""
    base = device.class_code >> 16
    if base not in _NETWORK or device.class_code >> 8 == _INFINIBAND or device.driver is None:
        return
    if look.foreign_interfaces:
        where = ", ".join(look.foreign_interfaces[:_MOST_NAMED])
        yield Use(
            f"its driver, {device.driver}, shows no interface here, and other network namespaces have some ({where})",
            seen=False,
        )


# --- routes and connections, once for all interfaces


def routes(look: Look) -> list[Route]:
    """Return the routes of the main table, most specific first."""
    return look.remembered("routes", _routes)


def traffic(look: Look) -> list[tuple[Address, str]]:
    """Return the peers of connections, network file systems and NVMe over fabrics, each with the interface to it."""
    return look.remembered("traffic", _traffic)


def _routes(look: Look) -> list[Route]:
    found = []
    for line in (look.text("proc/net/route") or "").splitlines()[1:]:
        fields = line.split()
        try:
            mask = _little(fields[7])
            network = ipaddress.IPv4Network((_little(fields[1]), mask.bit_count()), strict=False)
            found.append(Route(network, fields[0], int(fields[6])))
        except (IndexError, ValueError):
            continue
    for line in (look.text("proc/net/ipv6_route") or "").splitlines():
        fields = line.split()
        try:
            network6 = ipaddress.IPv6Network((int(fields[0], 16), int(fields[1], 16)), strict=False)
            found.append(Route(network6, fields[9], int(fields[5], 16)))
        except (IndexError, ValueError):
            continue
    return sorted(
        (route for route in found if route.interface != "lo"),
        key=lambda route: (-route.network.prefixlen, route.metric),
    )


def _little(text: str) -> int:
    return int.from_bytes(bytes.fromhex(text.zfill(8)), "little")


def _traffic(look: Look) -> list[tuple[Address, str]]:
    table, found = routes(look), []
    for peer in dict.fromkeys(_peers(look)):
        best = next((route for route in table if peer in route.network), None)
        if best is not None:
            found.append((peer, best.interface))
    return found


def _peers(look: Look) -> Iterator[Address]:
    for name in ("tcp", "tcp6", "udp", "udp6"):
        for line in (look.text(f"proc/net/{name}") or "").splitlines()[1:]:
            fields = line.split()
            if len(fields) > 3 and fields[3] == _ESTABLISHED:
                local, remote = _endpoint(fields[1]), _endpoint(fields[2])
                if remote is not None and remote != local and _is_remote(remote):
                    yield remote
    for mount in look.mounts:
        yield from _named(mount.options)
    for controller in look.sysfs.names("sys/class/nvme"):
        if look.sysfs.text("sys/class/nvme", controller, "transport") in ("tcp", "rdma"):
            yield from _named(look.sysfs.text("sys/class/nvme", controller, "address") or "")


def _is_remote(address: Address) -> bool:
    """Whether it is another machine's address with a route over one interface (link-local routes are on each)."""
    local = address.is_unspecified or address.is_loopback
    return not (local or address.is_multicast or (address.version == 6 and address.is_link_local))


def _named(text: str) -> Iterator[Address]:
    for match in _ADDRESS.finditer(text):
        try:
            yield ipaddress.ip_address(match[1])
        except ValueError:
            continue


@lru_cache(maxsize=4096)
def _endpoint(text: str) -> Address | None:
    """Return the address in ``0100007F:0016``: words of 32 bits, in the byte order of the processor."""
    digits = text.partition(":")[0]
    try:
        data = b"".join(bytes.fromhex(digits[at : at + 8])[::-1] for at in range(0, len(digits), 8))
        address = ipaddress.ip_address(data)
    except ValueError:
        return None
    mapped = getattr(address, "ipv4_mapped", None)
    return mapped or address
