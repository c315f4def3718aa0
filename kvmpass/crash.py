"""Crashes in a kernel's console: the excerpt to show of a guest, or of an emulated host, that died."""

from __future__ import annotations

from collections.abc import Sequence

from kvmpass._lazy import lazy_pattern

# The first words of messages about crashes and lockups (arch/x86/mm/fault.c, kernel/panic.c,
# kernel/watchdog.c, kernel/hung_task.c, kernel/rcu/tree_stall.h, lib/bug.c, arch/x86/kernel/traps.c).
_CRASH = lazy_pattern(
    r"\bBUG: |kernel BUG at |\bOops\b|\bgeneral protection fault\b|\bstack segment\b.*\[#|\binvalid opcode\b.*\[#"
    r"|soft lockup|hard LOCKUP|blocked for more than \d+ seconds|\bdouble fault\b|detected (?:expedited )?stalls? on"
    r"|\bKernel panic\b|Unable to mount root"
)
_WARNING = lazy_pattern(r"\bWARNING: .*\bat \S+:\d+|\bWARNING: CPU: ")
_CUT = "------------[ cut here ]------------"
_LAST = 12  # lines at the end that are shown in any case


def find(lines: Sequence[str]) -> int | None:
    """Return the number of the line at which the crash begins: the first crash or lockup, else the first warning."""
    for pattern in (_CRASH, _WARNING):
        for number, line in enumerate(lines):
            if pattern.search(line):
                return number - 1 if number and _CUT in lines[number - 1] else number
    return None


def excerpt(console: str, limit: int = 80, quiet: int = 20) -> list[str]:
    """Return the lines of a console from the crash on, at most ``limit``; without a crash the last ``quiet``.

    If there are more, some in between are left out, and a line says how many.
    """
    lines = console.replace("\r", "").splitlines()
    start = find(lines)
    shown = lines[-quiet:] if start is None else lines[start:]
    if len(shown) <= limit:
        return shown
    first = limit - _LAST - 1
    return [*shown[:first], f"[{len(shown) - first - _LAST} lines left out]", *shown[-_LAST:]]
