"""One device: its group, who uses it, and what makes trouble when it changes hands."""

from __future__ import annotations

from kvmpass.errors import NoSuchDevice, NotAssignable
from kvmpass.host import checks
from kvmpass.host.checks import one_to_one
from kvmpass.host.doctor.iommu import IVRS
from kvmpass.host.doctor.model import Check, Examined, Reading, Verdict, bad, good
from kvmpass.host.modules import vfio_ids
from kvmpass.host.problems import Problem
from kvmpass.host.sysfs import PCI_DEVICES
from kvmpass.host.usage import VFIO_PCI
from kvmpass.layout import Range

# What drivers for the firmware's framebuffer call their part of a BAR in /proc/iomem (drivers/firmware/sysfb*.c,
# drivers/video/fbdev, drivers/gpu/drm/sysfb).
_FRAMEBUFFERS = frozenset(
    {"BOOTFB", "efifb", "vesafb", "simplefb", "simple-framebuffer", "simpledrm", "efidrm", "vesadrm"}
)
_DISPLAY = 0x03  # base class
_VGA = 0x0300
_TAKES_CONSOLES = (6, 1)  # surely by then: vfio_pci_vga_init (drivers/vfio/pci/vfio_pci_core.c)

NO_DEVICE = Problem(
    kind="no-device",
    brief="not there",
    cause="there is no PCI device {bdf}",
    remedy="kvmpass list shows the devices of this host; one that has fallen off the bus may come back by a rescan",
    commands=("echo 1 > /sys/bus/pci/rescan",),
    error=NoSuchDevice,
)
SILENT = Problem(
    kind="device-silent",
    brief="does not answer ({power})",
    cause="{bdf} does not answer: its configuration space reads as ones (power state {power})",
    remedy="it does not come back from D3cold, or hangs: remove it and rescan the bus; if that does not help, switch "
    "this machine off and on. If it does so again keep it awake",
    commands=(
        "echo 1 > /sys/bus/pci/devices/{bdf}/remove; echo 1 > /sys/bus/pci/rescan",
        "echo 0 > /sys/bus/pci/devices/{bdf}/d3cold_allowed; echo on > /sys/bus/pci/devices/{bdf}/power/control",
    ),
    error=NotAssignable,
)
COLD = Problem(
    kind="device-cold",
    brief="stays in D3cold",
    cause="{bdf} stays in D3cold after its configuration space was read, which wakes a device",
    remedy="keep it awake; if it does not wake, switch this machine off and on",
    commands=(
        "echo 0 > /sys/bus/pci/devices/{bdf}/d3cold_allowed; echo on > /sys/bus/pci/devices/{bdf}/power/control",
    ),
    warning=True,
)
ONE_TO_ONE_OLD = Problem(
    kind="device-one-to-one-old",
    brief="newer kernels refuse the device",
    cause="the firmware wants memory mapped one to one for {bdf} or its group, {group} ({ranges}): VFIO refuses it "
    "from Linux 6.6 on; this kernel takes that memory away from the device",
    remedy="turn off pre-boot DMA protection (kernel DMA protection) in the firmware's setup, or update the firmware",
    warning=True,
)
FRAMEBUFFER = Problem(
    kind="boot-framebuffer",
    brief="{name} sits on it",
    cause="the firmware's framebuffer ({name}, {range}) lies in a BAR of {bdf}: vfio-pci cannot claim that BAR",
    remedy="boot with initcall_blacklist=sysfb_init on the kernel's command line; that display then has no console",
    error=NotAssignable,
)
FRAMEBUFFER_UNKNOWN = Problem(
    kind="boot-framebuffer-unknown",
    brief="only root can tell",
    cause="there is a framebuffer of the firmware ({name}), and {bdf} is a display: only root sees whether it lies "
    "in a BAR of it",
    remedy="ask again as root",
    warning=True,
)
NO_RESET = Problem(
    kind="no-reset",
    brief="none",
    cause="{bdf} has no reset of its own: after a guest it keeps its state, what the guest wrote included{others}",
    remedy="give it only to guests that may see one another's data; a reboot of this host resets it",
    warning=True,
)
WEAK_RESET = Problem(
    kind="weak-reset",
    brief="by power management only",
    cause="{bdf} is reset by power management only (D3hot and back), which some devices survive with their state",
    remedy="if a second guest does not find it as the first did, reboot this host in between",
    warning=True,
)
OVERRIDDEN = Problem(
    kind="override-ignored",
    brief="{driver}, in spite of vfio-pci",
    cause="{bdf} is bound to {driver} while its driver_override says vfio-pci: something has bound it first, or anew",
    remedy="kvmpass takes it all the same, and it goes back to {driver} afterwards. To settle it, clear the override",
    commands=("echo > /sys/bus/pci/devices/{bdf}/driver_override",),
    warning=True,
)
IDS_IGNORED = Problem(
    kind="ids-ignored",
    brief="{driver}, in spite of vfio-pci's ids",
    cause="{bdf} is bound to {driver}, though {source} tells vfio-pci to take it ({entry}): {driver} was there first",
    remedy="kvmpass takes it all the same, and it goes back to {driver} afterwards. To let vfio-pci be first: this "
    "line, and update-initramfs -u",
    commands=("echo 'softdep {driver} pre: vfio-pci' > /etc/modprobe.d/kvmpass-{driver}.conf",),
    warning=True,
)
RULE = Problem(
    kind="driver-rule",
    brief="a udev rule sets it",
    cause="a udev rule changes the driver of {bdf}: {rule}",
    remedy="take the rule out, or keep in mind that it acts when the device appears or changes",
    warning=True,
)


