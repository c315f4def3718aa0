"""What a hostile guest, a failing device or a signal at a bad moment brings about: at most an end with a reason."""

from __future__ import annotations

import os
import resource
import signal
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from support.configuring import config_of
from support.inside import SOAK
from support.living import running, wait_until

from kvmpass import host, ports
from kvmpass._native import ffi, lib
from kvmpass.boot import linux, mtrr
from kvmpass.boot.cpuid import guest_cpuid
from kvmpass.events import DeviceEvent, DeviceReleased, DeviceRequest
from kvmpass.guest import Guest, GuestSpec, prepare
from kvmpass.kvm import System, Vcpu, install_kick
from kvmpass.kvm.exits import InterruptedExit, PortExit
from kvmpass.layout import MIB
from kvmpass.machine import DeviceState, Machine, requests
from kvmpass.machine.vcpus import KICK, GuestOutcome, VcpuThreads
from kvmpass.pci.bus import HostBridge
from kvmpass.pciregs import BAR0, CAP_POWER, COMMAND, capabilities
from kvmpass.vfio.device import ERR

pytestmark = pytest.mark.usefixtures("as_without_tests")

# --- a guest ends with its reason


def test_config_space_and_buses_agree_on_that_device(nic: str) -> None:
    """The disagreement itself is there: else ``test_functions.py`` shows nothing of what a guest sees then."""
    with host.borrow(nic), Machine(memory="8M") as machine:
        device = machine.assign(nic)
        config = config_of(machine, device)
        power = next(cap.offset for cap in capabilities(config) if cap.id == CAP_POWER) + 4
        config(COMMAND, 2, 0x6)
        bars = [slot for slot in machine.memslots.ledger if slot.gpa >= machine.layout.mmio32.start]
        assert bars
        config(power, 2, config(power, 2) | 3)
        config(COMMAND, 2, 0)
        config(power, 2, config(power, 2) & ~3)
        time.sleep(0.05)
        assert config(COMMAND, 2) & 0x6 == 0x6, "the device reads as decoding"
        with pytest.raises(OSError, match="Input/output error"):
            device.regions[0].read(8, 4)
        assert machine._board.mmio.read(config(BAR0, 4) & ~0xF | 8, 4) == b"\xff" * 4
        assert [slot for slot in machine.memslots.ledger if slot.gpa >= machine.layout.mmio32.start] == []
        config(COMMAND, 2, 0x6)
        assert device.regions[0].read(8, 4) != b"\xff" * 4
        machine.audit()


def test_truncated_shared_memory_ends_the_guest_with_the_reason() -> None:
    """Whatever makes KVM_RUN fail: here a file that another process made shorter.

    (Linux would wait for the page for ever: KVM tells it that the page is on its way.)
    """
    fd = os.memfd_create("kvmpass-test")
    os.truncate(fd, MIB)
    with Machine(memory="8M") as machine:
        machine.memory.add_shared(0xBFF0_0000, fd, MIB)
        # mov eax, [0xbff00000]; out 0x80, al; jmp back
        code = bytes.fromhex("b8 0000f0bf 8b00 e680 ebf5")
        with bare_metal(machine, code) as vcpu:
            assert vcpu.run() == PortExit(0x80, 1, 1, True, b"\0", vcpu.run().offset)  # type: ignore[union-attr]
            os.truncate(fd, 0)
            threads = VcpuThreads([vcpu], machine._board.ports, machine._board.mmio, machine._bus_lock, lambda: None)
            threads.start()
            try:
                assert threads.wait(20) is GuestOutcome.FAULT
            finally:
                threads.stop()
            assert threads.fault.startswith("vCPU 0: KVM_RUN: Bad address: the guest's access")
    os.close(fd)


# --- nobody waits for a slow guest


