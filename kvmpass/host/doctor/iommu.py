"""The IOMMU: firmware, command line, kernel, groups, interrupt remapping, and settings that bypass it."""

from __future__ import annotations

from collections.abc import Iterator

from kvmpass.host.backend import TYPE1_MODULE
from kvmpass.host.blocker import BlockerTemplate
from kvmpass.host.blockers.group import direct_ranges
from kvmpass.host.check import CheckContext, Reading, Verdict, failed, passed, precondition
from kvmpass.host.doctor.ivrs import BadTable, Ivrs, parse_ivrs
from kvmpass.host.doctor.refusals import (
    CHECKSUM,
    IOMMU_TEMPLATES,
    LOG,
    REMAPPING_TEMPLATES,
    complaints,
    iommu_refused,
    log_reading,
    remapping_refused,
)
from kvmpass.host.kernel.cmdline import CommandLine
from kvmpass.host.sysfs import Sysfs

IVRS = "sys/firmware/acpi/tables/IVRS"
_UNKNOWN = "Unknown kernel command line parameters "  # init/main.c: print_unknown_bootoptions, since 5.14
_OURS = ("iommu", "ivrs", "intremap", "vfio", "kvm", "acs_override")
UNSAFE_INTERRUPTS = tuple(
    f"sys/module/{name}/parameters/allow_unsafe_interrupts" for name in (TYPE1_MODULE, "iommufd")
)
NOIOMMU_MODE = "sys/module/vfio/parameters/enable_unsafe_noiommu_mode"
# How the names of interrupt chips begin, with remapping and without.
_REMAPPED, _PLAIN = ("IR-", "AMD-IR"), ("IO-APIC", "PCI-MSI")
_HDSUP = 1 << 52  # host dirty support, of the extended features (AMD IOMMU specification, MMIO offset 30h)
_FIRMWARE = "enable the IOMMU (AMD-Vi) in the firmware's setup"