def _present(examined: Examined) -> Verdict:
    if not examined.present:
        return bad(NO_DEVICE, Reading(f"/{PCI_DEVICES}/{examined.bdf}", "not there"), bdf=examined.bdf)
    device = examined.device
    name = examined.names.short(device)
    return good(f"{name}, driver {device.driver or 'none'}", Reading(f"/{PCI_DEVICES}/{device.bdf}", name))


def _answers(examined: Examined) -> Verdict:
    device, base = examined.device, f"{PCI_DEVICES}/{examined.bdf}"
    header = examined.sysfs.config(device.bdf, 0x40)  # a virtual function's ids alone read as ones
    power = examined.sysfs.text(base, "power_state") or "unknown"
    read = [Reading(f"/{base}/config", header[:4].hex(" ") or "not there"), Reading(f"/{base}/power_state", power)]
    for name in ("d3cold_allowed", "power/control", "power/runtime_status"):
        value = examined.sysfs.text(base, name)
        if value is not None:
            read.append(Reading(f"/{base}/{name}", value))
    if header and not header.strip(b"\xff"):
        return bad(SILENT, *read, bdf=device.bdf, power=power)
    return bad(COLD, *read, bdf=device.bdf) if power == "D3cold" else good(power, *read)


def _kind(examined: Examined) -> Verdict:
    device = examined.device
    read = Reading(f"/{PCI_DEVICES}/{device.bdf}", f"class {device.class_code:06x}, group {device.group}")
    return _blocked(examined, (checks.BRIDGE, checks.NO_GROUP, checks.NO_IOMMU), f"group {device.group}", read)


def _blocked(examined: Examined, problems: tuple[Problem, ...], fine: str, *read: Reading) -> Verdict:
    """The first of ``problems`` that keeps the device from being taken."""
    for problem in problems:
        if problem.kind in examined.blockers:
            return Verdict(read, "", examined.blockers[problem.kind])
    return good(fine, *read)


def _viable(examined: Examined) -> Verdict:
    group = examined.group
    assert group is not None
    others = [examined.sysfs.device(bdf) for bdf in group.devices if bdf != examined.bdf]
    words = [f"{one.bdf} {examined.names.short(one)} ({one.driver or 'no driver'})" for one in others]
    read = Reading(f"/sys/kernel/iommu_groups/{group.id}/devices", "; ".join(words) or "nothing else")
    return _blocked(examined, (checks.NOT_VIABLE,), f"{len(others)} others" if others else "alone", read)


def _free(examined: Examined) -> Verdict:
    read = Reading("mounts, swap, holders, routes, open nodes, boot display", "see the cause, or nothing")
    return _blocked(examined, (checks.ASSIGNED, checks.IN_USE), "nobody uses it", read)


def _one_to_one(examined: Examined) -> Verdict:
    group = examined.group
    assert group is not None
    ranges = one_to_one(group)
    read = Reading(f"/sys/kernel/iommu_groups/{group.id}/reserved_regions", f"direct {', '.join(ranges) or 'none'}")
    if not ranges:
        return good("none", read)
    version = examined.sysfs.kernel()
    known = Reading("/proc/sys/kernel/osrelease", ".".join(map(str, version)))
    problem = checks.ONE_TO_ONE if version >= checks.REFUSES_ONE_TO_ONE else ONE_TO_ONE_OLD
    return bad(problem, read, known, bdf=examined.bdf, group=group.id, ranges=", ".join(ranges))


def _framebuffer(examined: Examined) -> Verdict:
    device = examined.device
    bars = [Range(part.start, part.size) for part in device.resources if part.size]
    hidden = ""
    for line in (examined.sysfs.text("proc/iomem") or "").splitlines():
        place, _, name = line.strip().partition(" : ")
        low, _, high = place.partition("-")
        if name not in _FRAMEBUFFERS:
            continue
        try:
            here = Range(int(low, 16), int(high, 16) - int(low, 16) + 1)
        except ValueError:
            continue
        if here.last == 0:
            hidden = name
        elif any(bar.overlaps(here) for bar in bars):
            if device.class_code >> 8 == _VGA and examined.sysfs.kernel() >= _TAKES_CONSOLES:
                read = Reading("/proc/iomem", line.strip())
                return good(f"{name} sits on it: vfio-pci takes the console away", read)
            return bad(FRAMEBUFFER, Reading("/proc/iomem", line.strip()), bdf=device.bdf, name=name, range=here)
    if hidden and device.class_code >> 16 == _DISPLAY:
        return bad(
            FRAMEBUFFER_UNKNOWN, Reading("/proc/iomem", f"{hidden}, address hidden"), bdf=device.bdf, name=hidden
        )
    return good("none on its BARs", Reading("/proc/iomem", "no framebuffer of the firmware in its BARs"))


