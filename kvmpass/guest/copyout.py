"""``--copy-out``: the files that a guest sends at its end, one archive for each destination."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from kvmpass.errors import BadArchive
from kvmpass.guest.archive import ArchiveReader, Entry
from kvmpass.guest.destination import Destination
from kvmpass.guest.extract import CopiedOut, Extraction

_ABANDON_SECONDS = 1.0


class CopyOut:
    """A sink for archives, which are extracted to ``destinations`` in their order. ``close`` it.

    Synchronization: from any thread.
    """

    def __init__(self, destinations: Sequence[Destination]) -> None:
        self._destinations = tuple(destinations)
        self._lock = threading.Lock()
        self._closed = False
        self._start()

    def _start(self) -> None:
        self._extractions = [Extraction(destination) for destination in self._destinations]
        self._complete = 0
        self._reader = ArchiveReader(self)
        self._cause: str | None = None

    def __call__(self, data: bytes) -> None:
        """Extract what ``data`` completes. What is not an archive ends it, and is reported by ``results``."""
        with self._lock:
            if self._cause is None and not self._closed:
                try:
                    self._reader.feed(data)
                except BadArchive as error:
                    self._cause = str(error)

    @property
    def _current(self) -> Extraction:
        if self._complete == len(self._extractions):
            raise BadArchive("the guest has sent more archives than it was asked for")
        return self._extractions[self._complete]

    def entry(self, entry: Entry) -> None:
        """See ``ArchiveReceiver``."""
        self._current.entry(entry)

    def content(self, data: memoryview) -> None:
        """See ``ArchiveReceiver``."""
        self._current.content(data)

    def end_of_entry(self) -> None:
        """See ``ArchiveReceiver``."""
        self._current.end_of_entry()

    def end_of_archive(self) -> None:
        """See ``ArchiveReceiver``."""
        self._current.end_of_archive()
        self._complete += 1

    def results(self, cause: str | None = None) -> tuple[CopiedOut, ...]:
        """Return what was done for each destination. ``cause``: why one is not complete, unless another is known."""
        return tuple(extraction.result(self._cause or cause) for extraction in self._extractions)

    def reset(self) -> None:
        """Begin again, on guest reboot. Files that were created stay."""
        with self._lock:
            self._close()
            self._start()

    def close(self) -> None:
        """Close the descriptors, unless a thread still writes to a stalled file system. Idempotent."""
        self._closed = True
        if self._lock.acquire(timeout=_ABANDON_SECONDS):
            self._close()
            self._lock.release()

    def _close(self) -> None:
        for extraction in self._extractions:
            extraction.close()
