"""The kernel's command line, parsed as the kernel parses it.

Sources: kernel/params.c and lib/cmdline.c (``next_arg``, ``parameq``, ``parse_args``), and for the options that take
lists arch/x86/kernel/pci-dma.c (``iommu_setup``), drivers/iommu/amd/init.c (``parse_amd_iommu_options``),
drivers/iommu/irq_remapping.c (``setup_irqremap``), drivers/vfio/pci/vfio_pci.c (``vfio_pci_fill_ids``).
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from kvmpass._dataclass import dataclass
from kvmpass._lazy import lazy_pattern

# The words of each list. The kernel compares prefixes: ``offload`` is ``off``.
LISTS: dict[str, tuple[str, ...]] = {
    "iommu": (
        *("off", "force", "noforce", "biomerge", "panic", "nopanic", "merge", "nomerge", "forcesac", "allowdac"),
        *("nodac", "usedac", "soft", "pt", "nopt"),
        # of the GART (arch/x86/kernel/amd_gart_64.c: gart_parse_options)
        *("leak", "fullflush", "nofullflush", "noagp", "noaperture", "allowed", "memaper"),
        *"0123456789",
    ),
    "amd_iommu": (
        *("fullflush", "force_enable", "off", "force_isolation", "pgtbl_v1", "pgtbl_v2", "irtcachedis"),
        *("nohugepages", "v2_pgsizes_only"),
    ),
    "intremap": ("on", "off", "nosid", "no_x2apic_optout", "nopost", "posted_msi"),
}
_WORD = lazy_pattern(r'(?:"[^"]*(?:"|\Z)|[^\s"])+', re.ASCII)  # blanks in quotes do not end it


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter."""

    name: str
    """With underscores for dashes: to the kernel they are the same."""
    value: str | None
    """None without an equals sign."""
    text: str
    """The parameter as it was written."""


@dataclass(frozen=True, slots=True)
class Item:
    """One word of a list parameter such as ``iommu=``."""

    parameter: Parameter
    """The parameter."""
    text: str
    """The word as it was written."""
    known: str | None
    """The option that the kernel parses it as; None if it ignores it."""

    def __str__(self) -> str:
        """``iommu=off``; with its list where it is one of several: ``iommu=off in iommu=pt,off``."""
        option = f"{self.parameter.text.partition('=')[0]}={self.text}"
        return option if self.parameter.value == self.text else f"{option} in {self.parameter.text}"


class CommandLine:
    """The parameters up to ``--``, in their order; what follows is for init."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.parameters: tuple[Parameter, ...] = tuple(_parameters(text))

    def of(self, *names: str) -> list[Parameter]:
        """Return the parameters with these names, written with underscores."""
        return [parameter for parameter in self.parameters if parameter.name in names]

    def items(self, name: str) -> list[Item]:
        """Return every word of the list parameter ``name``, a key of :data:`LISTS`, over all its occurrences."""
        return [item for parameter in self.of(name) for item in _items(parameter)]

    # --- as the IOMMU drivers parse it

    def iommu_off(self) -> list[str]:
        """Return what disables AMD-Vi."""
        found = [str(item) for name in ("iommu", "amd_iommu") for item in self.items(name) if item.known == "off"]
        # Until about Linux 6.2 amd_iommu= was searched for its words at any position.
        return found + [str(item) for item in self.items("amd_iommu") if item.known is None and "off" in item.text]

    def remapping_off(self) -> list[str]:
        """Return what disables interrupt remapping."""
        last = [item for item in self.items("intremap") if item.known in ("on", "off")][-1:]
        found = [str(item) for item in last if item.known == "off"]
        # Without IOAPICs nothing is remapped (arch/x86/kernel/apic/apic.c: enable_IR_x2apic).
        off = self.of("nointremap", "noapic", "nolapic", "disableapic", "nosmp")
        off += [parameter for parameter in self.of("maxcpus") if parameter.value == "0"]  # as nosmp (kernel/smp.c)
        return found + [parameter.text for parameter in off]

    def acpi_off(self) -> list[str]:
        """Return what disables ACPI (arch/x86/kernel/acpi/boot.c: parse_acpi)."""
        return [parameter.text for parameter in self.of("acpi") if parameter.value == "off"]

    def ignored(self) -> list[str]:
        """Return options about the IOMMU that the AMD driver and the IOMMU core ignore."""
        found = [str(item) for name in LISTS for item in self.items(name) if item.known is None and item.text]
        found = [word for word in found if word not in self.iommu_off()]
        found += [parameter.text for parameter in self.of("intel_iommu")]
        return found

    def acs_override(self) -> list[str]:
        """Return what requests groups that the hardware does not isolate, on kernels with the ACS override patch.

        ``pci=config_acs=`` and ``pci=disable_acs_redir=`` do not: they configure the hardware, and groups follow it.
        """
        return [parameter.text for parameter in self.of("pcie_acs_override") if parameter.value]

    def vfio_ids(self) -> list[str]:
        """Return the entries of ``vfio_pci.ids``, as they were written."""
        return [
            entry
            for parameter in self.of("vfio_pci.ids")
            for entry in re.split("[,;]", parameter.value or "")
            if entry.strip()
        ]


def _parameters(text: str) -> Iterator[Parameter]:
    for word in _WORD.findall(text):
        name, equals, value = word.partition("=")
        if word.startswith('"'):
            name, equals, value = word[1:].removesuffix('"').partition("=")
        elif value.startswith('"'):
            value = value[1:].removesuffix('"')
        if name == "--" and not equals:
            return
        yield Parameter(name.replace("-", "_"), value if equals else None, word)


def _items(parameter: Parameter) -> Iterator[Item]:
    for text in (parameter.value or "").split(","):
        known = [word for word in LISTS[parameter.name] if text.startswith(word)]
        yield Item(parameter, text, max(known, key=len, default=None))
        if parameter.name == "iommu" and text.startswith("usedac"):  # nothing after it is read
            return


def matches_ids(pattern: str, vendor: int, device: int, subsystem: tuple[int, int], class_code: int) -> bool:
    """Return whether an entry of ``vfio-pci.ids=`` matches this device.

    ``vendor:device[:subvendor[:subdevice[:class[:class mask]]]]``, hexadecimal; a missing value, or
    all ones, matches any. An entry without a device is ignored by the kernel.
    """
    parts = pattern.strip().split(":")
    try:
        numbers = [int(part, 16) for part in parts]
    except ValueError:
        return False
    if not 2 <= len(numbers) <= 6:
        return False
    anything = 0xFFFF_FFFF
    wanted = [*numbers, *[anything, anything, 0, 0][len(numbers) - 2 :]]
    ids = (vendor, device, *subsystem)
    same = all(want in (anything, have) for want, have in zip(wanted, ids, strict=False))
    return same and not (wanted[4] ^ class_code) & wanted[5]