def _reset(examined: Examined) -> Verdict:
    device, base = examined.device, f"{PCI_DEVICES}/{examined.bdf}"
    read = examined.seen(f"{base}/reset_method")
    if device.reset_methods and set(device.reset_methods) != {"pm"}:
        return good(" ".join(device.reset_methods), read)
    if device.reset_methods:
        return bad(WEAK_RESET, read, bdf=device.bdf)
    if examined.sysfs.path(base, "reset").exists() and examined.sysfs.text(base, "reset_method") is None:
        return good("there is one", read, Reading(f"/{base}/reset", "there (before Linux 5.15)"))
    bus = [
        str(one.bdf)
        for one in examined.sysfs.devices()
        if (one.bdf.domain, one.bdf.bus) == (device.bdf.domain, device.bdf.bus) and one.bdf != device.bdf
    ]
    others = ""
    if bus and device.bdf.bus:  # bus 0 hangs at no bridge that could reset it
        others = f". A reset of its bus would reset {', '.join(bus)} too: done only if all of them are the guest's"
    return bad(NO_RESET, read, bdf=device.bdf, others=others)


def _driver(examined: Examined) -> Verdict:
    device, sysfs = examined.device, examined.sysfs
    read = [
        Reading(f"/{PCI_DEVICES}/{device.bdf}/driver", device.driver or "none"),
        Reading(f"/{PCI_DEVICES}/{device.bdf}/driver_override", device.driver_override or "none"),
    ]
    saved = sysfs.text("etc/driverctl.d", str(device.bdf))
    if saved is not None:
        read.append(Reading(f"/etc/driverctl.d/{device.bdf}", saved))
    named = list(vfio_ids(sysfs, device))
    read += [Reading(source, f"vfio-pci ids {entry}") for source, entry in named]
    for directory in ("etc/udev/rules.d", "run/udev/rules.d"):
        for file in sysfs.names(directory):
            for line in (sysfs.text(directory, file) or "").splitlines():
                if not line.startswith("#") and str(device.bdf) in line and "driver" in line.lower():
                    place = Reading(f"/{directory}/{file}", line.strip())
                    return bad(RULE, *read, place, bdf=device.bdf, rule=place)
    if device.driver_override == VFIO_PCI and device.driver not in (None, VFIO_PCI):
        return bad(OVERRIDDEN, *read, bdf=device.bdf, driver=device.driver)
    if named and device.driver not in (None, VFIO_PCI):
        source, entry = named[0]
        return bad(IDS_IGNORED, *read, bdf=device.bdf, driver=device.driver, source=source, entry=entry)
    return good(device.driver or "none", *read)


CHECKS = (
    Check("device", "Device", f"`/{PCI_DEVICES}/BDF`", (NO_DEVICE,), _present, device=True),
    Check(
        "device-answers",
        "Answers",
        "the first bytes of its configuration space; `power_state`, `d3cold_allowed`, `power/control`",
        (SILENT, COLD),
        _answers,
        ("device",),
        device=True,
    ),
    Check(
        "device-kind",
        "Can be assigned",
        "`class`, the header type, `iommu_group`, the group's `name`",
        (checks.BRIDGE, checks.NO_GROUP, checks.NO_IOMMU),
        _kind,
        ("device", "groups"),
        device=True,
    ),
    Check(
        "device-group",
        "Its group",
        "the group's other devices and their drivers",
        (checks.NOT_VIABLE,),
        _viable,
        ("device-kind",),
        device=True,
    ),
    Check(
        "device-free",
        "Not in use",
        "mounts, swap, holders (LVM, md, dm-crypt), default routes, open nodes, virtual functions, `boot_vga`",
        (checks.ASSIGNED, checks.IN_USE),
        _free,
        ("device-kind",),
        device=True,
    ),
    Check(
        "device-one-to-one",
        "Its one-to-one memory",
        f"ranges of the kind direct in the group's `reserved_regions` (from IVMD blocks of `/{IVRS}`)",
        (checks.ONE_TO_ONE, ONE_TO_ONE_OLD),
        _one_to_one,
        ("device-kind",),
        device=True,
    ),
    Check(
        "device-framebuffer",
        "Boot framebuffer",
        "`/proc/iomem` (addresses only for root), `resource`",
        (FRAMEBUFFER, FRAMEBUFFER_UNKNOWN),
        _framebuffer,
        ("device",),
        device=True,
    ),
    Check(
        "device-reset",
        "Reset",
        "`reset_method`, `reset`",
        (NO_RESET, WEAK_RESET),
        _reset,
        ("device",),
        device=True,
    ),
    Check(
        "device-driver",
        "Its driver",
        "`driver`, `driver_override`, `/etc/driverctl.d`, vfio-pci's `ids` in modprobe.d and `/proc/cmdline`, udev's "
        "rules",
        (OVERRIDDEN, IDS_IGNORED, RULE),
        _driver,
        ("device",),
        device=True,
    ),
)
