"""The guest kernel's command line."""

from __future__ import annotations

from collections.abc import Iterable


def kernel_command_line(*, verbose: bool = False, strict: bool = False, extra: Iterable[str] = ()) -> str:
    """The words a guest needs, then ``extra``: a later word overrides an earlier one.

    - ``console=ttyS0``: COM1 is the console; COM2 to COM4 belong to a command.
    - ``8250.nr_uarts=4``: the kernel's default may be less than the four ports.
    - ``panic=-1 reboot=panic_warm``: a panic resets at once, through the same ACPI register as a reboot, with
      ``WARM_RESET_MAGIC`` in ``WARM_RESET_WORD``; a reboot leaves 0 there (kernel/panic.c, kernel/reboot.c,
      arch/x86/kernel/reboot.c).
    - ``oops=panic``, where ``strict``: a driver that crashes ends the guest (kernel/panic.c).
    - ``no_timer_check``, ``tsc=`` and the like are not needed: with hardware-reduced ACPI
      Linux looks for no 8259 and no PIT, and kvm-clock gives it the TSC's frequency.
    - ``i8042.nokbd``-style words are not needed either: the FADT says that there is no such controller.
    """
    words = ["console=ttyS0,115200", "8250.nr_uarts=4", "panic=-1", "reboot=panic_warm"]
    extra = list(extra)
    if strict and not any(word.startswith("oops=") for word in extra):  # it can be turned on only
        words.append("oops=panic")
    words += ["loglevel=7"] if verbose else ["quiet"]
    return " ".join([*words, *extra])
