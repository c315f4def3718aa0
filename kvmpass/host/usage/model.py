"""One use of a device."""

from __future__ import annotations

from kvmpass._dataclass import dataclass


@dataclass(frozen=True, slots=True)
class Use:
    """One use of a device by the host or by a process."""

    text: str
    """What uses it, or why it may be in use, as a clause."""
    seen: bool = True
    """Whether the use is visible; if not, it is only possible."""
    waits: bool = False
    """Whether unbinding the driver blocks until this use ends."""
