"""The guest kernel's command line."""

from __future__ import annotations

from collections.abc import Iterable

QUIET = "quiet loglevel=3"
"""What the guest's init looks for (cffi_build/agent/init.c)."""


def uarts(count: int) -> str:
    """Return the parameter that says how many serial ports the kernel probes."""
    return f"8250.nr_uarts={count}"


def kernel_command_line(
    *,
    verbose: bool = False,
    strict: bool = False,
    quiet: str = "quiet",
    serial_ports: int = 4,
    extra: Iterable[str] = (),
) -> str:
    """Return the kernel command line: the parameters that a guest needs, then ``extra``, which override them.

    ``strict``: an oops ends the guest. ``verbose``: the kernel prints its messages on the console; otherwise only its
    errors (``quiet``), with ``quiet=QUIET`` only critical ones until the guest's init prints its errors, those from
    before included.

    - ``console=ttyS0``: COM1 is the console; COM2 to COM4 belong to a command.
    - ``8250.nr_uarts``: the kernel's default may be less than ``serial_ports``, or more: it probes each.
    - ``pty.legacy_count=0``: no BSD pseudo terminals, which ``CONFIG_LEGACY_PTYS`` makes 256 pairs of at each boot;
      those of Unix98 are others (drivers/tty/pty.c).
    - ``panic=-1 reboot=panic_warm``: a panic resets at once, through the same ACPI register as a reboot, with
      ``WARM_RESET_MAGIC`` in ``WARM_RESET_WORD``; a reboot leaves 0 there (kernel/panic.c, kernel/reboot.c,
      arch/x86/kernel/reboot.c).
    - ``pci=noearly``: no search for chipsets with errata, which no guest has (arch/x86/kernel/early-quirks.c): each
      register that it reads is an exit.
    - ``oops=panic``, if ``strict`` (kernel/panic.c).
    - ``no_timer_check``, ``tsc=`` and the like are not needed: with hardware-reduced ACPI Linux uses no 8259 and no
      PIT, and kvm-clock reports the TSC's frequency.
    - ``i8042.nokbd`` and the like are not needed: according to the FADT there is no such controller.
    """
    words = ["console=ttyS0,115200", uarts(serial_ports), "pty.legacy_count=0"]
    words += ["panic=-1", "reboot=panic_warm", "pci=noearly"]
    extra = list(extra)
    if strict and not any(word.startswith("oops=") for word in extra):  # a later word cannot clear it
        words.append("oops=panic")
    words += ["loglevel=7"] if verbose else [quiet]
    return " ".join([*words, *extra])