def test_a_device_error_does_not_wait_for_a_pending_eject(
    nvme: str, edu: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guest does not eject one device; meanwhile another one has an uncorrected error."""
    monkeypatch.setattr(requests, "EJECT_SECONDS", 1000.0)
    # Nothing in this guest listens to the event device: its one CPU never leaves a loop in the kernel's stead.
    with host.borrow(nvme, edu), running("echo up; while true; do :; done", nvme, edu) as guest:
        guest.expect("up")
        machine = guest.machine
        failing, kept = machine.devices
        machine._board.hotplug.request_eject = lambda slot: None  # type: ignore[method-assign]
        unbinding = threading.Thread(
            target=Path("/sys/bus/pci/drivers/vfio-pci/unbind").write_text, args=(edu,), daemon=True
        )
        unbinding.start()
        wait_until(lambda: kept.requested)
        failing.vfio.irqs[ERR].trigger()
        assert machine.wait(60) is GuestOutcome.DEVICE_ERROR
        assert kept.state is DeviceState.ASSIGNED, "it is still being waited for"
        assert machine._threads is not None
        vcpus = machine._threads._threads
        wait_until(lambda: not any(thread.is_alive() for thread in vcpus))  # a guest that has ended does not run
        machine.deassign(kept)
        unbinding.join(30)
        assert not unbinding.is_alive()


@pytest.mark.amdvi(timeout=300)
def test_a_device_that_is_not_ejected_is_removed_after_a_timeout(edu: str) -> None:
    """The host's wish is told once, however often VFIO repeats it."""
    with host.borrow(edu), running("echo up; sleep 1000", edu, events=(events := [])) as guest:
        guest.expect("up")
        guest.machine._board.hotplug.request_eject = lambda slot: None  # type: ignore[method-assign]
        started = time.monotonic()
        Path("/sys/bus/pci/drivers/vfio-pci/unbind").write_text(edu)
        assert 9 < time.monotonic() - started < 60
        wait_until(lambda: DeviceReleased(edu, "host") in events)
        assert DeviceRequest(edu) in events
        assert guest.machine.devices == []
        guest.machine.audit()


# --- what a guest repeats does not grow


def test_a_guest_that_ejects_in_a_loop(edu: str) -> None:
    """Not a Linux: a loop that writes the eject register of the first slots, as fast as it can."""
    events = list[DeviceEvent]()
    with host.borrow(edu), Machine(memory="8M", on_event=events.append) as machine:
        device = machine.assign(edu)
        assert device.slot == 1
        port = (ports.HOTPLUG_BASE + 8).to_bytes(2, "little").hex()
        # mov eax, 0xffffffff; mov dx, port; out dx, eax; jmp to the out
        code = bytes.fromhex(f"b8 ffffffff 66ba {port} ef ebfd")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with bare_metal(machine, code) as vcpu:
            threads = VcpuThreads([vcpu], machine._board.ports, machine._board.mmio, machine._bus_lock, lambda: None)
            machine._threads = threads
            with machine._device_lock:  # the worst case: the thread that removes it is blocked
                threads.start()
                wait_until(device.ejected.is_set)
                waiting = []
                while len(waiting) < (300 if SOAK else 30) or machine.exit_reasons["Port"] <= 1000:
                    waiting.append(len(machine._monitor._jobs._calls))
                    time.sleep(0.1)
            wait_until(lambda: DeviceReleased(edu, "guest") in events)
            threads.stop()
        assert machine.devices == []
        assert max(waiting) <= 2, "one job for each device, however often it is ejected"
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 8 << 10  # KiB
        assert len([event for event in events if isinstance(event, DeviceReleased)]) == 1
        machine.audit()


def test_writes_of_the_configuration_address_exit_for_a_full_buffer_only() -> None:
    """Not a Linux: 1000 addresses, the last of which selects the host bridge's first register, then one read."""
    code = bytes.fromhex(
        "b9e8030000"  # mov ecx, 1000
        "8d048dfcffff7f 66baf80c ef e2f2"  # lea eax, [rcx*4 + 0x7ffffffc]; mov dx, 0xcf8; out dx, eax; loop
        "66bafc0c ed 89c3"  # mov dx, 0xcfc; in eax, dx; mov ebx, eax
        "b034 66ba0006 ee ebfe"  # mov al, S5; mov dx, 0x600; out dx, al; jmp to itself
    )
    with Machine(memory="8M") as machine, bare_metal(machine, code) as vcpu:
        threads = VcpuThreads([vcpu], machine._board.ports, machine._board.mmio, machine._bus_lock, lambda: None)
        machine._threads = threads
        threads.start()
        assert machine.wait(30) is GuestOutcome.POWEROFF
        threads.stop()
        assert vcpu.get_regs()["rbx"] == int.from_bytes(HostBridge().config_read(0, 4), "little")
        assert machine.exit_reasons["Port"] < 10
        assert not list(vcpu.coalesced_writes())


# --- the PIC, the MTRRs, signals


@contextmanager
def bare_metal(machine: Machine, code: bytes) -> Iterator[Vcpu]:
    """A processor in 64-bit mode, its first 4 GiB mapped to themselves, with ``code`` at 0x1000."""
    machine.memory.write(0x1000, code)
    machine.memory.write(linux.GDT_BASE, struct.pack(f"<{len(linux.GDT)}Q", *linux.GDT))
    machine.memory.write(linux.PAGE_TABLES, linux.page_tables())
    with machine.vm.create_vcpu(0) as vcpu:
        vcpu.set_cpuid2(guest_cpuid(machine._system.get_supported_cpuid(), cpu=0, cpus=1))
        vcpu.enter_long_mode(**linux.LONG_MODE)
        vcpu.set_regs(rip=0x1000, rsp=0x1000, rflags=2)
        yield vcpu


@contextmanager
def real_mode(machine: Machine, code: bytes) -> Iterator[Vcpu]:
    """A processor as after its reset, LINT0 and all, with ``code`` at 0x1000 and a stack below it."""
    machine.memory.write(0x1000, code)
    with machine.vm.create_vcpu(0) as vcpu:
        sregs = ffi.new("struct kvm_sregs *")
        assert lib.kvm_get_sregs(vcpu.fd, sregs) == 0
        sregs.cs.base = sregs.cs.selector = 0
        assert lib.kvm_set_sregs(vcpu.fd, sregs) == 0
        vcpu.set_regs(rip=0x1000, rsp=0x1000, rflags=2)
        yield vcpu


def run_for(vcpu: Vcpu, seconds: float) -> PortExit | None:
    """The first port exit, or None if there was none."""
    install_kick(KICK)
    main = threading.get_ident()

    def end() -> None:
        vcpu.request_exit()
        signal.pthread_kill(main, KICK)

    timer = threading.Timer(seconds, end)
    timer.start()
    try:
        while timer.is_alive():
            exit_ = vcpu.run()
            if isinstance(exit_, PortExit):
                return exit_
            assert isinstance(exit_, InterruptedExit), exit_
        return None
    finally:
        timer.cancel()
        timer.join()
        vcpu.request_exit(False)


def test_no_interrupt_line_is_routed_to_the_pic() -> None:
    """LINT0 of a processor that was reset takes the 8259's interrupts: raising COM1 does not give it one.

    KVM's 8259 starts with all inputs unmasked and vector base 0. The planted route shows that the guest would see it.
    """
    with Machine(memory="8M") as machine:
        # Every vector leads to: out 0x80, al; hlt. The code: sti; hlt; jmp to the hlt.
        machine.memory.write(0, b"\x00\x20\x00\x00" * 256)
        machine.memory.write(0x2000, b"\xe6\x80\xf4")
        line = ports.SERIAL_LINES[0].irq
        with real_mode(machine, b"\xfb\xf4\xeb\xfd") as vcpu:
            machine.vm.irq_line(line, True)
            assert run_for(vcpu, 1.0) is None
            machine.vm.irq_line(line, False)
            pic = ffi.new("struct kvm_pic_state *")
            for chip in (lib.KVM_IRQCHIP_PIC_MASTER, lib.KVM_IRQCHIP_PIC_SLAVE):
                assert lib.kvm_get_irqchip_pic(machine.vm.fd, chip, pic) == 0
                assert (pic.imr, pic.irr) == (0xFF, 0)
            table = ffi.new("struct kvmpass_route[1]")
            table[0].gsi, table[0].type = line, lib.KVM_IRQ_ROUTING_IRQCHIP
            table[0].irqchip, table[0].pin = lib.KVM_IRQCHIP_PIC_MASTER, line
            machine.vm.set_gsi_routing(table, 1)
            assert lib.kvm_get_irqchip_pic(machine.vm.fd, lib.KVM_IRQCHIP_PIC_MASTER, pic) == 0
            pic.imr = 0
            assert lib.kvm_set_irqchip_pic(machine.vm.fd, lib.KVM_IRQCHIP_PIC_MASTER, pic) == 0
            machine.vm.irq_line(line, True)
            exit_ = run_for(vcpu, 60.0)
            assert exit_ is not None and exit_.port == 0x80, "a planted route to the PIC is not seen"


@pytest.mark.amdvi(timeout=600)
@pytest.mark.parametrize("firmware", [True, False], ids=["as set", "not set"])
def test_a_kernel_that_disables_pat_without_mtrrs(
    older_kernel: Path, monkeypatch: pytest.MonkeyPatch, firmware: bool
) -> None:
    """Linux before 6.2 (pat_init, arch/x86/mm/pat/memtype.c): it maps write-combining BARs uncached then."""
    if not firmware:
        monkeypatch.setattr(mtrr, "mtrrs", lambda bits: {})
    said = bytearray()
    script = "uname -r; dmesg | grep x86/PAT; cat /proc/mtrr"
    spec = GuestSpec(kernel=older_kernel, command=("sh", "-c", script))
    image = prepare(spec, [])
    with (
        Machine(memory="512M") as machine,
        Guest(machine, console=None, output=said.extend, errors=said.extend) as guest,
    ):
        image.load(machine)
        result = guest.run()
    text = said.decode()
    assert text.startswith("6.1."), result
    assert ("Configuration [0-7]: WB  WC  UC- UC  WB  WP  UC- WT" in text) == firmware, text
    assert ("reg00: base=0x0c0000000 ( 3072MB), size= 1024MB, count=1: uncachable" in text) == firmware, text
    assert ("MTRRs disabled, skipping PAT initialization" in text) == (not firmware), text


def test_interrupted_system_calls_are_repeated() -> None:
    """KVM_CREATE_VM fails at any signal; the machine's constructor and its reset do not."""
    install_kick(KICK)
    main, over, sent = threading.main_thread().ident, threading.Event(), 0
    assert main is not None

    def pester() -> None:
        nonlocal sent
        while not over.is_set():
            signal.pthread_kill(main, KICK)
            sent += 1
            time.sleep(0.0002)

    def raw_failures(system: System, count: int) -> int:
        failed = 0
        for _ in range(count):
            with suppress(InterruptedError):
                system.create_vm().close()
                continue
            failed += 1
        return failed

    sender = threading.Thread(target=pester)
    sender.start()
    try:
        with System() as system:
            assert raw_failures(system, 1500 if SOAK else 200) == 0
            while sent <= 200:
                assert raw_failures(system, 10) == 0
        with Machine(memory="8M") as machine:
            for _ in range(5):
                machine.reset()
            machine.audit()
    finally:
        over.set()
        sender.join()