NO_IVRS = BlockerTemplate(
    kind="no-ivrs",
    brief="the firmware describes no IOMMU",
    cause="AMD-Vi is off: the firmware describes no IOMMU (no ACPI table IVRS)",
    remedy=f"{_FIRMWARE}; in a virtual machine there is one only if the outer host emulates it",
)
ACPI_OFF = BlockerTemplate(
    kind="acpi-off",
    brief="acpi=off",
    cause="AMD-Vi is off: {words} is on the kernel's command line, so that the kernel reads no ACPI table",
    remedy="remove it and reboot",
)
EMPTY_IVRS = BlockerTemplate(
    kind="empty-ivrs",
    brief="the ACPI table IVRS describes no IOMMU",
    cause="AMD-Vi is off: the ACPI table IVRS describes no IOMMU ({why})",
    remedy=f"{_FIRMWARE}; if it is on, update the firmware",
)
OFF = BlockerTemplate(
    kind="iommu-off",
    brief="{words}",
    cause="AMD-Vi is off: {words} is on the kernel's command line",
    remedy="remove it and reboot",
)
IDLE_OPTION = BlockerTemplate(
    kind="idle-option",
    brief="{words} does nothing",
    cause="{words} is on the kernel's command line, and the kernel ignores it on an AMD host. AMD-Vi is on by "
    "default where the firmware has it on",
    remedy="leave it out; it is harmless",
    warning=True,
)
ACS_OVERRIDE = BlockerTemplate(
    kind="acs-override",
    brief="groups may not be isolated",
    cause="{words} is on the kernel's command line: if this kernel has the ACS override patch, devices that can "
    "access one another without the IOMMU are in groups of their own, and kvmpass cannot detect it",
    remedy="remove it if the guest must be isolated from devices on the same switch or card",
    warning=True,
)
UNUSED = BlockerTemplate(
    kind="iommu-unused",
    brief="the kernel does not use it",
    cause="AMD-Vi is off: the firmware describes an IOMMU (ACPI table IVRS), but the kernel does not use it",
    remedy="use a kernel with CONFIG_AMD_IOMMU and see dmesg for AMD-Vi",
    commands=("dmesg | grep AMD-Vi", "grep AMD_IOMMU /boot/config-$(uname -r)"),
)
NO_GROUPS = BlockerTemplate(
    kind="no-groups",
    brief="no device has one",
    cause="AMD-Vi is present ({iommus}), but no device has an IOMMU group",
    remedy="see dmesg for AMD-Vi: the IOMMU was found and not enabled, or has no devices",
    commands=("dmesg | grep -e AMD-Vi -e iommu",),
)
REMAPPING_OFF = BlockerTemplate(
    kind="intremap-off",
    brief="off: {words}",
    cause="interrupt remapping is off: {words} is on the kernel's command line. A device could raise any interrupt "
    "of this host",
    remedy="remove it and reboot; allow_unsafe_interrupts is not accepted instead",
)
NO_REMAPPING = BlockerTemplate(
    kind="no-intremap",
    brief="off: the IOMMU remaps DMA only",
    cause="interrupt remapping is off: a device could raise any interrupt of this host",
    remedy="see the kernel's log for AMD-Vi: it has the reason. Use a kernel with CONFIG_IRQ_REMAP, and turn "
    "on interrupt remapping with the IOMMU in the firmware's setup; allow_unsafe_interrupts is not accepted instead",
    commands=("dmesg | grep AMD-Vi", "grep IRQ_REMAP /boot/config-$(uname -r)"),
)
REMAPPING_UNKNOWN = BlockerTemplate(
    kind="intremap-unknown",
    brief="unknown",
    cause="it is unknown whether interrupts are remapped",
    remedy="see the kernel's log; if they are not, VFIO_SET_IOMMU, or VFIO_DEVICE_BIND_IOMMUFD, fails with EPERM",
    commands=("dmesg | grep -i remapping",),
    warning=True,
)
UNSAFE = BlockerTemplate(
    kind="unsafe-interrupts",
    brief="allow_unsafe_interrupts is set",
    cause="{module} has allow_unsafe_interrupts: other programs may assign devices without interrupt "
    "remapping. kvmpass refuses anyway",
    remedy="set it back, and remove it from modprobe.d and the kernel's command line",
    commands=("echo N > /sys/module/{module}/parameters/allow_unsafe_interrupts",),
    warning=True,
)
NOIOMMU = BlockerTemplate(
    kind="noiommu-mode",
    brief="enabled",
    cause="vfio has enable_unsafe_noiommu_mode: a device without IOMMU translation can be opened, and its DMA "
    "reaches all of this host's memory.{devices} kvmpass refuses such devices",
    remedy="disable it, and remove it from modprobe.d and the kernel's command line",
    commands=(f"echo N > /{NOIOMMU_MODE}",),
    warning=True,
)
SOME_DIRECT = BlockerTemplate(
    kind="direct-mapped",
    brief="for {count} devices",
    cause="the firmware wants memory direct-mapped (IVRS IVMD). VFIO refuses these devices since about Linux "
    "6.6: {devices}",
    remedy="to assign one of them, turn off pre-boot DMA protection (kernel DMA protection) in the firmware's setup",
    warning=True,
)


@precondition(
    "firmware-iommu",
    "AMD-Vi in the firmware",
    f"the ACPI table `/{IVRS}` and its IVHD blocks",
    (NO_IVRS, ACPI_OFF, EMPTY_IVRS, CHECKSUM),
    vital=True,
)
def _ivrs(context: CheckContext) -> Verdict:
    sysfs = context.sysfs
    if not sysfs.exists(IVRS):
        if context.iommus and context.groups:  # the kernel uses one, whatever described it
            return passed("the kernel has found one", Reading("/sys/class/iommu", " ".join(context.iommus)))
        off = context.command_line.acpi_off()
        if off:
            return failed(ACPI_OFF, Reading("/proc/cmdline", " ".join(off)), words=" and ".join(off))
        return failed(NO_IVRS, Reading(f"/{IVRS}", "not found"))
    try:
        table = parse_ivrs(sysfs.data(IVRS))
    except OSError:
        return passed("IVRS is present", Reading(f"/{IVRS}", "present; only root can read it"))
    except BadTable as error:
        if context.iommus and context.groups:
            return passed("the kernel has found one", Reading(f"/{IVRS}", str(error)))
        return failed(EMPTY_IVRS, Reading(f"/{IVRS}", str(error)), why=error)
    described = sorted(
        {(iommu.segment, iommu.base) for iommu in table.iommus}
    )  # an IOMMU has an IVHD block of each type
    read = Reading(f"/{IVRS}", str(table))
    if not table.sum_is_right and not context.iommus:
        return failed(CHECKSUM, read)
    if not described:
        return failed(EMPTY_IVRS, read, why="it has no IVHD block")
    return passed(f"IVRS, {len(described)} IOMMU{'s' if len(described) > 1 else ''}", read)


