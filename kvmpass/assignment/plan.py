"""The plan of ``kvmpass assign``, computed by the same code, without any change."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial

from kvmpass import host
from kvmpass._dataclass import dataclass
from kvmpass.assignment.backing import BackingChoice, NodeChoice, choose_backing, choose_nodes
from kvmpass.errors import BadAddress, KvmpassError, NoSuchDevice
from kvmpass.host import Bdf, Blocker, PciDevice, Sysfs, limits
from kvmpass.host.address import parse_distinct
from kvmpass.host.backend import AUTO, TYPE1, BackendChoice, choose_backend
from kvmpass.host.doctor import Finding, Outcome
from kvmpass.host.view.isolation import Sibling, siblings
from kvmpass.kvm import System
from kvmpass.kvm.system import check_vcpus
from kvmpass.layout import Layout, parse_size
from kvmpass.memory import Backing, MemoryPlan, plan_memory
from kvmpass.pci import BarPreview, BarSpace, Vectors, allocate, preview_bars, preview_vectors


@dataclass(frozen=True, slots=True)
class DevicePlan:
    """The plan for a device."""

    bdf: Bdf
    """Its address."""
    short_name: str
    """A short name, as in ``kvmpass list``."""
    driver: str | None
    """The driver to which it is bound, and rebound afterwards; None: no driver."""
    group: int | None
    """The number of its IOMMU group; None: no group."""
    siblings: tuple[Sibling, ...]
    """The other devices of the group."""
    reset_methods: tuple[str, ...]
    """The kernel's reset methods, in the order in which it tries them."""
    vectors: Vectors
    """Its interrupts."""
    bars: tuple[BarPreview, ...]
    """Its BARs, and the expansion ROM."""


@dataclass(frozen=True, slots=True)
class Descriptors:
    """Numbers of file descriptors."""

    fixed: int
    """For the machine, its devices, its daemons, and the console of its commands."""
    vectors: int
    """For interrupts, if the guest unmasks all MSI and MSI-X vectors."""
    limit: int | None
    """The hard limit, to which the soft limit is raised; None: unlimited."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The plan of an assignment."""

    devices: tuple[DevicePlan, ...]
    """The devices that exist, in the order of the arguments."""
    memory: MemoryPlan | None
    """The guest's memory; None if it is impossible: see ``blockers``."""
    backing: BackingChoice
    """What holds it, and why it was chosen."""
    nodes: NodeChoice
    """The NUMA nodes that are preferred for it."""
    small_pages: bool
    """Whether its pages are of 4 KiB: memfds, of a host without transparent huge pages for them."""
    cpus: int
    """The number of vCPUs."""
    backend: BackendChoice
    """The DMA back end, and why it was chosen."""
    p2p: bool
    """Whether devices reach each other's BARs."""
    phys_bits: int
    """The CPU's physical address width in bits."""
    phys_bits_source: str
    """Its source: ``KVM``, ``/proc/cpuinfo`` or ``assumed``."""
    confined: bool
    """Whether this host has IOMMU groups, so that its reserved ranges are known."""
    descriptors: Descriptors
    """The file descriptors."""
    blockers: tuple[Blocker, ...]
    """Why ``assign`` would refuse; empty: it would not."""
    warnings: tuple[Blocker, ...]
    """Warnings of the host's and the devices' checks."""

    @property
    def map_calls(self) -> int:
        """The number of DMA mappings."""
        return len(self.memory.mapped) if self.memory else 0

    @property
    def peer_map_calls(self) -> int | None:
        """The number of further mappings while all BARs decode; None if unknown."""
        parts = [bar.mapped for device in self.devices for bar in device.bars if self.p2p]
        return None if None in parts else sum(len(part) for part in parts if part is not None)

    @property
    def locked(self) -> int:
        """Bytes of memory that are locked."""
        return self.memory.locked if self.memory else 0


