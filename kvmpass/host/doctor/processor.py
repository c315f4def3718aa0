"""The processor and KVM."""

from __future__ import annotations

import re

from kvmpass._dataclass import replace
from kvmpass._lazy import lazy_pattern
from kvmpass.host.blocker import BlockerTemplate
from kvmpass.host.check import CheckContext, Reading, Verdict, failed, passed, precondition
from kvmpass.host.kernel.modules import ModuleStatus, module

AMD_VENDORS = frozenset({"AuthenticAMD", "HygonGenuine"})
# arch/x86/kernel/cpu/amd.c and arch/x86/kvm/svm/svm.c; before 6.0 arch/x86/kvm/x86.c
_LOCKED_OFF = lazy_pattern(
    r"(?:(?:kvm|kvm_amd|SVM|has_svm)(?: \[[^\]]*\])?: )*(?:SVM disabled|disabled by bios)\b.*", re.IGNORECASE
)

NOT_AMD = BlockerTemplate(
    kind="not-amd",
    brief="{vendor}, not AMD",
    cause="this CPU is {vendor}, not AMD: AMD-V is needed",
    remedy="use an AMD host, or the lab (kvmpass lab)",
)
SVM_OFF = BlockerTemplate(
    kind="svm-off",
    brief="absent, or off in the firmware",
    cause="AMD-V is absent or off: the CPU shows no svm flag",
    remedy="enable SVM (AMD-V) in the firmware's setup, or nested virtualization if this is a guest",
)
SVM_LOCKED = BlockerTemplate(
    kind="svm-locked",
    brief="off in the firmware",
    cause="AMD-V is off: the firmware has locked it ({message})",
    remedy="enable SVM (AMD-V) in the firmware's setup",
)
OTHER_KVM = BlockerTemplate(
    kind="other-kvm",
    brief="this host's KVM is not AMD-V",
    cause="the KVM of this host is not AMD-V: the CPU shows no svm flag (a virtual machine with another KVM)",
    remedy="use real hardware, enable nested virtualization in the outer host, or use the lab (kvmpass lab)",
)
NO_KVM = BlockerTemplate(
    kind="no-kvm",
    brief="KVM is not loaded",
    cause="/dev/kvm not found: KVM is not loaded (kvm_amd is {status})",
    remedy="load kvm_amd; if that fails, the kernel's log has the reason",
    commands=("modprobe kvm_amd", "dmesg | grep -i -e kvm -e svm"),
)
NO_KVM_AMD = replace(
    NO_KVM,
    kind="no-kvm-amd",
    brief="kvm_amd is not in use",
    cause="the KVM of this host is not AMD-V: kvm_amd is not loaded (it is {status})",
)
KVM_AMD_MISSING = BlockerTemplate(
    kind="kvm-amd-missing",
    brief="kvm_amd is {status}",
    cause="/dev/kvm not found, and kvm_amd cannot be loaded: it is {status} ({seen})",
    remedy="use a kernel with CONFIG_KVM_AMD, with its modules installed, and let it load them",
)
NO_NPT = BlockerTemplate(
    kind="no-npt",
    brief="disabled: guests are slow",
    cause="KVM does not use nested paging: every change of a guest's page tables is an exit",
    remedy="remove kvm_amd.npt=0 from the kernel's command line or modprobe.d, then reload kvm_amd; if this is a "
    "guest, enable nested paging in the outer host",
    commands=("modprobe -r kvm_amd", "modprobe kvm_amd npt=1"),
    warning=True,
)


@precondition("cpu", "AMD processor", "the vendor in `/proc/cpuinfo`", (NOT_AMD,), vital=True)
def _cpu(context: CheckContext) -> Verdict:
    vendor = context.cpu[0]
    read = Reading("/proc/cpuinfo", f"vendor_id {vendor or '(none)'}")
    return passed(vendor, read) if vendor in AMD_VENDORS else failed(NOT_AMD, read, vendor=vendor or "unknown")


@precondition(
    "amd-v",
    "AMD-V",
    "the flag `svm` in `/proc/cpuinfo`; without it `/dev/kvm` and the kernel's log",
    (SVM_OFF, SVM_LOCKED, OTHER_KVM),
    needs=("cpu",),
    vital=True,
)
def _svm(context: CheckContext) -> Verdict:
    supported = "svm" in context.cpu[1]
    read = Reading("/proc/cpuinfo", "flags with svm" if supported else "flags without svm")
    if supported:
        return passed("svm", read)
    if context.sysfs.exists("dev/kvm"):
        return failed(OTHER_KVM, read, Reading("/dev/kvm", "present"))
    messages = context.log.matching(_LOCKED_OFF)
    if messages:
        return failed(SVM_LOCKED, read, Reading("the kernel's log", messages[0]), message=messages[0])
    return failed(SVM_OFF, read, Reading("/dev/kvm", "not found"))


@precondition(
    "kvm",
    "KVM",
    "`/dev/kvm`, the module `kvm_amd`, the kernel's log",
    (NO_KVM, NO_KVM_AMD, KVM_AMD_MISSING, SVM_LOCKED),
    needs=("amd-v",),
    vital=True,
)
def _kvm(context: CheckContext) -> Verdict:
    amd = module(context.sysfs, "kvm_amd")
    loaded = context.sysfs.exists("sys/module/kvm_amd")
    node = context.sysfs.exists("dev/kvm")
    read = Reading("/dev/kvm", "present" if node else "not found"), Reading(amd.seen, amd.value)
    if node and loaded:
        return passed(f"kvm_amd is {amd.status}", *read)
    if node:
        return failed(NO_KVM_AMD, *read, status=amd.status)
    messages = context.log.matching(_LOCKED_OFF)
    if messages:
        return failed(SVM_LOCKED, *read, Reading("the kernel's log", messages[0]), message=messages[0])
    if amd.status in (ModuleStatus.MISSING, ModuleStatus.BLOCKED):
        return failed(KVM_AMD_MISSING, *read, status=amd.status, seen=f"{amd.seen}: {amd.value}")
    return failed(NO_KVM, *read, status=amd.status)


@precondition(
    "nested-paging",
    "Nested paging",
    "the flag `npt` in `/proc/cpuinfo`, the parameter `npt` of `kvm_amd`",
    (NO_NPT,),
    needs=("kvm",),
)
def _npt(context: CheckContext) -> Verdict:
    supported = "npt" in context.cpu[1]
    used = context.sysfs.text("sys/module/kvm_amd/parameters/npt")
    read = [Reading("/proc/cpuinfo", "flags with npt" if supported else "flags without npt")]
    if used is not None:
        read.append(context.seen("sys/module/kvm_amd/parameters/npt"))
    return passed("npt", *read) if supported and used not in ("N", "0") else failed(NO_NPT, *read)


CHECKS = (_cpu, _svm, _kvm, _npt)
