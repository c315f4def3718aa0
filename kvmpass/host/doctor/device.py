"""Warnings about one device: its reset, and settings that change its driver."""

from __future__ import annotations

from kvmpass.host.blocker import BlockerTemplate
from kvmpass.host.check import CheckContext, Reading, Verdict, device_precondition, failed, passed
from kvmpass.host.drivers import driverctl
from kvmpass.host.kernel.modules import vfio_ids
from kvmpass.host.sysfs import PCI_DEVICES, VFIO_PCI

NO_RESET = BlockerTemplate(
    kind="no-reset",
    brief="none",
    cause="{bdf} has no function-level reset: after a guest it keeps its state, including what the guest "
    "wrote{others}",
    remedy="assign it only to guests that may see one another's data; a reboot of this host resets it",
    warning=True,
)
WEAK_RESET = BlockerTemplate(
    kind="weak-reset",
    brief="by power management only",
    cause="{bdf} is reset by power management only (D3hot and back), which does not reset the state of some devices",
    remedy="reboot this host in between if it works only for the first guest",
    warning=True,
)
OVERRIDDEN = BlockerTemplate(
    kind="override-ignored",
    brief="{driver}, despite the override",
    cause="{bdf} is bound to {driver} although its driver_override is vfio-pci: something bound it before the "
    "override was set, or has rebound it",
    remedy="clear the override to remove this warning: kvmpass can assign it, and rebinds it to {driver} afterwards",
    commands=("echo > /sys/bus/pci/devices/{bdf}/driver_override",),
    warning=True,
)
IDS_IGNORED = BlockerTemplate(
    kind="ids-ignored",
    brief="{driver}, despite the ids of vfio-pci",
    cause="{bdf} is bound to {driver}, although {source} has its ID for vfio-pci ({entry}): {driver} was loaded "
    "first",
    remedy="load vfio-pci first, by this line and update-initramfs -u, to remove this warning: kvmpass can assign "
    "it, and rebinds it to {driver} afterwards",
    commands=("echo 'softdep {driver} pre: vfio-pci' > /etc/modprobe.d/kvmpass-{driver}.conf",),
    warning=True,
)
RULE = BlockerTemplate(
    kind="driver-rule",
    brief="a udev rule sets it",
    cause="a udev rule changes the driver of {bdf}: {rule}",
    remedy="remove the rule, or expect it to run when the device is added or changed",
    warning=True,
)


@device_precondition("device-reset", "Reset", "`reset_method`, `reset`", (NO_RESET, WEAK_RESET), needs=("device",))
def _reset(context: CheckContext) -> Verdict:
    device, base = context.device, f"{PCI_DEVICES}/{context.bdf}"
    read = context.seen(f"{base}/reset_method")
    if device.reset_methods and set(device.reset_methods) != {"pm"}:
        return passed(" ".join(device.reset_methods), read)
    if device.reset_methods:
        return failed(WEAK_RESET, read, bdf=device.bdf)
    if context.sysfs.exists(base, "reset") and context.sysfs.text(base, "reset_method") is None:
        return passed("supported", read, Reading(f"/{base}/reset", "present (before Linux 5.15)"))
    bus = [
        str(other.bdf)
        for other in context.sysfs.devices()
        if (other.bdf.domain, other.bdf.bus) == (device.bdf.domain, device.bdf.bus) and other.bdf != device.bdf
    ]
    others = ""
    if bus and device.bdf.bus:  # no bridge can reset a root bus
        others = f". A bus reset would reset {', '.join(bus)} too: VFIO does it only if the guest has all of them"
    return failed(NO_RESET, read, bdf=device.bdf, others=others)


@device_precondition(
    "device-driver",
    "Its driver",
    f"`driver`, `driver_override`, `/{driverctl.DIRECTORY}`, vfio-pci's `ids` in modprobe.d and `/proc/cmdline`, "
    "udev's rules",
    (OVERRIDDEN, IDS_IGNORED, RULE),
    needs=("device",),
)
def _driver(context: CheckContext) -> Verdict:
    device, sysfs = context.device, context.sysfs
    read = [
        Reading(f"/{PCI_DEVICES}/{device.bdf}/driver", device.driver or "none"),
        Reading(f"/{PCI_DEVICES}/{device.bdf}/driver_override", device.driver_override or "none"),
    ]
    saved = driverctl.saved_override(sysfs, device.bdf)
    if saved is not None:
        read.append(Reading(saved.file, saved.driver))
    named = list(vfio_ids(sysfs, device))
    read += [Reading(source, f"vfio-pci ids {entry}") for source, entry in named]
    for directory in ("etc/udev/rules.d", "run/udev/rules.d"):
        for file in sysfs.names(directory):
            for line in sysfs.lines(directory, file):
                if not line.startswith("#") and str(device.bdf) in line and "driver" in line.lower():
                    place = Reading(f"/{directory}/{file}", line.strip())
                    return failed(RULE, *read, place, bdf=device.bdf, rule=place)
    if device.driver_override == VFIO_PCI and device.driver not in (None, VFIO_PCI):
        return failed(OVERRIDDEN, *read, bdf=device.bdf, driver=device.driver)
    if named and device.driver not in (None, VFIO_PCI):
        source, entry = named[0]
        return failed(IDS_IGNORED, *read, bdf=device.bdf, driver=device.driver, source=source, entry=entry)
    return passed(device.driver or "none", *read)


CHECKS = (_reset, _driver)