def plan(
    addresses: Sequence[str | Bdf],
    *,
    memory: str | int = "1G",
    cpus: int = 1,
    backing: str = Backing.ANONYMOUS,
    daemons: int = 0,
    backend: str = AUTO,
    p2p: bool = False,
    sysfs: Sysfs | None = None,
) -> Plan:
    """Plan the assignment of devices to a machine. It changes nothing, and works on any host.

    ``backing`` is as for ``choose_backing``; ``daemons``: how many serve the guest files of this host. ``blockers``
    has every reason to refuse, not only the first. Raises ``BadAddress``, and ``LayoutError`` if ``memory`` is not a
    size.
    """
    sysfs = sysfs or Sysfs()
    bdfs = [Bdf.parse(address) if isinstance(address, str) else address for address in addresses]
    size = parse_size(memory)
    blockers: list[Blocker] = []
    look = host.Look(sysfs)
    try:
        parse_distinct(bdfs)
    except BadAddress as error:
        blockers.append(_impossible(error))
        bdfs = list(dict.fromkeys(bdfs))
    chosen = choose_backing(sysfs, size, bdfs, backing, shared=daemons > 0)
    bits, source = _physical_bits(sysfs)
    memory_plan, impossible = None, None
    try:
        memory_plan = plan_memory(size, sysfs.reserved_regions(), bits, chosen.backing)
        most = _ask_kvm(sysfs, "most vCPUs", lambda system: system.max_vcpus)
        if most is not None:  # else a finding already
            check_vcpus(cpus, most)
    except KvmpassError as error:
        impossible = _impossible(error)
    memfds = memory_plan.memfds if memory_plan else 0
    diagnose = partial(
        host.diagnose,
        sysfs,
        memory=size,
        huge_page=chosen.backing.huge_page,
        together=bdfs,
        look=look,
        cpus=cpus,
        daemons=daemons,
        memfds=memfds,
        backend=backend,
        p2p=p2p,
    )
    findings = _findings(diagnose, bdfs)
    blockers += _blockers(findings, Outcome.FAIL)
    blockers += [impossible] if impossible else []
    devices: list[PciDevice] = []
    for bdf in bdfs:
        with suppress(NoSuchDevice):  # a finding already
            devices.append(sysfs.device(bdf))
    planned = tuple(_device(look, device, bdfs) for device in devices)
    if memory_plan is not None:
        blockers += _unfitting(planned, memory_plan.layout)
    iommu = choose_backend(sysfs, bdfs, backend, p2p=p2p)
    return Plan(
        devices=planned,
        memory=memory_plan,
        backing=chosen,
        nodes=choose_nodes(sysfs, bdfs),
        small_pages=chosen.backing is Backing.MEMFD and not _has_huge_memfds(sysfs),
        cpus=cpus,
        backend=iommu,
        p2p=p2p,
        phys_bits=bits,
        phys_bits_source=source,
        confined=any(not group.no_iommu for group in sysfs.groups()),
        descriptors=_descriptors(look, planned, cpus, iommu, daemons, memfds),
        blockers=tuple(blockers),
        warnings=tuple(_blockers(findings, Outcome.WARN)),
    )


def _findings(diagnose: Callable[[Bdf], list[Finding]], bdfs: Sequence[Bdf]) -> list[Finding]:
    """Return the findings of ``doctor`` for all devices, those of the host once."""
    unique: dict[tuple[str, str], Finding] = {}
    for bdf in bdfs:
        for finding in diagnose(bdf):
            unique.setdefault((finding.check, finding.blocker.cause if finding.blocker else ""), finding)
    return list(unique.values())


def _blockers(findings: Sequence[Finding], outcome: Outcome) -> list[Blocker]:
    return [finding.blocker for finding in findings if finding.outcome is outcome and finding.blocker]


def _device(look: host.Look, device: PciDevice, together: Sequence[Bdf]) -> DevicePlan:
    group = None if device.group is None else look.group(device.group)
    found = preview_vectors(look.sysfs.config(device.bdf))
    return DevicePlan(
        bdf=device.bdf,
        short_name=look.names.short(device),
        driver=device.driver,
        group=device.group,
        siblings=tuple(siblings(look, device, group, together)) if group else (),
        reset_methods=device.reset_methods,
        vectors=found,
        bars=preview_bars([(part.size, part.flags) for part in device.resources], found),
    )


def _unfitting(devices: Sequence[DevicePlan], layout: Layout) -> Iterator[Blocker]:
    space = BarSpace(layout)
    for device in devices:
        try:
            allocate(space, device.bars)
        except KvmpassError as error:
            yield _impossible(error, device.bdf)


def _has_huge_memfds(sysfs: Sysfs) -> bool:
    """Return whether memfds get transparent huge pages (Documentation/admin-guide/mm/transhuge.rst)."""
    setting = sysfs.text("sys/kernel/mm/transparent_hugepage/shmem_enabled") or ""
    return any(f"[{name}]" in setting for name in ("always", "within_size", "advise", "force"))


def _impossible(error: KvmpassError, bdf: Bdf | None = None) -> Blocker:
    remedy = "; ".join(getattr(error, "__notes__", ()))
    return Blocker("request", "impossible", str(error), remedy, error=type(error), bdf=bdf)


def _physical_bits(sysfs: Sysfs) -> tuple[int, str]:
    """Return the physical address width of KVM, else of the CPU, and its source."""
    bits = _ask_kvm(sysfs, "physical bits", lambda system: system.physical_bits)
    if bits is not None:
        return bits, "KVM"
    width = sysfs.fields("proc/cpuinfo").get("address sizes", "").partition(" ")[0]
    return (int(width), "/proc/cpuinfo") if width.isdecimal() else (40, "assumed")


def _ask_kvm(sysfs: Sysfs, question: str, number: Callable[[System], int]) -> int | None:
    """Return a number that KVM reports; None: KVM is unavailable, or ``sysfs`` is not this host's."""

    def answer() -> int | None:
        with suppress(OSError):
            if str(sysfs.root) == "/":
                with System() as system:
                    return number(system)
        return None

    return sysfs.ask(question, answer)


def _descriptors(
    look: host.Look,
    devices: Sequence[DevicePlan],
    cpus: int,
    backend: BackendChoice,
    daemons: int,
    memfds: int,
) -> Descriptors:
    groups = {device.group for device in devices} if backend.name == TYPE1 else ()
    most = sum(max(device.vectors.msix or 0, device.vectors.msi or 0) for device in devices)
    fixed = limits.descriptors_needed(len(devices), len(groups), cpus, daemons, memfds)
    return Descriptors(fixed, most, limits.rlimit(look, "Max open files").hard)