@precondition(
    "iommu-off",
    "IOMMU not disabled",
    "`off` in `iommu=` and `amd_iommu=` in `/proc/cmdline`; `iommu=pt` is fine",
    (OFF,),
    needs=("firmware-iommu",),
    vital=True,
)
def _command_line(context: CheckContext) -> Verdict:
    off = context.command_line.iommu_off()
    if off and not context.iommus:
        return failed(OFF, Reading("/proc/cmdline", " ".join(off)), words=" and ".join(off))
    about = " ".join(parameter.text for parameter in context.command_line.parameters if "iommu" in parameter.name)
    return passed(about or "no IOMMU options on the command line", Reading("/proc/cmdline", about or "no iommu"))


@precondition(
    "idle-options",
    "Options without effect",
    "words of `amd_iommu=`, `iommu=`, `intremap=` and `intel_iommu=` in `/proc/cmdline` that the kernel ignores "
    "(`amd_iommu=on`, `amd_iommu=pt`), and those that its log reports as unknown",
    (IDLE_OPTION,),
)
def _idle_options(context: CheckContext) -> Verdict:
    idle = dict.fromkeys([*context.command_line.ignored(), *_unknown_words(context)])
    if idle:
        return failed(IDLE_OPTION, Reading("/proc/cmdline", " ".join(idle)), words=" and ".join(idle))
    return passed("none", Reading("/proc/cmdline", "nothing about the IOMMU that the kernel ignores"))


def _unknown_words(context: CheckContext) -> Iterator[str]:
    """Parameters that the kernel reports as unknown, as far as they are about IOMMU, VFIO or KVM."""
    for message in context.log.having(_UNKNOWN):
        for parameter in CommandLine(message.partition(_UNKNOWN)[2].partition(", will be")[0].strip('"')).parameters:
            # A module's parameter is parsed when the module is loaded.
            if any(word in parameter.name for word in _OURS) and "." not in parameter.name:
                yield parameter.text


@precondition("acs-override", "ACS override", "`pcie_acs_override=` in `/proc/cmdline`", (ACS_OVERRIDE,))
def _acs_override(context: CheckContext) -> Verdict:
    words = [word for word in context.command_line.acs_override() if word not in set(_unknown_words(context))]
    log = [Reading(LOG, line) for line in context.log.having("PCIe ACS overrides enabled")[:1]]
    read = Reading("/proc/cmdline", " ".join(words) or "no pcie_acs_override")
    return failed(ACS_OVERRIDE, read, *log, words=" ".join(words)) if words else passed("none", read)


@precondition(
    "iommu",
    "AMD-Vi",
    "`/sys/class/iommu/ivhd*`, and their features; without it the kernel's log",
    (*IOMMU_TEMPLATES, UNUSED),
    needs=("firmware-iommu", "iommu-off"),
    vital=True,
)
def _iommu(context: CheckContext) -> Verdict:
    read = Reading("/sys/class/iommu", " ".join(context.iommus) or "empty")
    if context.iommus:
        shown = context.iommus[:4]
        more = " …" if len(context.iommus) > len(shown) else ""
        return passed(" ".join(shown) + more, read, *_features(context.sysfs, shown))
    refusal = iommu_refused(context, read)
    if refusal is not None:
        return refusal
    log = [Reading(LOG, line) for line in context.log.having("AMD-Vi")[:3]]
    return failed(UNUSED, read, *log, *log_reading(context))


def _features(sysfs: Sysfs, iommus: list[str]) -> Iterator[Reading]:
    for name in iommus:
        path = f"sys/class/iommu/{name}/amd-iommu/features"
        text = sysfs.text(path) or ""
        features, colon, _ = text.partition(":")
        if colon and 1 <= len(features) <= 16 and not features.strip("0123456789abcdef"):
            tracks = "tracks" if int(features, 16) & _HDSUP else "does not track"
            yield Reading(f"/{path}", f"{text}: {tracks} which pages devices write")


@precondition("groups", "IOMMU groups", "`/sys/kernel/iommu_groups`", (NO_GROUPS,), needs=("iommu",), vital=True)
def _groups(context: CheckContext) -> Verdict:
    real = [group for group in context.groups if not group.no_iommu]
    read = Reading("/sys/kernel/iommu_groups", f"{len(real)} groups")
    if real:
        return passed(f"{len(real)}", read)
    return iommu_refused(context, read) or failed(
        NO_GROUPS, read, *log_reading(context), iommus=" ".join(context.iommus)
    )


