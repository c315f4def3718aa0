"""The guest kernel's command line."""

from __future__ import annotations

from collections.abc import Iterable

from kvmpass.ports import SERIAL_LINES

QUIET = "quiet loglevel=3"
"""What the guest's init looks for (cffi_build/agent/init.c)."""


_CARD_PORTS = 8  # of each: few have more


def uarts(count: int, cards: int = 0) -> str:
    """Return the parameter that says how many serial ports the kernel has: ``count``, or more for PCI cards.

    Before Linux 6.2 a card gets a port only below this number (``serial8250_find_match_or_unused``,
    drivers/tty/serial/8250/8250_core.c). Those after COM1 to COM4 have no address, so that the kernel does not probe
    them.
    """
    return f"8250.nr_uarts={len(SERIAL_LINES) + _CARD_PORTS * cards if cards else count}"


def kernel_command_line(
    *,
    verbose: bool = False,
    strict: bool = False,
    quiet: str = "quiet",
    serial_ports: int = len(SERIAL_LINES),
    serial_cards: int = 0,
    extra: Iterable[str] = (),
) -> str:
    """Return the kernel command line: the parameters that a guest needs, then ``extra``, which override them.

    ``strict``: an oops ends the guest. ``verbose``: the kernel prints its messages on the console; otherwise only its
    errors (``quiet``), with ``quiet=QUIET`` only critical ones until the guest's init prints its errors, those from
    before included.

    - ``console=ttyS0``: COM1 is the console; COM2 to COM4 belong to a command.
    - ``8250.nr_uarts``: the kernel's default may be less than ``serial_ports``, or more: it probes each. With
      ``serial_cards``, assigned devices that may be serial cards, it probes COM1 to COM4.
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
    words = ["console=ttyS0,115200", uarts(serial_ports, serial_cards), "pty.legacy_count=0"]
    words += ["panic=-1", "reboot=panic_warm", "pci=noearly"]
    extra = list(extra)
    if strict and not any(word.startswith("oops=") for word in extra):  # a later word cannot clear it
        words.append("oops=panic")
    words += ["loglevel=7"] if verbose else [quiet]
    return " ".join([*words, *extra])
