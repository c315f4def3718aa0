"""Permissions of this user: to open the device nodes, to change drivers."""

from __future__ import annotations

import os

from kvmpass.host.backend import IOMMU_NODE, IOMMUFD, cdevs
from kvmpass.host.blocker import BlockerTemplate
from kvmpass.host.check import CheckContext, Reading, Verdict, failed, passed, precondition
from kvmpass.host.kernel.permissions import may, owner
from kvmpass.host.sysfs import PCI_DEVICES, VFIO_PCI, Sysfs
from kvmpass.host.usage import vfio_nodes

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
NO_ACCESS_IOMMUFD = BlockerTemplate(
    kind="no-access-iommufd",
    brief="{nodes}",
    cause="this user ({user}) may not open {nodes}",
    remedy="run as root; or join the group that owns /dev/kvm (often kvm), get /dev/iommu and the device's character "
    "device by a udev rule, get a limit for locked memory, log in again, and let root bind the device to vfio-pci. A "
    "user who may open a device's node controls the device: give it to one user, or to a group of its own",
    commands=(
        "usermod -aG kvm {user}",
        "groupadd --system vfio && usermod -aG vfio {user}",
        f'echo \'SUBSYSTEM=="misc", KERNEL=="iommu", GROUP="vfio", MODE="0660"\' > {_RULES}-iommu.rules',
        f'echo \'SUBSYSTEM=="vfio-dev", KERNELS=="{{bdf}}", GROUP="vfio", MODE="0660"\' > {_RULES}-{{bdf}}.rules',
        "udevadm control --reload && udevadm trigger --subsystem-match=misc --subsystem-match=vfio-dev",
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


def user_name(sysfs: Sysfs) -> str:
    """Return the name of the effective user; its ID without a name."""
    return sysfs.ask("user name", _user_name)


def _user_name() -> str:
    import pwd

    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())


@precondition(
    "access",
    "Permission to open the nodes",
    "`/dev/kvm`; with type 1 `/dev/vfio/vfio`, and of a device its `/dev/vfio/GROUP`; with iommufd `/dev/iommu`, and "
    "of a device its `/dev/vfio/devices/vfioN`",
    (NO_ACCESS, NO_ACCESS_IOMMUFD, NO_ACCESS_KVM),
    vital=True,
)
def _access(context: CheckContext) -> Verdict:
    sysfs = context.sysfs
    group = context.device.group if context.present else None
    if context.passed is not None:
        nodes = ["dev/kvm"]
    elif context.backend.name == IOMMUFD:
        nodes = ["dev/kvm", IOMMU_NODE, *(cdevs(sysfs, context.bdf) if context.bdf is not None else ())]
    else:
        nodes = ["dev/kvm", "dev/vfio/vfio"]
        if group is not None:
            nodes.append(vfio_nodes(sysfs, context.device.bdf, group)[0].lstrip("/"))  # the group's
    present = [node for node in nodes if sysfs.exists(node)]
    read = [Reading(f"/{node}", owner(sysfs, node)) for node in present]
    closed = [f"/{node}" for node in present if not may(sysfs, node)]
    if not closed:
        return passed(" ".join(f"/{node}" for node in present) or "no node exists yet", *read)
    user = user_name(sysfs)
    if closed == ["/dev/kvm"] and group is None:
        return failed(NO_ACCESS_KVM, *read, denied=closed[0], user=user)
    kib = -(-context.to_lock // 1024)
    return failed(
        NO_ACCESS_IOMMUFD if context.backend.name == IOMMUFD else NO_ACCESS,
        *read,
        denied=closed[0],
        nodes=", ".join(closed),
        user=user,
        group="GROUP" if group is None else group,
        bdf="BDF" if context.bdf is None else context.bdf,
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
    read = Reading(f"/{file}", owner(sysfs, file))
    if may(sysfs, file, os.W_OK):
        return passed("yes", read)
    if context.present:
        return failed(NO_DRIVERS, read, user=user_name(sysfs), bdf=context.bdf)
    return failed(NO_DRIVERS_YET, read, user=user_name(sysfs))


CHECKS = (_access, _drivers)