def _chips(sysfs: Sysfs) -> tuple[str, set[str]]:
    """Return the file with the names of interrupt chips, and the names."""
    names = [sysfs.text("sys/kernel/irq", number, "chip_name") or "" for number in sysfs.names("sys/kernel/irq")]
    if any(names):
        return "/sys/kernel/irq/*/chip_name", set(names) - {""}
    return "/proc/interrupts", set((sysfs.text("proc/interrupts") or "").split())


@precondition(
    "interrupt-remapping",
    "Interrupt remapping",
    "the names of interrupt chips (`/sys/kernel/irq/*/chip_name`, `/proc/interrupts`), which begin with IR-; "
    "`/proc/cmdline` and the kernel's log where they do not",
    (REMAPPING_OFF, *REMAPPING_TEMPLATES, NO_REMAPPING, REMAPPING_UNKNOWN),
    needs=("iommu",),
    vital=True,
)
def _remapping(context: CheckContext) -> Verdict:
    """Judge by the names of interrupt chips: behind a remapping domain each begins with ``IR-``.

    (arch/x86/kernel/apic/msi.c and io_apic.c, drivers/iommu/amd/iommu.c)
    """
    source, chips = _chips(context.sysfs)
    names = sorted(chip for chip in chips if chip.startswith(_REMAPPED + _PLAIN))
    read = Reading(source, ", ".join(names) or "no known chip")
    if not names:
        return failed(REMAPPING_UNKNOWN, read)
    if any(name.startswith(_REMAPPED) for name in names):
        return passed("on", read)
    off = context.command_line.remapping_off()
    if off:
        return failed(REMAPPING_OFF, read, Reading("/proc/cmdline", " ".join(off)), words=" and ".join(off))
    return remapping_refused(context, read) or failed(NO_REMAPPING, read, *log_reading(context))


@precondition(
    "unsafe-interrupts", "Unsafe interrupts", " and ".join(f"`/{path}`" for path in UNSAFE_INTERRUPTS), (UNSAFE,)
)
def _unsafe_interrupts(context: CheckContext) -> Verdict:
    read = [context.seen(path) for path in UNSAFE_INTERRUPTS]
    for path in UNSAFE_INTERRUPTS:
        if context.sysfs.text(path) in ("Y", "1"):
            return failed(UNSAFE, *read, module=path.split("/")[2])
    return passed("not allowed", *read)


@precondition("noiommu-mode", "No-IOMMU mode", f"`/{NOIOMMU_MODE}`, groups of the name vfio-noiommu", (NOIOMMU,))
def _noiommu(context: CheckContext) -> Verdict:
    exposed = [str(bdf) for group in context.groups if group.no_iommu for bdf in group.devices]
    read = context.seen(NOIOMMU_MODE), Reading("/sys/kernel/iommu_groups/*/name", f"{len(exposed)} without an IOMMU")
    if context.sysfs.text(NOIOMMU_MODE) in ("Y", "1") or exposed:
        return failed(NOIOMMU, *read, devices=f" Now: {', '.join(exposed)}." if exposed else "")
    return passed("off", *read)


def read_ivrs(sysfs: Sysfs) -> Ivrs:
    """Return the host's table; an empty one if it is missing, invalid, or not readable for this user."""
    try:
        return parse_ivrs(sysfs.data(IVRS))
    except (OSError, BadTable):
        return Ivrs((), ())


@precondition(
    "direct-mapped",
    "Direct-mapped memory",
    f"ranges of the type direct in `/sys/kernel/iommu_groups/*/reserved_regions`, IVMD blocks of `/{IVRS}`",
    (SOME_DIRECT,),
    needs=("groups",),
)
def _direct(context: CheckContext) -> Verdict:
    wanted = read_ivrs(context.sysfs).memory
    devices = [str(bdf) for group in context.groups if direct_ranges(group) for bdf in group.devices]
    read = [Reading("/sys/kernel/iommu_groups/*/reserved_regions", f"direct for {', '.join(devices) or 'no device'}")]
    read += [Reading(f"/{IVRS}", f"IVMD {block}") for block in wanted]
    if not devices:
        return passed("none", *read)
    return failed(SOME_DIRECT, *read, count=len(devices), devices=", ".join(devices))


CHECKS = (
    *(_ivrs, _command_line, _idle_options, _acs_override, _iommu, _groups, _remapping, complaints),
    *(_unsafe_interrupts, _noiommu, _direct),
)
