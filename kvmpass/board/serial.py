"""A 16550A UART (TL16C550D data sheet; Linux drivers/tty/serial/8250).

The transmitter is always empty: a byte is sent when it is written. Input waits in an unlimited queue before a receive
FIFO of 16 bytes. With RTS off, as with hardware flow control, no input moves into the FIFO, so that none is lost when
a driver clears the FIFO as it opens the port.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

FIFO_SIZE = 16
TRIGGER_LEVELS = (1, 4, 8, 14)

RBR_THR, IER, IIR_FCR, LCR, MCR, LSR, MSR, SCR = range(8)

IER_RX, IER_TX, IER_LINE, IER_MODEM = 1, 2, 4, 8
IIR_NONE, IIR_MODEM, IIR_TX, IIR_RX, IIR_TIMEOUT, IIR_LINE = 0x01, 0x00, 0x02, 0x04, 0x0C, 0x06
IIR_FIFO = 0xC0
FCR_ENABLE, FCR_CLEAR_RX = 1, 2
LCR_DLAB = 0x80
MCR_DTR, MCR_RTS, MCR_OUT1, MCR_OUT2, MCR_LOOP = 1, 2, 4, 8, 0x10
LSR_DATA, LSR_OVERRUN, LSR_TX_EMPTY = 0x01, 0x02, 0x60
MSR_CTS, MSR_DSR, MSR_RI, MSR_DCD = 0x10, 0x20, 0x40, 0x80
RI_ENDED = 4  # TERI: the delta of RI is its trailing edge only


class Serial16550:
    """A bus device of eight byte-wide registers.

    ``on_output`` is called with the bytes that the guest sends, from the vCPU thread that sends them. ``set_irq`` is
    called when the interrupt's level changes: high while any enabled condition is pending.

    Synchronization: from any thread. ``set_irq`` is called with the device's lock held, so that levels stay in order,
    and must not call back; ``on_output`` is called without it.
    """

    def __init__(self, on_output: Callable[[bytes], None], set_irq: Callable[[bool], None]) -> None:
        self._on_output = on_output
        self._set_irq = set_irq
        self._lock = threading.Lock()
        self._waiting: deque[int] = deque()
        self._fifo: deque[int] = deque()
        self._divisor = 12  # 9600 baud
        self._ier = self._lcr = self._mcr = self._scratch = self._fcr = 0
        self._errors = 0
        self._tx_pending = False
        self._deltas = 0
        self._level = False

    def push(self, data: bytes) -> int:
        """Queue bytes for the guest to receive. Return how many are not in its FIFO yet."""
        with self._lock:
            self._waiting.extend(data)
            self._refill()
            self._update()
            return len(self._waiting)

    def read(self, offset: int, size: int) -> bytes:
        """Read registers; ones beyond the last."""
        with self._lock:
            data = bytes(self._read(at) if at <= SCR else 0xFF for at in range(offset, offset + size))
            self._update()
        return data

    def write(self, offset: int, data: bytes) -> None:
        """Write registers; ignored beyond the last."""
        sent = bytearray()
        with self._lock:
            for at, value in enumerate(data, offset):
                if at == RBR_THR and not self._lcr & LCR_DLAB:
                    if not self._mcr & MCR_LOOP:
                        sent.append(value)
                    elif len(self._fifo) < self._capacity():
                        self._fifo.append(value)
                    else:
                        self._errors |= LSR_OVERRUN
                    self._tx_pending = True
                elif at <= SCR:
                    self._write(at, value)
            self._update()
        if sent:
            self._on_output(bytes(sent))

    # --- registers

    def _read(self, at: int) -> int:
        if self._lcr & LCR_DLAB and at in (RBR_THR, IER):
            return self._divisor >> 8 * at & 0xFF
        if at == RBR_THR:
            value = self._fifo.popleft() if self._fifo else 0
            self._refill()
            return value
        if at == IIR_FCR:
            reason = self._reason()
            if reason == IIR_TX:
                self._tx_pending = False
            return reason | (IIR_FIFO if self._fcr & FCR_ENABLE else 0)
        if at == LSR:
            value = self._errors | LSR_TX_EMPTY | (LSR_DATA if self._fifo else 0)
            self._errors = 0
            return value
        if at == MSR:
            value = self._modem_lines() | self._deltas
            self._deltas = 0
            return value
        return {IER: self._ier, LCR: self._lcr, MCR: self._mcr, SCR: self._scratch}[at]

    def _write(self, at: int, value: int) -> None:
        if self._lcr & LCR_DLAB and at in (RBR_THR, IER):
            shift = 8 * at
            self._divisor = self._divisor & ~(0xFF << shift) | value << shift
        elif at == IER:
            # Enabling the transmitter's interrupt raises it: the transmitter is always empty.
            if value & IER_TX and not self._ier & IER_TX:
                self._tx_pending = True
            self._ier = value & 0x0F
        elif at == IIR_FCR:
            changed = (value ^ self._fcr) & FCR_ENABLE
            if value & FCR_CLEAR_RX or changed:
                self._fifo.clear()
            # Without the enable bit the other bits of this register cannot be programmed.
            self._fcr = value & 0xC1 if value & FCR_ENABLE else 0
            self._refill()
        elif at == LCR:
            self._lcr = value
        elif at == MCR:
            before = self._modem_lines()
            self._mcr = value & 0x1F
            changed = before ^ self._modem_lines()
            ended = RI_ENDED if changed & before & MSR_RI else 0
            self._deltas |= (changed & ~MSR_RI) >> 4 | ended
            self._refill()
        elif at == SCR:
            self._scratch = value

    # --- inside

    def _capacity(self) -> int:
        return FIFO_SIZE if self._fcr & FCR_ENABLE else 1

    def _refill(self) -> None:
        if not self._mcr & MCR_RTS or self._mcr & MCR_LOOP:
            return
        while self._waiting and len(self._fifo) < self._capacity():
            self._fifo.append(self._waiting.popleft())

    def _modem_lines(self) -> int:
        if not self._mcr & MCR_LOOP:
            return MSR_CTS | MSR_DSR | MSR_DCD
        pairs = ((MCR_RTS, MSR_CTS), (MCR_DTR, MSR_DSR), (MCR_OUT1, MSR_RI), (MCR_OUT2, MSR_DCD))
        return sum(line for output, line in pairs if self._mcr & output)

    def _reason(self) -> int:
        """Return the pending interrupt of highest priority, as in IIR."""
        if self._ier & IER_LINE and self._errors:
            return IIR_LINE
        if self._ier & IER_RX and self._fifo:
            # Hardware waits for the time of four characters below the trigger level.
            full = not self._fcr & FCR_ENABLE or len(self._fifo) >= TRIGGER_LEVELS[self._fcr >> 6]
            return IIR_RX if full else IIR_TIMEOUT
        if self._ier & IER_TX and self._tx_pending:
            return IIR_TX
        if self._ier & IER_MODEM and self._deltas:
            return IIR_MODEM
        return IIR_NONE

    def _update(self) -> None:
        level = self._reason() != IIR_NONE
        if level != self._level:
            self._level = level
            self._set_irq(level)
