"""Permissions of this user: to open the device nodes, to change drivers."""

from __future__ import annotations

import os
import pwd
import stat

from kvmpass.host.blocker import BlockerTemplate
from kvmpass.host.check import CheckContext, Reading, Verdict, failed, passed, precondition
from kvmpass.host.sysfs import PCI_DEVICES, Sysfs
from kvmpass.host.usage import VFIO_PCI, vfio_nodes

_RULES = "/etc/udev/rules.d/70-kvmpass"  # one file for each node: remedies do not overwrite one another
_KVM_GROUP = (
    "groupadd --system --force kvm; usermod -aG kvm {user}",
    f'echo \'SUBSYSTEM=="misc", KERNEL=="kvm", GROUP="kvm", MODE="0660"\' > {_RULES}-kvm.rules',
)

NO_ACCESS = BlockerTemplate(
    kind="no-access",
    brief="{nodes}",
    cause="this user ({user}) may not open {nodes}",
    remedy="run as root; or join the group that owns /dev/kvm (often kvm), get the VFIO nodes by a udev rule, get a "
    "limit for locked memory, log in again, and let root bind the device to vfio-pci. A user who may open a group's "
    "node controls its devices: give it to one user, or to a group of its own, not to everybody in kvm",
    commands=(
        "usermod -aG kvm {user}",
        "groupadd --system vfio && usermod -aG vfio {user}",
        f'echo \'SUBSYSTEM=="misc", KERNEL=="vfio", MODE="0666"\' > {_RULES}-vfio.rules',
        f'echo \'SUBSYSTEM=="vfio", KERNEL=="{{group}}", GROUP="vfio", MODE="0660"\' > {_RULES}-{{group}}.rules',
        "udevadm control --reload && udevadm trigger --subsystem-match=misc --subsystem-match=vfio",
        "echo '{user} - memlock {kib}' > /etc/security/limits.d/50-kvmpass-{user}.conf",
    ),
)
NO_ACCESS_KVM = BlockerTemplate(
    kind="no-access-kvm",
    brief="/dev/kvm",
    cause="this user ({user}) may not open /dev/kvm",
    remedy="run as root, or join the group that owns /dev/kvm (often kvm) and log in again; `kvmpass doctor BDF` "
    "shows what a device needs in addition",
    commands=(*_KVM_GROUP, "udevadm control --reload && udevadm trigger --subsystem-match=misc"),
)
NO_DRIVERS = BlockerTemplate(
    kind="no-driver-rights",
    brief="not as this user",
    cause="this user ({user}) may not change the driver of {bdf}",
    remedy="run as root: borrowing a device changes its driver, and only root may write those files in sysfs. A "
    "device that root has bound to vfio-pci can be assigned without root",
)
NO_DRIVERS_YET = BlockerTemplate(
    kind="drivers-need-root",
    brief="not as this user",
    cause="this user ({user}) may not change drivers: only devices that are bound to vfio-pci can be assigned",
    remedy="run as root, or let root bind the device to vfio-pci",
    warning=True,
)


def _may(sysfs: Sysfs, node: str, mode: int = os.R_OK | os.W_OK) -> bool:
    return sysfs.ask(f"may {mode} {node}", lambda: os.access(sysfs.path(node), mode, effective_ids=True))


def _owner(sysfs: Sysfs, node: str) -> str:
    return sysfs.ask(f"owner {node}", lambda: _owner_now(sysfs, node))


def _owner_now(sysfs: Sysfs, node: str) -> str:
    try:
        found = sysfs.path(node).stat()
    except OSError as error:
        return error.strerror or "not found"
    return f"{stat.filemode(found.st_mode)}, user {found.st_uid}, group {found.st_gid}"


def user_name(sysfs: Sysfs) -> str:
    """Return the name of the effective user; its ID without a name."""
    return sysfs.ask("user name", _user_name)


def _user_name() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())


@precondition(
    "access",
    "Permission to open the nodes",
    "`/dev/kvm`, `/dev/vfio/vfio`, and of a device its `/dev/vfio/GROUP`",
    (NO_ACCESS, NO_ACCESS_KVM),
    vital=True,
)
def _access(context: CheckContext) -> Verdict:
    sysfs = context.sysfs
    nodes = ["dev/kvm", "dev/vfio/vfio"]
    group = context.device.group if context.present else None
    if group is not None:
        nodes.append(vfio_nodes(sysfs, context.device.bdf, group)[0].lstrip("/"))  # the group's
    present = [node for node in nodes if sysfs.path(node).exists()]
    read = [Reading(f"/{node}", _owner(sysfs, node)) for node in present]
    if sysfs.path("dev/iommu").exists():
        read.append(Reading("/dev/iommu", f"{_owner(sysfs, 'dev/iommu')}; kvmpass does not use it"))
    closed = [f"/{node}" for node in present if not _may(sysfs, node)]
    if not closed:
        return passed(" ".join(f"/{node}" for node in present) or "no node exists yet", *read)
    user = user_name(sysfs)
    if closed == ["/dev/kvm"] and group is None:
        return failed(NO_ACCESS_KVM, *read, denied=closed[0], user=user)
    kib = -(-context.to_lock // 1024)
    return failed(
        NO_ACCESS,
        *read,
        denied=closed[0],
        nodes=", ".join(closed),
        user=user,
        group="GROUP" if group is None else group,
        kib=kib,
    )


@precondition(
    "drivers",
    "Permission to change drivers",
    "`driver_override` of the device, else `/sys/bus/pci/drivers_probe`",
    (NO_DRIVERS, NO_DRIVERS_YET),
    needs=("access",),
)
def _drivers(context: CheckContext) -> Verdict:
    sysfs = context.sysfs
    if context.present:
        if context.device.driver == VFIO_PCI:
            return passed("not needed: bound to vfio-pci", Reading(f"driver of {context.bdf}", VFIO_PCI))
        file = f"{PCI_DEVICES}/{context.bdf}/driver_override"
    else:
        file = "sys/bus/pci/drivers_probe"
    read = Reading(f"/{file}", _owner(sysfs, file))
    if _may(sysfs, file, os.W_OK):
        return passed("yes", read)
    if context.present:
        return failed(NO_DRIVERS, read, user=user_name(sysfs), bdf=context.bdf)
    return failed(NO_DRIVERS_YET, read, user=user_name(sysfs))


CHECKS = (_access, _drivers)
