"""The steps of ``kvmpass assign``: check, build the machine, borrow and assign the devices, rebind them.

Each step imports what it needs: memory is populated while the rest is imported.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING

from kvmpass import host
from kvmpass._signals import deferred, importing
from kvmpass.assignment.backing import choose_backing, choose_nodes
from kvmpass.errors import KvmpassError
from kvmpass.host.address import parse_distinct
from kvmpass.host.backend import AUTO
from kvmpass.layout import GUEST_BITS, Range, parse_size
from kvmpass.memory import Backing, MachineMemory, plan_memory
from kvmpass.timings import Mark, unmarked

if TYPE_CHECKING:
    import uuid

    from kvmpass.assignment.passed import PassedDescriptors
    from kvmpass.dma import BackendFactory
    from kvmpass.events import DeviceEvent
    from kvmpass.guest import GuestImage, GuestSpec
    from kvmpass.machine import Machine

Say = Callable[[str], None]


def check(bdfs: Sequence[host.Bdf], look: host.Look, *, backend: str = AUTO, p2p: bool = False) -> None:
    """Run the checks of the host and of the devices. Raises as ``assigned`` does.

    ``look``: the same for all checks of an assignment, so that what several of them need is read once.
    """
    with importing():
        from kvmpass.host.blockers import check_assignable
        from kvmpass.host.doctor import check_host

    check_host(look.sysfs, backend=backend, p2p=p2p, together=bdfs, look=look)
    for bdf in bdfs:
        check_assignable(look.sysfs, bdf, together=bdfs, look=look)


def check_passed(
    devices: Mapping[host.Bdf, tuple[host.PciDevice, int]],
    look: host.Look,
    descriptors: PassedDescriptors,
    backend: str | BackendFactory = AUTO,
) -> None:
    """Run the checks for devices that come by descriptors."""
    sysfs = look.sysfs
    choice = descriptors.check(sysfs, devices, backend if isinstance(backend, str) else None)
    host.doctor.check_host(sysfs, together=[*devices], passed=choice, look=look)
    for bdf in devices:
        host.blockers.check_passed(sysfs, bdf, together=[*devices], look=look)


def check_guest(
    bdfs: Sequence[host.Bdf],
    look: host.Look,
    memory: int,
    backing: Backing,
    cpus: int,
    others: int = 0,
    daemons: int = 0,
) -> None:
    """Check this host's memory and this process's limits for a guest.

    ``others``: bytes that are allocated besides; ``daemons``: how many serve it files of this host. Raises
    ``NotEnoughMemory``, ``HostNotReady``.
    """
    with importing():
        from kvmpass.host.doctor import check_limits, check_memory
        from kvmpass.host.limits import needed_besides
        from kvmpass.kvm.system import MAX_APIC_IDS

    sysfs, page = look.sysfs, backing.huge_page
    besides = needed_besides(0 if page else memory) + others
    check_memory(sysfs, memory, huge_page=page, overhead=besides, look=look)
    check_limits(
        sysfs,
        memory,
        huge_page=page,
        cpus=min(cpus, MAX_APIC_IDS),  # the machine refuses more than a guest can have
        daemons=daemons,
        memfds=_memfds(sysfs, memory, backing),
        together=bdfs,
        look=look,
    )


def _memfds(sysfs: host.Sysfs, memory: int, backing: Backing) -> int:
    if backing.is_memfd:
        with suppress(KvmpassError):  # ``make_memory`` says why
            return plan_memory(memory, sysfs.reserved_regions(), GUEST_BITS, backing).memfds
    return 0


def make_memory(sysfs: host.Sysfs, size: int, backing: Backing, nodes: Collection[int] = ()) -> MachineMemory:
    """Make the memory of a machine that is made later. Raises ``OSError``, ``LayoutError``, ``NotEnoughMemory``."""
    from kvmpass.kvm.system import System

    with System() as system:
        bits = system.physical_bits
    return MachineMemory(plan_memory(size, sysfs.reserved_regions(), bits, backing), nodes)


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
    say: Say | None = None,
    warn: Say = lambda line: None,
    on_event: Callable[[DeviceEvent], None] | None = None,
    on_image: Callable[[GuestImage], None] = lambda image: None,
    mark: Mark = unmarked,
) -> Iterator[Machine]:
    """Yield a machine with the devices assigned and a guest loaded; rebind the devices to their drivers afterwards.

    ``descriptors``: of devices that another process has opened, which stay bound to vfio-pci. They are closed once
    the machine has duplicates; ``addresses`` says which of their devices are assigned, by default all.
    ``say`` is called with each step, ``warn`` with each warning, in a line; ``on_image`` with what the guest boots,
    ``mark`` with the name of each stage that has ended; ``backing`` is as for ``choose_backing``, other arguments are
    as for ``Machine``. Without ``say`` the names of the devices are not looked up, which takes time.
    Raises before any change ``ValueError`` (``backing``, ``backend``), ``BadAddress``, ``NoSuchDevice``,
    ``HostNotReady``, ``NotAssignable``, ``GroupNotViable``, ``DeviceInUse``, ``NotEnoughMemory``, ``BadKernel``,
    ``LayoutError``, ``BadDescriptor``. Later errors are raised after the devices were rebound.
    """
    sysfs = host.Sysfs()
    look = host.Look(sysfs)
    tell = say or (lambda line: None)
    bdfs = parse_distinct(addresses)
    size = parse_size(memory)
    passed = descriptors.devices(sysfs, bdfs) if descriptors is not None else {}
    devices = [device for device, _ in passed.values()] or [look.require(bdf) for bdf in bdfs]
    bdfs = tuple(device.bdf for device in devices)
    choice = choose_backing(sysfs, size, bdfs, backing, shared=spec.daemons > 0)
    near = choose_nodes(sysfs, bdfs)
    with ExitStack() as undo:
        # Most of the time goes into memory: it is populated while the rest is imported, checked and made. Errors of
        # the host and of devices are raised before errors of the size.
        refused: Exception | None = None
        try:
            check_guest(bdfs, look, size, choice.backing, cpus, spec.copied_size, spec.daemons)
            with deferred():
                made = undo.enter_context(closing(make_memory(sysfs, size, choice.backing, near.nodes)))
                made.begin()
        except (KvmpassError, OSError) as error:
            refused = error
        if descriptors is not None:
            check_passed(passed, look, descriptors, backend)
        else:
            check(bdfs, look, backend=backend if isinstance(backend, str) else AUTO, p2p=p2p)
        if refused is not None:
            raise refused
        mark("checks")
        with importing():
            from kvmpass.machine import Machine

        with deferred():  # the memory is the machine's from here on: it unmaps it once nobody uses it
            machine = Machine(
                memory=made,
                cpus=cpus,
                backend=backend,
                p2p=p2p,
                iommu_fd=descriptors.iommu if descriptors else None,
                sysfs=sysfs,
                on_event=on_event,
            )
            undo.pop_all()
            undo.enter_context(machine)
        mark("machine")
        if choice.automatic:
            tell(f"backing {choice}")
        if near.reason:
            tell(str(near) + (f"; refused: {made.nodes_refused}" if made.nodes_refused else ""))
        if cpus > len(os.sched_getaffinity(0)):
            warn(f"{cpus} CPUs for the guest, {len(os.sched_getaffinity(0))} for this process: vCPUs share them")
        with machine.populating():  # until its end the out-of-memory killer can strike
            with importing():
                from kvmpass.guest import prepare

            image = prepare(spec, [device.modalias for device in devices], machine.memory.ram_size)
            on_image(image)
            mark("kernel and initramfs")
            for line in image.warnings:
                warn(line)
            tell(f"kernel {image.kernel.release or 'of an unknown release'}: {image.kernel.path}")
            if image.symbols is not None:
                tell(f"symbols: {image.symbols}")
        mark("memory")
        image.load(machine)
        tell(f"kernel loaded as a {'vmlinux: no KASLR' if machine.kernel_decompressed else 'bzImage'}")
        if image.unpacking is not None and image.unpacking.note:
            tell(f"kernel {image.unpacking.note}")
        mark("loading")
        # Nothing has changed on the host so far. The machine closes the devices before they are rebound.
        borrowed = nullcontext() if descriptors else host.borrow(*bdfs, sysfs=sysfs, say=say, look=look)
        with borrowed, closing(machine):
            mark("binding")
            fds = {bdf: fd for bdf, (_, fd) in passed.items()}
            machine.assign_all(
                sorted(bdfs),  # function 0 of a slot comes first
                fds=fds,
                vf_tokens={bdf: vf_token for bdf in bdfs if vf_token is not None and _has_sriov(sysfs, bdf)},
            )
            for device in sorted(devices, key=lambda device: device.bdf) if say is not None else ():
                bound = f"was bound to {device.driver or 'no driver'}"
                origin = f"by descriptor {fds[device.bdf]}" if descriptors else bound
                tell(f"device {device.bdf}: {look.names.of(device)}, IOMMU group {device.group}, {origin}")
            if descriptors is not None:
                descriptors.close()
            if machine.backend is not None:
                tell(f"IOMMU back end {machine.backend}")
            say_mappings(machine, tell)
            machine.audit()
            tell("audit: ok")
            mark("assignment")
            yield machine
            machine.audit()
    mark("rebinding")
    for device in devices if descriptors is None and say else ():
        tell(f"device {device.bdf}: rebound to {sysfs.driver(device.bdf) or 'no driver'}")


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
