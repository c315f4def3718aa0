"""What one use of a device is, and how sure we are of it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Use:
    """One use that the host or another process makes of a device, as a clause.

    ``seen`` is false for what cannot be seen: the clause says why the device may be in use. ``waits``: the kernel
    waits for the end of this use when the driver is unbound, however long that takes.
    """

    text: str
    seen: bool = True
    waits: bool = False
