"""Two kernel logs of one kernel: what one complains of and the other does not."""

from __future__ import annotations

import re
from collections.abc import Sequence

# What our guests alone may say: a pattern, and why it is no fault.
ALLOWED = {
    r"kvm_amd: SVM not supported by CPU": "guests of ours get no AMD-V, on purpose: CPUID leaves it out. QEMU's do",
    r"PCI: Fatal: No config space access function found": "it looks for ports first; then it finds ECAM, by ACPI",
    r"clocksource: Long readout interval": "an emulated CPU was elsewhere for a while; QEMU's guests say it, too",
    r"hrtimer: interrupt took \d+ ns": "the same, seen on a busy machine and not in the next boot",
}

# Of a stack dump these lines describe the moment, not the machine: they change with each build, some with each boot.
MOMENT = re.compile(
    r"""\ *(
      \?\ \S+\+0x  # a frame that the unwinder does not vouch for: an address left over on the stack
    | (R[ABCD]X|R[SD]I|R[SB]P|R\d\d|[CDEFGS]S|[CD]R\d|PKRU|Code):\ .
    | Call\ Trace:$ | </?[A-Z]+>$
    | CPU:\ \d+\ .*PID:\ \d+ | (Tainted|Modules\ linked\ in|Hardware\ name|irq\ event\ stamp):
    )""",
    re.VERBOSE,
)


def without_prefix(line: str) -> str:
    """A message without its level and time."""
    return re.sub(r"^<\d+>(\[ *[\d.]+\] )?", "", line)


def normal(line: str) -> str:
    """A message without its level, time, addresses and numbers."""
    text = without_prefix(line)
    text = re.sub(r"\b[0-9a-f]{4}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]\b", "BDF", text)
    text = re.sub(r"\b0x[0-9a-f]+|\b[0-9a-f]{8,}\b", "N", text, flags=re.IGNORECASE)
    return re.sub(r"\d+", "N", text).strip()


def unexplained(ours: Sequence[str], theirs: Sequence[str]) -> list[str]:
    """The complaints of ours that QEMU's guest has not, and that ``ALLOWED`` does not explain; each once.

    What of a stack dump says nothing about the machine (``MOMENT``) is left out.
    """
    known = {normal(line) for line in theirs}
    said = [line for line in ours if not MOMENT.match(without_prefix(line))]
    new = {normal(line): line for line in said if normal(line) not in known}
    return [line for line in new.values() if not any(re.search(pattern, line) for pattern in ALLOWED)]
