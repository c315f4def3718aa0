"""A virtio console with named ports (Virtual I/O Device 1.2, section 5.3; Linux drivers/char/virtio_console.c).

Each port has a queue for each direction, and there is one more pair for control messages. A guest's write is one
buffer in its ring, and the pages of a pipe (splice(2)) are one chain. Flow control is for the protocol that is spoken
over a port.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from functools import partial

from kvmpass.virtio.device import INDIRECT, LocalDevice, VirtioDevice
from kvmpass.virtio.port import Port
from kvmpass.virtio.queue import Virtqueue

DEVICE_TYPE = 3
CLASS_CODE = 0x078000  # communication controller, other
MODALIAS = "pci:v00001AF4d00001043sv00001AF4sd00001100bc07sc80i00"
"""Of the function, for the choice of its drivers."""
MULTIPORT = 1 << 1
"""Feature bit: there are several ports."""

READY, ADD, REMOVE, PORT_READY, CONSOLE, RESIZE, OPEN, NAME = range(8)
"""Events of control messages."""
_MESSAGE = struct.Struct("<IHH")  # port, event, value
_CONFIG = struct.Struct("<HHII")  # columns, rows, number of ports, emergency write

TO_GUEST_SIZE, FROM_GUEST_SIZE = 64, 32
"""Entries of a port's queues: Linux fills the first with pages, and writes at most 32 KiB into an entry of the other.

A chain of the other has one for each page of a pipe that is spliced to the port: the agent's has as many at most.

What its programs have room for goes into the first at once: a driver that adds one page at a time notifies each time
while something waits for it.
"""
_CONTROL_TO, _CONTROL_FROM = 2, 3
_MAX_MESSAGE = 64  # bytes of a control message that are looked at


def queue_of(port: int) -> int:
    """Return the number of the queue to the guest of port number ``port``; the one from it is the next."""
    return 2 * port if port == 0 else 2 * port + 2


class VirtioConsole(LocalDevice):
    """A ``VirtioDevice`` with ``ports``, numbered in their order.

    What the driver repeats does not grow: of each kind of message one waits for each port.
    """

    device_type = DEVICE_TYPE
    class_code = CLASS_CODE
    features = MULTIPORT | INDIRECT

    def __init__(self, ports: Sequence[Port]) -> None:
        self._ports = tuple(ports)
        self.queue_sizes = (TO_GUEST_SIZE, FROM_GUEST_SIZE) * (len(ports) + 1)
        """See ``VirtioDevice``."""
        self.config = _CONFIG.pack(0, 0, len(ports), 0)
        """See ``VirtioDevice``."""
        # Not the control messages: they are few, and a driver may wait for their effect.
        self.deferred = frozenset(queue_of(number) + way for number in range(len(ports)) for way in (0, 1))
        """See ``VirtioDevice``."""
        self._queues: Sequence[Virtqueue] = ()
        self._several = False
        self._run: Callable[[Callable[[], None]], None] = lambda function: None
        self._messages: dict[tuple[int, int], bytes] = {}
        self._ended: set[int] = set()  # ports whose end the guest knows of
        self._opened: set[int] = set()  # ports that a program of the guest has open: others discard what comes
        for number, port in enumerate(self._ports):
            port.on_send = partial(self._on_send, number)
            port.on_receive = partial(self._on_receive, number)

    def start(self, queues: Sequence[Virtqueue], features: int, run: Callable[[Callable[[], None]], None]) -> None:
        """See ``VirtioDevice``."""
        self._queues, self._several, self._run = queues, bool(features & MULTIPORT), run
        for queue in queues[::2]:
            if queue.enabled:  # buffers for the guest to read: looked for when there is something
                queue.want_notifications(False)

    def stop(self) -> None:
        """See ``VirtioDevice``."""
        self._queues = ()
        self._messages.clear()
        self._ended.clear()
        self._opened.clear()

    def serve(self, number: int) -> None:
        """See ``VirtioDevice``."""
        if number == _CONTROL_FROM:
            self._read_control()
        elif number == _CONTROL_TO:
            self._send_messages()
        else:
            port = number // 2 if number < 2 else number // 2 - 1
            if number % 2:
                self._read_port(port)
            else:
                self._write_port(port)

    # --- ports

    def _on_send(self, number: int) -> None:
        self._run(partial(self._write_port, number))

    def _on_receive(self, number: int) -> None:
        self._run(partial(self._read_port, number))

    def _read_port(self, number: int) -> None:
        """Take what the guest has written to a port."""
        port, queue = self._ports[number], self._queues[queue_of(number) + 1]
        if not queue.enabled:
            return
        returned = False
        for chain in queue.chains():
            data = chain.read()
            queue.push(chain, 0)
            returned = True
            if self._several:
                port.output(data)
        if returned:
            queue.interrupt()

    def _write_port(self, number: int) -> None:
        """Give the guest what waits for it, as far as it has added buffers; then the end of the file."""
        port, queue = self._ports[number], self._queues[queue_of(number)]
        if not queue.enabled or number not in self._opened:
            return
        if port.waiting:
            queue.want_notifications(True)
            given = queue.fill(port.waiting, port.take)
            if not port.waiting:
                queue.want_notifications(False)  # of new chains, until there is something for them
            if given:
                queue.interrupt()
        if port.ended and not port.waiting and number not in self._ended:
            self._ended.add(number)
            self._tell(number, OPEN, 0)
            self._send_messages()

    # --- control messages

    def _read_control(self) -> None:
        queue = self._queues[_CONTROL_FROM]
        for chain in queue.chains():
            message = chain.read()[:_MAX_MESSAGE]
            queue.push(chain, 0)
            if len(message) >= _MESSAGE.size:
                self._on_message(*_MESSAGE.unpack_from(message))
        queue.interrupt()
        self._send_messages()

    def _on_message(self, number: int, event: int, value: int) -> None:
        """Handle a message of the driver."""
        if event == READY and value == 1:
            for at in range(len(self._ports)):
                self._tell(at, ADD, 0)
        elif event == PORT_READY and value == 1 and number < len(self._ports):
            # The name comes first: with it the node gets its attributes.
            self._tell(number, NAME, 1, self._ports[number].name.encode("ascii"))
            self._tell(number, OPEN, 1)
            self._ended.discard(number)
        elif event == OPEN and number < len(self._ports):
            if value == 1:
                self._opened.add(number)
                self._ports[number].on_open()
                self._write_port(number)
            elif number in self._opened:
                self._opened.discard(number)
                self._ports[number].on_close()

    def _tell(self, number: int, event: int, value: int, more: bytes = b"") -> None:
        self._messages.pop((number, event), None)
        self._messages[number, event] = _MESSAGE.pack(number, event, value) + more

    def _send_messages(self) -> None:
        """Send the messages that wait, as far as the driver has added buffers."""
        queue = self._queues[_CONTROL_TO]
        if not (queue.enabled and self._messages):
            return
        queue.want_notifications(True)
        given = False
        for chain in queue.chains():
            queue.push(chain, chain.write(self._messages.pop(next(iter(self._messages)))))
            given = True
            if not self._messages:
                queue.want_notifications(False)
                break
        if given:
            queue.interrupt()


_CHECKED: type[VirtioDevice] = VirtioConsole
