"""What ``--copy-out`` has brought out, for the user."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from kvmpass.layout import size_text

if TYPE_CHECKING:
    from kvmpass.guest import CopiedOut


def report(copies: Iterable[CopiedOut], *, verbose: bool) -> Iterator[str]:
    """Return the lines for standard error: what is missing, and with ``verbose`` what is there."""
    for copied in copies:
        for line in copied.left_out:
            yield f"warning: --copy-out {copied.source}: left out: {line}"
        if copied.error is not None:
            kept = f"; {copied.target} has a part of it" if copied.files or copied.bytes else ""
            yield f"warning: --copy-out {copied.source}: {copied.error}{kept}"
        elif verbose:
            noun = "file" if copied.files == 1 else "files and directories"
            yield f"{copied.source} copied to {copied.target}: {copied.files} {noun}, {size_text(copied.bytes)}"
