"""Which memory holds a guest's bytes: pages as requested, or the largest (``auto``), and of which NUMA nodes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from kvmpass import host
from kvmpass._dataclass import dataclass
from kvmpass.errors import KvmpassError
from kvmpass.layout import GUEST_BITS, Reserved, plan_layout, size_text
from kvmpass.memory import Backing
from kvmpass.memory.mapping import memory_policy
from kvmpass.numa import NODES, node_numbers, split_nodes

AUTO = "auto"
_PREFERS_MANY = (5, 15)  # MPOL_PREFERRED_MANY
_LARGEST_FIRST = (Backing.HUGETLB_1G, Backing.HUGETLB_2M)


@dataclass(frozen=True, slots=True)
class BackingChoice:
    """What ``auto`` comes to, or what was asked for."""

    backing: Backing
    """The backing of the guest's RAM."""
    reason: str
    """Why: clauses with semicolons between them, one for each size of pages that was considered."""
    automatic: bool = False
    """Whether ``auto`` chose it."""

    def __str__(self) -> str:
        return f"{self.backing}: {self.reason}"


def choose_backing(
    sysfs: host.Sysfs, size: int, bdfs: Iterable[host.Bdf] = (), wanted: str = AUTO, *, shared: bool = False
) -> BackingChoice:
    """Return the backing for ``size`` bytes of guest memory: the largest pages that the host has for all of it.

    ``wanted``: ``auto``, or a value of ``Backing``. ``auto`` takes huge pages if ``size`` is a multiple of them and
    the checks of the host's pool and of this process's cgroups pass, else anonymous memory. ``bdfs``: the devices; if
    they are on one NUMA node of several, the reason says how much is free there. ``shared``: whether daemons map the
    memory, too. Only reads: if another process takes the pages before they are mapped, mapping fails
    (``NotEnoughMemory``, ``OSError``). Raises ``ValueError`` for another ``wanted``.
    """
    automatic = wanted == AUTO
    if automatic:
        backing, reason = _largest(sysfs, size, _only_node(sysfs, bdfs))
    else:
        backing = Backing(wanted)
        reason = "requested" if backing.huge_page else "no huge pages requested"
    return BackingChoice(backing.shared if shared else backing, reason, automatic)


def _largest(sysfs: host.Sysfs, size: int, node: int | None) -> tuple[Backing, str]:
    from kvmpass.host.blocker import mib
    from kvmpass.host.doctor import Outcome
    from kvmpass.hugepages import node_pool

    reasons: list[str] = []
    reserved = sysfs.reserved_regions()
    for backing in _LARGEST_FIRST:
        page = backing.huge_page
        pages = f"{size_text(page)} pages"
        if size % page:
            reasons.append(f"{pages}: {size_text(size)} is not a multiple")
            continue
        if not _from_zero(reserved, size, page):
            reasons.append(f"{pages}: this host reserves addresses that the guest's first one needs")
            continue
        findings = host.doctor.diagnose_huge_pages(sysfs, size, page)
        failed = next((finding for finding in findings if finding.outcome is Outcome.FAIL), None)
        reasons.append(f"{pages}: {(failed or findings[0]).summary}")
        if failed is None:
            near = None if node is None else sysfs.number(node_pool(node, page), "free_hugepages")
            if near is not None:
                reasons[-1] += f", {mib(near * page)} free on NUMA node {node}, the device's"
            return backing, "; ".join(reasons)
    return Backing.ANONYMOUS, "; ".join(reasons)


def _from_zero(reserved: Sequence[Reserved], size: int, page: int) -> bool:
    """Whether RAM of such pages begins at address 0, as kernels need it."""
    try:
        return plan_layout(size, reserved, GUEST_BITS, page).ram[0].start == 0
    except KvmpassError:  # the caller's own plan says why
        return False


def _devices_nodes(sysfs: host.Sysfs, bdfs: Iterable[host.Bdf]) -> dict[host.Bdf, int | None]:
    """Return the number of each device's NUMA node; None where the kernel knows none."""
    from kvmpass.host.sysfs import PCI_DEVICES

    nodes = {bdf: sysfs.number(PCI_DEVICES, str(bdf), "numa_node") for bdf in bdfs}
    return {bdf: node if node is not None and node >= 0 else None for bdf, node in nodes.items()}


def _only_node(sysfs: host.Sysfs, bdfs: Iterable[host.Bdf]) -> int | None:
    """Return the number of the NUMA node of all these devices; None without one, and on a host with one node."""
    nodes = node_numbers(sysfs.names(NODES))
    near = set(_devices_nodes(sysfs, bdfs).values())
    return next((node for node in nodes if near == {node}), None) if len(nodes) > 1 else None


@dataclass(frozen=True, slots=True)
class NodeChoice:
    """The NUMA nodes that are preferred, or why none is: a device reaches those of others more slowly."""

    nodes: tuple[int, ...]
    """Their numbers, in order; empty: the kernel's default, the node of the CPU that first writes a page."""
    reason: str
    """Why: one clause; empty on a host with one node, and without devices."""

    def __str__(self) -> str:
        nodes = f"NUMA {node_text(self.nodes)}" if self.nodes else "no NUMA node"
        return f"{nodes} preferred: {self.reason}"


def node_text(nodes: Iterable[int]) -> str:
    """Return a text such as ``node 1``, or ``nodes 0, 2``."""
    names = [str(node) for node in nodes]
    return f"node{'s' if len(names) > 1 else ''} {', '.join(names)}"


def choose_nodes(sysfs: host.Sysfs, bdfs: Iterable[host.Bdf]) -> NodeChoice:
    """Return the nodes to prefer for the memory of a guest with these devices.

    A policy of this process's own (set_mempolicy(2), numactl(8), ``NUMAPolicy=`` of its unit) is respected: then none
    is preferred. Nodes that the process may not use (cpuset) or that have no memory are left out. Only reads.
    """
    names = sysfs.names(NODES)
    near = _devices_nodes(sysfs, bdfs)
    if not near or len(node_numbers(names)) < 2:
        return NodeChoice((), "")
    found = {node for node in near.values() if node is not None}
    if not found:
        return NodeChoice((), "the devices' node is unknown")
    if sysfs.ask("memory policy", memory_policy):
        return NodeChoice((), "this process has a memory policy of its own")
    allowed = sysfs.fields("proc/self/status").get("Mems_allowed_list", "")
    ours, others = split_nodes(names, sysfs.text(NODES, "has_memory") or "", allowed)
    usable = tuple(sorted(found.intersection(ours)))
    if len(usable) == len(set(near.values())):  # each device is on one of them
        reason = "the devices are on it" if len(usable) == 1 else "the devices are on them"
    else:
        reason = _places(near)
        if found.intersection(others):
            reason += f", this process may use {node_text(ours)} only"
        if bare := found.difference(ours, others):
            reason += f", {node_text(sorted(bare))} {'has' if len(bare) == 1 else 'have'} no memory"
    if len(usable) > 1 and sysfs.kernel() < _PREFERS_MANY:
        return NodeChoice((), f"{_places(near)}, and Linux prefers several nodes from 5.15 on")
    return NodeChoice(usable, reason)


def _places(near: Mapping[host.Bdf, int | None]) -> str:
    """Return a clause about the nodes of devices, of which one at least is known."""
    nodes = set(near.values())
    if len(nodes) == 1:
        return f"the devices are on node {nodes.pop()}"
    places = {bdf: "an unknown node" if node is None else f"node {node}" for bdf, node in near.items()}
    return ", ".join(f"{bdf} is on {place}" for bdf, place in places.items())
