"""QEMU's command line for an emulated host."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from kvmpass.lab import qemu
from kvmpass.lab.config import LabConfig
from kvmpass.lab.devices import QemuDevices, quote
from kvmpass.lab.kernels import Kernel
from kvmpass.lab.qemu import Emulator

TRACE_EVENT = "amdvi_translation_result"
TERMINAL = "kvmpass.tty"
CONTROL = "kvmpass.qmp"

# The early calibration of the TSC is wrong at about half of all boots. KVM would then give each guest a TSC offset of
# zero, and the guest's timers would hang for as long as the host has been up.
TSC = "kvm.tsc_tolerance_ppm=100000"
# The kernel counts timer interrupts in a time that it measures in instructions. On a busy machine QEMU delivers too
# few, and the kernel panics.
TIMER = "no_timer_check"
KERNEL_ARGUMENTS = f"console=ttyS0 earlyprintk=ttyS0 loglevel=4 panic=-1 mitigations=off {TIMER} {TSC}"


def command_line(
    config: LabConfig,
    emulator: Emulator,
    kernel: Kernel,
    initrd: Path,
    devices: QemuDevices,
    channels: Mapping[str, int],
    console: Path,
    trace: Path | None,
) -> list[str]:
    """Return QEMU's command line. ``channels``: socket descriptors by name of the virtio-serial port."""
    kvm = qemu.accelerator(config.accel) == "kvm"
    words = [
        *emulator.prefix,
        *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *("-machine", "q35,kernel-irqchip=split" if kvm else "q35"),
        *("-accel", "kvm" if kvm else "tcg,thread=multi"),
        *("-cpu", ("host" if kvm else "EPYC-Milan") + (",-svm" if "svm" in config.without else ",+svm")),
        *("-smp", str(config.cpus), "-m", config.memory),
        *("-chardev", f"file,id=console,path={quote(console)}", "-serial", "chardev:console"),
        *("-kernel", str(kernel.image), "-initrd", str(initrd)),
        *("-append", f"{KERNEL_ARGUMENTS} {config.append}".rstrip()),
    ]
    # Before all other devices: QEMU puts those after it behind the IOMMU.
    if "iommu" not in config.without:
        words += ["-device", emulator.iommu(intremap="intremap" not in config.without)]
    if trace is not None:
        words += ["-trace", TRACE_EVENT, "-D", str(trace)]
    words += _channels(channels)
    words += _share(Path("/"), "root", "02.1", readonly=True)
    for number, directory in enumerate(config.writable):
        words += _share(directory, f"writable{number}", f"03.{number}", readonly=False)
    return words + devices.arguments


def _channels(channels: Mapping[str, int]) -> list[str]:
    words = ["-device", "virtio-serial-pci,id=lab-serial,bus=pcie.0,addr=02.0,multifunction=on"]
    for name, descriptor in channels.items():
        words += ["-chardev", f"socket,id={name},fd={descriptor}"]
        if name == CONTROL:
            words += ["-qmp", f"chardev:{name}"]
        elif name == TERMINAL:
            words += ["-device", f"virtconsole,bus=lab-serial.0,chardev={name},name={name}"]
        else:
            words += ["-device", f"virtserialport,bus=lab-serial.0,chardev={name},name={name}"]
    return words


def _share(directory: Path, tag: str, address: str, *, readonly: bool) -> list[str]:
    options = f"local,id=lab-{tag},path={quote(directory)},security_model=none,multidevs=remap"
    if readonly:
        options += ",readonly=on"
    return [
        *("-fsdev", options),
        *("-device", f"virtio-9p-pci,fsdev=lab-{tag},mount_tag={tag},bus=pcie.0,addr={address},multifunction=on"),
    ]
