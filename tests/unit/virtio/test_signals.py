"""A daemon that does what it likes to the eventfds that it shares with this process."""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from support.remote_guest import Guest, until
from support.vhost_daemon import Daemon

from kvmpass import pciregs
from kvmpass.virtio.interrupts import USED_BUFFER, VectorSink
from kvmpass.virtio.signals import Signals
from kvmpass.virtio.vhost_user import Request

FULL = 2**64 - 2


def fill(eventfd: int, *, block: bool) -> None:
    """Fill the counter, so that the next write blocks, or fails."""
    poll = select.poll()
    poll.register(eventfd, select.POLLIN)
    if poll.poll(0):
        os.eventfd_read(eventfd)
    os.eventfd_write(eventfd, FULL)
    os.set_blocking(eventfd, block)


class Hostile(Daemon):
    """Fills the eventfds of ``which`` as it gets them, and reads none."""

    which = Request.SET_VRING_KICK

    def __init__(self) -> None:
        super().__init__()
        self.filled: list[int] = []

    def _handle(self, request: Request, payload: bytes, files: list[int]) -> bytes | None:  # type: ignore[override]
        if files and request is self.which:
            fill(files[0], block=True)
            self.filled.append(os.dup(files[0]))
        return super()._handle(request, payload, files)

    def _loop(self) -> None:
        while self._ended not in select.select([self._ended, self._socket], [], [])[0] and self._message():
            pass

    def drain(self) -> None:
        """Let every write that blocks return."""
        for eventfd in self.filled:
            os.set_blocking(eventfd, False)
            with suppress(BlockingIOError):  # queues may share one
                os.eventfd_read(eventfd)
            os.close(eventfd)


def in_time(function: Callable[[], object]) -> None:
    """Call ``function``, which must not hang."""
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    thread.join(15)
    assert not thread.is_alive(), "it hangs"


def test_a_daemon_that_fills_kicks_holds_up_nobody() -> None:
    """Neither the lock of the conversation, nor a notification that exits, nor the close."""
    before = threading.active_count()
    with Hostile() as daemon:
        guest = Guest(daemon)
        guest.start()
        guest.given()
        in_time(lambda: guest.front.lock.acquire() and guest.front.lock.release())
        for _ in range(3):
            in_time(lambda: guest.function.transport.notify(0))
        assert guest.status == 0xF
        in_time(guest.close)
        assert guest.reasons == []
        daemon.drain()
    until(lambda: threading.active_count() == before)


def test_a_daemon_that_fills_calls_holds_up_nobody() -> None:
    """The queues' vector is the configuration's, too, which this process signals when the daemon ends."""
    before = threading.active_count()
    with Hostile() as daemon:
        daemon.which = Request.SET_VRING_CALL
        guest = Guest(daemon)
        guest.start(vectors=(0, 0, 0))
        guest.given()
        daemon.end()
        in_time(lambda: until(lambda: bool(guest.reasons)))
        in_time(guest.close)
        daemon.drain()
    until(lambda: threading.active_count() == before)


def test_a_full_counter_is_a_signal() -> None:
    """A vCPU gets no exception: of a notification that was missed, or of an interrupt."""
    with Hostile() as daemon:
        daemon.which = Request.SET_OWNER  # it brings no eventfd
        guest = Guest(daemon)
        guest.start()
        guest.given()
        until(lambda: guest.front.signals._thread is None)
        for ring in daemon.rings.values():
            fill(ring.files[Request.SET_VRING_KICK], block=False)
        guest.config(pciregs.COMMAND, 2, pciregs.COMMAND_MEMORY)
        guest.function.transport.notify(0)
        guest.config(pciregs.COMMAND, 2, pciregs.COMMAND_MEMORY | pciregs.COMMAND_MASTER)
        guest.function.transport.notify(0)
        assert guest.status == 0xF
        guest.close()
    sink, eventfd = VectorSink("it", 1), os.eventfd(0, os.EFD_NONBLOCK)
    sink.set_irqs(0, [eventfd])
    fill(eventfd, block=False)
    sink.signal_queue(0)
    assert sink.take_reasons() == USED_BUFFER
    os.close(eventfd)


def test_signals_that_wait_are_one_for_each_key() -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    signals, stuck = Signals("it"), os.eventfd(0)
    os.eventfd_write(stuck, FULL)
    others = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2)]
    signals.send("stuck", stuck)
    until(lambda: not signals._waiting)
    for _ in range(100):
        signals.send("other", others[0])
    signals.send("other", others[1])
    assert len(signals._waiting) == 1
    os.eventfd_read(stuck)
    until(lambda: signals._thread is None)
    assert os.eventfd_read(others[1]) == 1
    with pytest.raises(BlockingIOError):
        os.eventfd_read(others[0])
    os.eventfd_read(stuck)
    signals.close()
    signals.close()
    signals.send("other", others[1])
    for fd in (stuck, *others):
        os.close(fd)
    assert len(list(Path("/proc/self/fd").iterdir())) == before
