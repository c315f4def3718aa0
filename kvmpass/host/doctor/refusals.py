"""Why the kernel does not use an IOMMU, or its interrupt remapping: the kernel's messages, each with a remedy.

All error messages of drivers/iommu/amd/init.c in Linux 4.9 to 6.18, and those of arch/x86/kernel/apic/apic.c about
interrupt remapping. Only messages of the kernel count, and a pattern must match the whole message.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from kvmpass._dataclass import dataclass
from kvmpass.host.blocker import BlockerTemplate
from kvmpass.host.check import CheckContext, Reading, Verdict, failed, passed, precondition

LOG = "the kernel's log"
_UPDATE = "update the firmware"
_COLD = "power-cycle this machine (a restart by kexec does not reset the IOMMU)"
_AT_FORM = (6, 2)  # ivrs_ioapic=ID@BDF; before, and also in many stable kernels, ivrs_ioapic[ID]=BDF

TABLE_ERROR = BlockerTemplate(
    kind="ivrs-error",
    brief="the kernel cannot read the table IVRS",
    cause="AMD-Vi is off: the kernel cannot read the ACPI table IVRS ({what})",
    remedy=_UPDATE,
)
CHECKSUM = BlockerTemplate(
    kind="ivrs-checksum",
    brief="the table IVRS has a wrong checksum",
    cause="AMD-Vi is off: the ACPI table IVRS has a wrong checksum, so that the kernel does not use it",
    remedy=f"{_UPDATE}. If the kernel was started by kexec from Linux 5.5 to 5.8, {_COLD}: these kernels damage "
    "the table",
)
NO_CX16 = BlockerTemplate(
    kind="no-cx16",
    brief="the CPU lacks CMPXCHG16B",
    cause="AMD-Vi is off: this kernel needs a CPU with the instruction CMPXCHG16B for it (flag cx16)",
    remedy="let the outer host expose the flag cx16 (CPU model host, or EPYC), if this is a virtual machine",
)
REGISTERS_TAKEN = BlockerTemplate(
    kind="iommu-registers-taken",
    brief="its registers are claimed",
    cause="AMD-Vi is off: the IOMMU's registers ({what}) are in memory that something else has claimed: a firmware "
    "bug",
    remedy=f"{_UPDATE}; /proc/iomem (as root) shows what has claimed that memory",
    commands=("grep -i -e amd_iommu -e {first} /proc/iomem",),
)
IVHD_TYPE = BlockerTemplate(
    kind="ivhd-type",
    brief="a block that this kernel does not support",
    cause="AMD-Vi is off: the ACPI table IVRS describes the IOMMU in a block of type {what}, which this kernel does "
    "not support",
    remedy=f"use a newer kernel, or {_UPDATE}",
)
HARDWARE = BlockerTemplate(
    kind="iommu-hardware",
    brief="the IOMMU cannot be initialized",
    cause="AMD-Vi is off: the kernel cannot initialize IOMMU {what}",
    remedy=f"{_UPDATE}, {_COLD}; error -19 means that the table IVRS has an address for the IOMMU at which there is "
    "no PCI function",
    commands=("lspci -nn | grep -i iommu", "dmesg | grep AMD-Vi"),
)
STONEY = BlockerTemplate(
    kind="stoney-ridge",
    brief="not with Stoney Ridge graphics",
    cause="AMD-Vi is off: the kernel does not use it with Stoney Ridge graphics (1002:98e4), which fail with it",
    remedy="boot with amd_iommu=force_enable (Linux 5.14 and later), if the host needs no graphics",
)
SME = BlockerTemplate(
    kind="sme-active",
    brief="not with memory encryption, by this microcode",
    cause="AMD-Vi is off: memory encryption (SME) is on, and this CPU's microcode does not support both",
    remedy="update the firmware or the microcode (0x08001205, or 0x08001126 to 0x080011ff), or boot with "
    "mem_encrypt=off",
)
NO_HOST_TABLES = BlockerTemplate(
    kind="no-host-translation",
    brief="it does not translate for the host",
    cause="AMD-Vi does not translate: its firmware or hypervisor offers no page tables that the host can use "
    "({what})",
    remedy=f"{_UPDATE}; in a virtual machine there is DMA remapping only if the outer host emulates it (QEMU's "
    "amd-iommu: dma-remap=on)",
)
TOO_MANY = BlockerTemplate(
    kind="too-many-iommus",
    brief="more than the kernel supports",
    cause="AMD-Vi is off: this host has more IOMMUs than this kernel supports",
    remedy="use a newer kernel",
)
IOAPIC_MISSING = BlockerTemplate(
    kind="ioapic-not-in-ivrs",
    brief="IOAPIC {what} is not in the table IVRS",
    cause="interrupt remapping is off: the firmware's table IVRS does not say where IOAPIC {what} is, so that the "
    "kernel cannot remap its interrupts",
    remedy=f"{_UPDATE}. Until then give its address on the kernel's command line: {{option}} (the IOAPIC of the "
    "southbridge is at 00:14.0; from Linux 6.2 on the form is ivrs_ioapic=ID@00:14.0, before "
    "ivrs_ioapic[ID]=00:14.0). allow_unsafe_interrupts is not accepted instead",
    commands=("dmesg | grep -i -e ioapic -e IVRS",),
)
SOUTHBRIDGE_MISSING = BlockerTemplate(
    kind="no-southbridge-ioapic",
    brief="the southbridge's IOAPIC is not in IVRS",
    cause="interrupt remapping is off: the firmware's table IVRS has no IOAPIC at 00:14.0, where the southbridge's "
    "must be",
    remedy=f"{_UPDATE}. Until then give its address on the kernel's command line: {{option}}, with the ID of the "
    "IOAPIC that has the GSIs from 0 on (from Linux 6.2 on ivrs_ioapic=ID@00:14.0, before ivrs_ioapic[ID]=00:14.0). "
    "Linux 7.0 and later also need an ISA bridge or an SMBus function at that address",
    commands=("dmesg | grep 'IOAPIC.*GSI'", "lspci -nn -s 00:14.0"),
)
REMAPPING_REFUSED = BlockerTemplate(
    kind="remapping-refused",
    brief="the kernel refuses it",
    cause="interrupt remapping is off: the kernel's log says that it was disabled",
    remedy=f"{_UPDATE}; the messages before that one have details",
    commands=("dmesg | grep AMD-Vi",),
)
NO_IOAPIC = BlockerTemplate(
    kind="no-ioapic",
    brief="IOAPICs are off",
    cause="interrupt remapping is off: the kernel uses no IOAPIC ({words})",
    remedy="remove noapic, nolapic or nosmp from the kernel's command line, or set the firmware to APIC mode",
)
BAD_OPTION = BlockerTemplate(
    kind="ivrs-option",
    brief="the kernel cannot parse {what}",
    cause="the kernel cannot parse {what} on its command line, or has too many of them, and ignores it",
    remedy="write ivrs_ioapic=ID@00:14.0, ivrs_hpet=ID@00:14.0, ivrs_acpihid=HID:UID@BDF (before Linux 6.2 "
    "ivrs_ioapic[ID]=00:14.0, and so on); at most four of each",
    warning=True,
)
FIRMWARE = BlockerTemplate(
    kind="ivrs-bug",
    brief="the kernel complains of the firmware",
    cause="the kernel has found a bug in the firmware's table IVRS, and continues: {what}",
    remedy=f"{_UPDATE} if a device does not work",
    warning=True,
)
NO_ANSWER = BlockerTemplate(
    kind="iommu-timeout",
    brief="an IOMMU does not respond",
    cause="an IOMMU, or a device that it waits for, does not respond: {what}",
    remedy="look for IOTLB_INV_TIMEOUT in the kernel's log: it names the device. Reset that device, or boot with "
    "pci=noats; if that does not help, power-cycle this machine",
    commands=("dmesg | grep -e IOTLB_INV -e Completion-Wait",),
    warning=True,
)


@dataclass(frozen=True, slots=True)
class _Message:
    """A message of the kernel: ``text`` is a pattern for what follows ``AMD-Vi:``, whose groups fill ``template``."""

    template: BlockerTemplate
    text: str
    prefix: bool = True

    def __call__(self, line: str) -> re.Match[str] | None:
        return re.fullmatch((_PREFIX if self.prefix else "") + self.text, line.rstrip())


# 4.x writes the firmware's bug before the name, later kernels after it; check_ioapic_information adds a colon.
_BUG = r"(?:\[Firmware (?:Bug|Warn)\]: )?"
_PREFIX = rf"{_BUG}AMD-Vi: {_BUG}(?:: )?"

IOMMU_REFUSED = (
    _Message(TABLE_ERROR, r"IVRS table error: (?P<what>.+)"),
    _Message(CHECKSUM, r"IVRS invalid checksum"),
    _Message(NO_CX16, r"Failed to initialize\. The CMPXCHG16B feature is required\."),
    _Message(
        REGISTERS_TAKEN, r"Can ?not reserve memory region (?P<what>(?P<first>[0-9a-f]{1,16})-[0-9a-f]{1,16}) for mmio"
    ),
    _Message(IVHD_TYPE, r"Unsupported IVHD type (?P<what>0x[0-9a-f]{1,4}|0)"),
    _Message(HARDWARE, r"IOMMU(?P<what>\d+: Failed to initialize IOMMU Hardware \(error=-?\d+\))!"),
    _Message(STONEY, r"Disable IOMMU on Stoney Ridge"),
    _Message(SME, r"IOMMU not currently supported when SME is active"),
    _Message(NO_HOST_TABLES, r"(?P<what>Host Address Translation is not supported)\."),
    _Message(
        NO_HOST_TABLES, r"(?P<what>Disable host address translation due to invalid translation level \(\w{1,10}\))\."
    ),
    _Message(TOO_MANY, r".*System has more IOMMUs than supported by this driver", prefix=False),
)
REMAPPING_REFUSED_BY = (
    _Message(IOAPIC_MISSING, r"IOAPIC\[(?P<what>\d{1,3})\] not in IVRS table"),
    _Message(SOUTHBRIDGE_MISSING, r"No southbridge IOAPIC found"),
    _Message(NO_IOAPIC, r"(?:APIC: )?Not enabling interrupt remapping due to skipped IO-APIC setup", prefix=False),
    _Message(REMAPPING_REFUSED, r"Disabling interrupt remapping(?: due to BIOS Bug\(s\))?"),
)
_COMPLAINTS = (
    _Message(BAD_OPTION, r"Invalid command line: (?P<what>.+)"),
    _Message(BAD_OPTION, r"Early (?:IOAPIC|HPET) map overflow - ignoring (?P<what>.+)"),
    _Message(FIRMWARE, r"(?P<what>EFR mismatch\..+)"),
    _Message(FIRMWARE, r"(?P<what>Invalid (?:IVHD device type \w{1,8}|HID\.|UID length\.))"),
    _Message(NO_ANSWER, r"(?P<what>(?:Completion-Wait loop|Command buffer) time(?:d )?out)"),
)


def refused(context: CheckContext, messages: tuple[_Message, ...], *read: Reading, **values: str) -> Verdict | None:
    """Return the verdict for the most specific of ``messages`` in the kernel's log; None if the log has none.

    ``values`` fill the fields of the template that the message does not. All matching messages are readings.
    """
    found = list(_found(context, messages))
    if not found:
        return None
    template = found[0][0].template
    same = [match.groupdict() for message, match in found if message.template is template]
    numbers = dict.fromkeys(groups["what"] for groups in same if "what" in groups)
    values = {**values, **{name: text or "" for name, text in same[0].items()}}
    if numbers:
        values["what"] = " and ".join(numbers)
    lines = dict.fromkeys(match.string for _, match in found)
    return failed(template, *read, *(Reading(LOG, line) for line in lines), **values)


def _found(context: CheckContext, messages: tuple[_Message, ...]) -> Iterator[tuple[_Message, re.Match[str]]]:
    """In the order of ``messages``, the most specific first."""
    lines = [record.text for record in context.log.records if record.by_kernel]
    for message in messages:
        yield from ((message, match) for line in lines if (match := message(line)))


def iommu_refused(context: CheckContext, *read: Reading) -> Verdict | None:
    """Return why the kernel does not use the IOMMU, from its log; None if unknown."""
    return refused(context, IOMMU_REFUSED, *read)


def remapping_refused(context: CheckContext, *read: Reading) -> Verdict | None:
    """Return why the kernel does not remap interrupts, from its log; None if unknown."""
    found = _found(context, REMAPPING_REFUSED_BY)
    ids = [match["what"] for message, match in found if message.template is IOAPIC_MISSING]
    form = "ivrs_ioapic={}@00:14.0" if context.sysfs.kernel() >= _AT_FORM else "ivrs_ioapic[{}]=00:14.0"
    options = " or ".join(form.format(number) for number in dict.fromkeys(ids or ["ID"]))
    line = context.command_line
    given = [parameter.text for parameter in line.parameters if parameter.name.startswith("ivrs_")]
    readings = (*read, *(Reading("/proc/cmdline", text) for text in given))
    words = " ".join(line.remapping_off()) or "none was found"
    return refused(context, REMAPPING_REFUSED_BY, *readings, option=options, words=words)


def log_reading(context: CheckContext) -> tuple[Reading, ...]:
    """Return a reading if the log does not reach back to boot, or cannot be read; else nothing."""
    log = context.log
    if log.error is not None:
        return (Reading(LOG, f"not readable: {log.error}"),)
    if not log.complete:
        return (Reading(LOG, "its beginning is lost: journalctl -k -b may have it"),)
    return ()


def _templates(messages: tuple[_Message, ...]) -> tuple[BlockerTemplate, ...]:
    return tuple({message.template.kind: message.template for message in messages}.values())


IOMMU_TEMPLATES = _templates(IOMMU_REFUSED)
REMAPPING_TEMPLATES = _templates(REMAPPING_REFUSED_BY)


@precondition(
    "iommu-complaints",
    "Other messages of the IOMMU",
    "messages of AMD-Vi in the kernel's log after which it continues",
    _templates(_COMPLAINTS),
)
def complaints(context: CheckContext) -> Verdict:
    """Find a message after which the kernel continues."""
    verdict = refused(context, _COMPLAINTS)
    return verdict or passed("none", *(log_reading(context) or (Reading(LOG, "none of these"),)))
