"""What it takes to serve files of this host to a guest (``assign --root``, ``--share``): a daemon, confined."""

from __future__ import annotations

from kvmpass.errors import ShareError
from kvmpass.files.program import INSTALL, PLACES, find_daemon
from kvmpass.host.blocker import BlockerTemplate
from kvmpass.host.check import CheckContext, Reading, Verdict, failed, passed, precondition

_LEAST = (5, 12)  # mount_setattr (fs/namespace.c)
_MOST_NAMESPACES = "proc/sys/user/max_user_namespaces"
# Of distributions' kernels, for users other than root: the value that forbids user namespaces.
_FOR_USERS = {
    "proc/sys/kernel/unprivileged_userns_clone": 0,  # Debian
    "proc/sys/kernel/apparmor_restrict_unprivileged_userns": 1,  # Ubuntu
}

NO_DAEMON = BlockerTemplate(
    kind="virtiofsd-missing",
    brief="virtiofsd is not installed",
    cause="virtiofsd, which serves files of this host to a guest, was not found: assign --root and --share are "
    "refused",
    remedy=INSTALL,
    commands=("apt-get install virtiofsd || apt-get install qemu-system-common",),
    error=ShareError,
    warning=True,
)
OLD_KERNEL = BlockerTemplate(
    kind="no-mount-setattr",
    brief="Linux {version}",
    cause="this kernel, {version}, has no mount_setattr, by which files are served read-only: assign --root and "
    "--share are refused",
    remedy="boot Linux 5.12 or later",
    error=ShareError,
    warning=True,
)
NO_NAMESPACES = BlockerTemplate(
    kind="user-namespaces-forbidden",
    brief="no user namespaces",
    cause="{file} is {value}: this user may make no user namespace, which confines virtiofsd, and assign --root and "
    "--share are refused",
    remedy="enable user namespaces, or run as root where only other users are kept from them",
    commands=("sysctl -w {name}={wanted}",),
    error=ShareError,
    warning=True,
)


@precondition(
    "files",
    "Files for guests",
    "virtiofsd in " + ", ".join(f"`/{place}`" for place in PLACES) + "; `/proc/sys/user/max_user_namespaces`, for "
    "users other than root also `/proc/sys/kernel/unprivileged_userns_clone` and "
    "`/proc/sys/kernel/apparmor_restrict_unprivileged_userns`; the kernel's version",
    (NO_DAEMON, OLD_KERNEL, NO_NAMESPACES),
)
def _files(context: CheckContext) -> Verdict:
    sysfs = context.sysfs
    program = find_daemon(sysfs.exists)
    if program is None:
        return failed(NO_DAEMON)
    read = [Reading("virtiofsd", str(program))]
    version = sysfs.kernel()
    if (0, 0) < version < _LEAST:
        return failed(OLD_KERNEL, *read, version="{}.{}".format(*version))
    settings = {_MOST_NAMESPACES: 0} | (_FOR_USERS if context.user else {})
    for file, forbidding in settings.items():
        value = sysfs.number(file)
        if value is not None:
            read.append(context.seen(file))
        if value == forbidding:
            wanted = 10000 if file == _MOST_NAMESPACES else 1 - forbidding
            name = file.removeprefix("proc/sys/").replace("/", ".")
            return failed(NO_NAMESPACES, *read, file=f"/{file}", value=value, name=name, wanted=wanted)
    return passed(str(program), *read)


CHECKS = (_files,)
