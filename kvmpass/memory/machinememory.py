"""The memory of one machine, which can exist, and be populated, before the machine does."""

from __future__ import annotations

from collections.abc import Collection
from threading import Thread

from kvmpass._signals import deferred
from kvmpass._teardown import run_all, undo_on_error
from kvmpass.errors import Closed, HostNotReady
from kvmpass.memory.mapping import StopFlag
from kvmpass.memory.plan import MemoryPlan
from kvmpass.memory.regions import GuestMemory

_MORE_THREADS = (
    "raise the limit of threads: TasksMax= of a systemd unit, the pids limit of a container, LimitNPROC= of a unit, "
    "or ulimit -u"
)


class MachineMemory:
    """The regions of a plan, and the thread that populates them. ``close()`` ends it and unmaps them.

    It serves one machine, which closes it (``claim``).

    ``nodes``: the NUMA nodes that their pages come from, as long as these have free ones.
    Raises ``NotEnoughMemory`` (huge pages), ``LayoutError``, ``OSError``.

    Synchronization: from any thread, one at a time.
    """

    def __init__(self, plan: MemoryPlan, nodes: Collection[int] = ()) -> None:
        self.plan = plan
        """The layout of the machine, and its regions."""
        self.nodes_refused: OSError | None = None
        """Why ``nodes`` are not preferred, where the kernel has refused that."""
        self.regions = GuestMemory()
        """The list of regions: RAM as planned, and what is added later."""
        self.populated = False
        """Whether every page was allocated."""
        self._size = 0
        self._stop = StopFlag()
        self._thread: Thread | None = None
        self._covered: object = None  # the list of regions when it was begun
        self._owned = self._closed = False
        self._failed: BaseException | None = None
        with undo_on_error(self.regions.close):
            for part in plan.regions:
                region = self.regions.add_ram(part.range.start, part.range.size, part.name, backing=part.backing)
                if nodes and self.nodes_refused is None:
                    try:
                        region.mapping.prefer_nodes(nodes)
                    except OSError as error:  # it is a matter of speed alone
                        self.nodes_refused = error

    def claim(self) -> None:
        """Make the caller its owner, who closes it. Raises ``Closed``; ``ValueError`` if it has an owner."""
        if self._closed:
            raise Closed("the memory is closed")
        if self._owned:
            raise ValueError("the memory is another machine's")
        self._owned = True

    @property
    def begun(self) -> bool:
        """Whether a thread populates it, or has done so."""
        return self._thread is not None

    @property
    def begun_size(self) -> int:
        """The bytes of ordinary pages that the thread populates, or has populated; 0 without a thread."""
        return self._size if self.begun else 0

    def begin(self) -> None:
        """Start to populate all regions of RAM and ROM. Idempotent.

        The thread ends with the process, even if nobody has stopped it. Raises ``HostNotReady`` without a thread.
        """
        if self._thread is None and not self.populated:
            self._stop, self._failed = StopFlag(), None
            self._covered, self._size = self.regions.state, self.regions.ordinary_size
            with deferred():  # else an exception could leave a thread that nobody ends
                thread = Thread(target=self._populate, name="populate", daemon=True)
                try:
                    thread.start()
                except RuntimeError as error:
                    raise HostNotReady(f"memory cannot be populated: {error}", _MORE_THREADS) from None
                self._thread = thread

    def _populate(self) -> None:
        try:
            self.regions.populate(self._stop)
        except BaseException as error:
            self._failed = error

    def wait(self) -> None:
        """Wait until every page is allocated, also of regions that were added since ``begin``.

        Raises as ``begin``, and what populating raises: ``OSError`` (``ENOMEM``).
        """
        while not self.populated:
            self.begin()
            if self._thread is not None:
                self._thread.join()
                self._thread = None
            if self._failed is not None:
                raise self._failed
            self.populated = self._covered is self.regions.state  # else a region was added concurrently

    def stop(self) -> None:
        """Let the thread end with the piece that it populates, and wait for it. Idempotent; ``begin`` goes on."""
        with deferred():  # the caller unmaps the memory next
            self._stop.set()
            if self._thread is not None:
                self._thread.join()
                self._thread = None

    def close(self) -> None:
        """End populating and unmap everything. Idempotent. Raises as ``GuestMemory.close``."""
        with deferred():  # an exception in between would unmap what a thread populates
            self._closed = True
            run_all(self.stop, self.regions.close)
