"""What ``kvmpass assign`` would do, worked out by the same code, without doing any of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from kvmpass import host
from kvmpass.errors import BadAddress, KvmpassError, NoSuchDevice
from kvmpass.host import Bdf, Blocker, PciDevice, Sysfs, limits
from kvmpass.host.address import parse_distinct
from kvmpass.host.backend import AUTO, TYPE1, BackendChoice, choose_backend
from kvmpass.host.doctor import Finding, Outcome
from kvmpass.host.view import Sibling, siblings
from kvmpass.kvm import System
from kvmpass.kvm.system import check_vcpus
from kvmpass.layout import Layout, parse_size
from kvmpass.memory import Backing, MemoryPlan, plan_memory
from kvmpass.pci import BarPreview, BarSpace, Vectors, allocate, preview_bars, preview_vectors


@dataclass(frozen=True, slots=True)
class DevicePlan:
    """One device: ``driver`` is what it has now and gets back; ``reset_methods`` as in ``PciDevice``."""

    bdf: Bdf
    short_name: str
    driver: str | None
    group: int | None
    siblings: tuple[Sibling, ...]
    reset_methods: tuple[str, ...]
    vectors: Vectors
    bars: tuple[BarPreview, ...]


@dataclass(frozen=True, slots=True)
class Descriptors:
    """What is counted: ``fixed`` for the machine and its devices, ``vectors`` more if the guest unmasks them all.

    ``limit`` is the hard one, None without: the soft one is raised to it.
    """

    fixed: int
    vectors: int
    limit: int | None


@dataclass(frozen=True, slots=True)
class Plan:
    """``memory`` is None where it cannot be laid out; ``blockers`` says why.

    ``phys_bits`` is the CPU's physical width, from ``phys_bits_source`` (``KVM`` or ``/proc/cpuinfo``). ``confined``:
    this host has IOMMU groups, so that its reserved ranges are known.
    """

    devices: tuple[DevicePlan, ...]
    memory: MemoryPlan | None
    cpus: int
    backend: BackendChoice
    phys_bits: int
    phys_bits_source: str
    confined: bool
    descriptors: Descriptors
    blockers: tuple[Blocker, ...]
    warnings: tuple[Blocker, ...]

    @property
    def map_calls(self) -> int:
        return len(self.memory.mapped) if self.memory else 0

    @property
    def locked(self) -> int:
        """Bytes."""
        return self.memory.locked if self.memory else 0


def plan(
    addresses: Sequence[str | Bdf],
    *,
    memory: str | int = "1G",
    cpus: int = 1,
    backing: Backing = Backing.ANONYMOUS,
    backend: str = AUTO,
    sysfs: Sysfs | None = None,
) -> Plan:
    """Work out what assigning these devices to one machine would do. Changes nothing, on any machine.

    Everything that would be refused is in ``blockers``, all of it and not only the first. Raises only for
    invalid arguments: ``BadAddress``, ``LayoutError`` for an invalid ``memory``.
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
    findings = list(_findings(look, bdfs, size, backing, cpus, backend))
    blockers += _blockers(findings, Outcome.FAIL)
    devices = list(_present(sysfs, bdfs))
    groups = sysfs.groups()
    bits, source = _physical_bits(sysfs)
    memory_plan = None
    try:
        memory_plan = plan_memory(size, sysfs.reserved_regions(), bits, backing)
        _check_cpus(sysfs, cpus)
    except KvmpassError as error:
        blockers.append(_impossible(error))
    planned = tuple(_device(look, device, bdfs) for device in devices)
    if memory_plan is not None:
        blockers += _unfitting(planned, memory_plan.layout)
    chosen = choose_backend(sysfs, bdfs, backend)
    descriptors = _descriptors(sysfs, planned, cpus, chosen)
    return Plan(
        devices=planned,
        memory=memory_plan,
        cpus=cpus,
        backend=chosen,
        phys_bits=bits,
        phys_bits_source=source,
        confined=any(not group.no_iommu for group in groups),
        descriptors=descriptors,
        blockers=tuple(blockers),
        warnings=tuple(_blockers(findings, Outcome.WARN)),
    )


def _findings(
    look: host.Look, bdfs: Sequence[Bdf], size: int, backing: Backing, cpus: int, backend: str
) -> Iterator[Finding]:
    """The doctor's, of the host once and of each device."""
    page = backing.page_size if backing is not Backing.ANONYMOUS else 0
    seen: set[tuple[str, str]] = set()
    for bdf in bdfs:
        for finding in host.diagnose(
            look.sysfs, bdf, memory=size, huge_page=page, together=bdfs, look=look, cpus=cpus, backend=backend
        ):
            key = finding.check, finding.blocker.cause if finding.blocker else ""
            if key not in seen:
                seen.add(key)
                yield finding


def _blockers(findings: Sequence[Finding], outcome: Outcome) -> list[Blocker]:
    return [finding.blocker for finding in findings if finding.outcome is outcome and finding.blocker]


def _present(sysfs: Sysfs, bdfs: Sequence[Bdf]) -> Iterator[PciDevice]:
    for bdf in bdfs:
        try:
            yield sysfs.device(bdf)
        except NoSuchDevice:  # among the findings already
            continue


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


def _impossible(error: KvmpassError, bdf: Bdf | None = None) -> Blocker:
    remedy = "; ".join(getattr(error, "__notes__", ()))
    return Blocker("request", "impossible", str(error), remedy, error=type(error), bdf=bdf)


def _on_this_machine(sysfs: Sysfs) -> bool:
    return str(sysfs.root) == "/"


def _physical_bits(sysfs: Sysfs) -> tuple[int, str]:
    """The width by which a machine is laid out, as KVM says, or as the CPU does where KVM cannot be asked."""
    bits = sysfs.ask("physical bits", lambda: _of_kvm(sysfs, lambda system: system.physical_bits))
    if bits is not None:
        return bits, "KVM"
    width = sysfs.fields("proc/cpuinfo").get("address sizes", "").partition(" ")[0]
    return (int(width), "/proc/cpuinfo") if width.isdecimal() else (40, "assumed")


def _check_cpus(sysfs: Sysfs, cpus: int) -> None:
    most = sysfs.ask("most vCPUs", lambda: _of_kvm(sysfs, lambda system: system.max_vcpus))
    if most is not None:  # else among the findings already
        check_vcpus(cpus, most)


def _of_kvm(sysfs: Sysfs, number: Callable[[System], int]) -> int | None:
    if not _on_this_machine(sysfs):
        return None
    try:
        with System() as system:
            return number(system)
    except OSError:
        return None


def _descriptors(sysfs: Sysfs, devices: Sequence[DevicePlan], cpus: int, backend: BackendChoice) -> Descriptors:
    groups = {device.group for device in devices} if backend.name == TYPE1 else ()
    most = sum(max(device.vectors.msix or 0, device.vectors.msi or 0) for device in devices)
    fixed = limits.descriptors_needed(len(devices), len(groups), cpus)
    return Descriptors(fixed, most, limits.rlimit(sysfs, "Max open files").hard)
