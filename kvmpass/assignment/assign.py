"""The steps of ``kvmpass assign``: check, build the machine, borrow and assign the devices, rebind them."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from typing import TYPE_CHECKING

from kvmpass import host
from kvmpass.assignment.backing import choose_backing
from kvmpass.dma import BackendFactory
from kvmpass.events import DeviceEvent
from kvmpass.guest import GuestImage, GuestSpec, prepare
from kvmpass.host.address import parse_distinct
from kvmpass.host.backend import AUTO
from kvmpass.kvm.system import MAX_APIC_IDS
from kvmpass.layout import Range, parse_size
from kvmpass.machine import Machine
from kvmpass.memory import Backing
from kvmpass.timings import Mark, unmarked

if TYPE_CHECKING:
    from kvmpass.assignment.passed import PassedDescriptors

Say = Callable[[str], None]


def check(
    bdfs: Sequence[host.Bdf],
    memory: int,
    sysfs: host.Sysfs,
    backing: Backing = Backing.ANONYMOUS,
    cpus: int = 1,
    backend: str = AUTO,
    p2p: bool = False,
) -> list[host.PciDevice]:
    """Run the checks of the host and of the devices; return the devices. Raises as ``assigned`` does."""
    devices = [sysfs.device(bdf) for bdf in bdfs]
    host.doctor.check_host(sysfs, backend=backend, p2p=p2p, together=bdfs)
    for bdf in bdfs:
        host.check_assignable(sysfs, bdf, together=bdfs)
    _check_guest(sysfs, bdfs, memory, backing, cpus)
    return devices


def check_passed(
    bdfs: Sequence[host.Bdf],
    memory: int,
    sysfs: host.Sysfs,
    descriptors: PassedDescriptors,
    backing: Backing = Backing.ANONYMOUS,
    cpus: int = 1,
    backend: str | BackendFactory = AUTO,
) -> dict[host.Bdf, tuple[host.PciDevice, int]]:
    """Run the checks for devices that come by descriptors; return the devices and their descriptors."""
    devices = descriptors.devices(sysfs, bdfs)
    choice = descriptors.check(sysfs, devices, backend if isinstance(backend, str) else None)
    host.doctor.check_host(sysfs, together=[*devices], passed=choice)
    for bdf in devices:
        host.blockers.check_passed(sysfs, bdf, together=[*devices])
    _check_guest(sysfs, [*devices], memory, backing, cpus)
    return devices


def _check_guest(sysfs: host.Sysfs, bdfs: Sequence[host.Bdf], memory: int, backing: Backing, cpus: int) -> None:
    page = backing.huge_page
    host.doctor.check_memory(sysfs, memory, huge_page=page)
    # The machine refuses more CPUs than a guest can have.
    host.doctor.check_limits(sysfs, memory, huge_page=page, cpus=min(cpus, MAX_APIC_IDS), together=bdfs)


@contextmanager
def assigned(
    addresses: Sequence[host.Bdf | str],
    spec: GuestSpec,
    *,
    memory: str = "1G",
    cpus: int = 1,
    backing: str = Backing.ANONYMOUS,
    backend: str | BackendFactory = AUTO,
    p2p: bool = False,
    descriptors: PassedDescriptors | None = None,
    vf_token: uuid.UUID | None = None,
    say: Say = lambda line: None,
    warn: Say = lambda line: None,
    on_event: Callable[[DeviceEvent], None] | None = None,
    on_image: Callable[[GuestImage], None] = lambda image: None,
    mark: Mark = unmarked,
) -> Iterator[Machine]:
    """Yield a machine with the devices assigned and a guest loaded; rebind the devices to their drivers afterwards.

    ``descriptors``: of devices that another process has opened, which stay bound to vfio-pci. They are closed once
    the machine has duplicates; ``addresses`` says which of their devices are assigned, by default all.
    ``say`` is called with each step, ``warn`` with each warning, in a line, ``on_image`` with what the guest boots,
    ``mark`` with the name of each stage that has ended; ``backing`` is as for ``choose_backing``, other arguments are
    as for ``Machine``.
    Raises before any change ``ValueError`` (``backing``, ``backend``), ``BadAddress``, ``NoSuchDevice``,
    ``HostNotReady``, ``NotAssignable``, ``GroupNotViable``, ``DeviceInUse``, ``NotEnoughMemory``, ``BadKernel``,
    ``LayoutError``, ``BadDescriptor``. Later errors are raised after the devices were rebound.
    """
    sysfs = host.Sysfs()
    bdfs = parse_distinct(addresses)
    size = parse_size(memory)
    choice = choose_backing(sysfs, size, bdfs, backing, shared=spec.backing().is_memfd)
    names = host.Names(sysfs)
    fds: dict[host.Bdf, int] = {}
    if descriptors is not None:
        passed = check_passed(bdfs, size, sysfs, descriptors, choice.backing, cpus, backend)
        devices = [device for device, _ in passed.values()]
        fds = {bdf: fd for bdf, (_, fd) in passed.items()}
    else:
        named = backend if isinstance(backend, str) else AUTO
        devices = check(bdfs, size, sysfs, backing=choice.backing, cpus=cpus, backend=named, p2p=p2p)
    mark("checks")
    machine = Machine(
        memory=size,
        cpus=cpus,
        backing=choice.backing,
        backend=backend,
        p2p=p2p,
        iommu_fd=descriptors.iommu if descriptors else None,
        sysfs=sysfs,
        on_event=on_event,
    )
    mark("machine")
    with machine:
        if choice.automatic:
            say(f"backing {choice}")
        if cpus > len(os.sched_getaffinity(0)):
            warn(f"{cpus} CPUs for the guest, {len(os.sched_getaffinity(0))} for this process: vCPUs share them")
        with machine.populating(spec.copied_size):  # the last step at which the out-of-memory killer can strike
            image = prepare(spec, [device.modalias for device in devices])
            on_image(image)
            mark("kernel and initramfs")
            for line in image.warnings:
                warn(line)
            say(f"kernel {image.kernel.release or 'of an unknown release'}: {image.kernel.path}")
            if image.symbols is not None:
                say(f"symbols: {image.symbols}")
        mark("memory")
        image.load(machine)
        mark("loading")
        # Nothing has changed on the host so far. The machine closes the devices before they are rebound.
        borrowed = nullcontext() if descriptors else host.borrow(*bdfs, sysfs=sysfs, say=say)
        with borrowed, closing(machine):
            mark("binding")
            for device in sorted(devices, key=lambda device: device.bdf):  # function 0 of a slot comes first
                token = vf_token if vf_token is not None and _has_sriov(sysfs, device.bdf) else None
                machine.assign(device.bdf, fd=fds.get(device.bdf), vf_token=token)
                driver = device.driver or "no driver"
                origin = f"by descriptor {fds[device.bdf]}" if descriptors else f"was bound to {driver}"
                say(f"device {device.bdf}: {names.of(device)}, IOMMU group {device.group}, {origin}")
            if descriptors is not None:
                descriptors.close()
            if machine.backend is not None:
                say(f"IOMMU back end {machine.backend}")
            say_mappings(machine, say)
            machine.audit()
            say("audit: ok")
            mark("assignment")
            yield machine
            machine.audit()
    mark("rebinding")
    for device in devices if descriptors is None else ():
        say(f"device {device.bdf}: rebound to {sysfs.driver(device.bdf) or 'no driver'}")


def _has_sriov(sysfs: host.Sysfs, bdf: host.Bdf) -> bool:
    """Whether VFIO takes a VF token for a function: it refuses one for others."""
    from kvmpass.host.view.inventory import sriov_of

    return sriov_of(sysfs, bdf) is not None


def say_mappings(machine: Machine, say: Say) -> None:
    """Call ``say`` with this host's reserved ranges, and with each DMA mapping."""
    for line in machine.layout.reserved:
        say(f"reserved range {line}")
    for region in machine.memory:
        if region.kind.dma:
            access = "read-write" if region.kind.guest_writable else "read-only"
            say(
                f"map {region.name} gpa {region.range} -> iova {Range(region.gpa, region.size)}, "
                f"{region.size >> 20} MiB, {region.backing}, {access}"
            )
    if machine.domain.p2p:
        say("peer-to-peer: each BAR is mapped for the other devices' DMA while the guest lets it decode")
