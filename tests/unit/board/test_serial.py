"""The 16550A, accessed as drivers do."""

from __future__ import annotations

from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmpass.board.serial import Serial16550
from kvmpass.bus import Bus

RBR, IER, IIR, LCR, MCR, LSR, MSR, SCR = range(8)
THR, FCR = RBR, IIR
NO_INTERRUPT, TX, RX, TIMEOUT, MODEM = 1, 2, 4, 0xC, 0


class Port:
    """A UART with its output and every change of its interrupt line."""

    def __init__(self) -> None:
        self.output = bytearray()
        self.edges: list[bool] = []
        self.uart = Serial16550(self.output.extend, self.edges.append)

    def get(self, register: int) -> int:
        return self.uart.read(register, 1)[0]

    def put(self, register: int, value: int) -> None:
        self.uart.write(register, bytes([value]))

    @property
    def line(self) -> bool:
        return bool(self.edges) and self.edges[-1]


@pytest.fixture
def port() -> Port:
    return Port()


def open_port(port: Port) -> None:
    port.put(FCR, 0x81)
    port.put(MCR, 0x0B)
    port.put(IER, 0x05)


def test_linux_sees_a_16550a(port: Port) -> None:
    """The probes of autoconfig() in Linux' 8250_port.c, one by one."""
    port.put(IER, 0)
    assert port.get(IER) & 0xF == 0
    port.put(IER, 0xF)
    assert port.get(IER) & 0xF == 0xF
    port.put(IER, 0)
    # Loopback: OUT2 and RTS come back as DCD and CTS.
    port.put(MCR, 0x10 | 0x0A)
    assert port.get(MSR) & 0xF0 == 0x90
    port.put(MCR, 0)
    # EFR (StarTech) would read 0 here.
    port.put(LCR, 0xBF)
    assert port.get(IIR) != 0
    port.put(LCR, 0)
    port.put(FCR, 1)
    assert port.get(IIR) >> 6 == 3
    port.put(LCR, 0x80)
    assert port.get(IIR) != 0
    # National's second bank: EXCR1 would follow MCR's loop bit.
    port.put(LCR, 0)
    before = port.get(MCR)
    port.put(MCR, before ^ 0x10)
    port.put(LCR, 0xE0)
    assert not (port.get(IIR) ^ before) & 0x10
    port.put(LCR, 0)
    port.put(MCR, before)
    # 64-byte FIFO of a 16750.
    port.put(FCR, 0x21)
    assert port.get(IIR) >> 5 == 6
    port.put(LCR, 0x80)
    port.put(FCR, 0x21)
    assert port.get(IIR) >> 5 == 6
    port.put(LCR, 0)
    port.put(FCR, 1)
    # XScale's unit-enable bit.
    port.put(IER, 0x40)
    assert port.get(IER) == 0
    port.put(SCR, 0xA5)
    assert port.get(SCR) == 0xA5


def test_enabling_the_transmitter_interrupt_raises_it_each_time(port: Port) -> None:
    """As tested twice by serial8250_do_startup() for UART_BUG_THRE."""
    for _ in range(2):
        port.put(IER, 2)
        assert port.line
        assert port.get(IIR) & 0xF == TX
        assert not port.line, "reading IIR clears the transmitter's interrupt"
        assert port.get(IIR) & 0xF == NO_INTERRUPT
        port.put(IER, 0)


def test_sending_raises_the_interrupt_again(port: Port) -> None:
    port.put(IER, 2)
    port.get(IIR)
    for byte in b"hello":
        port.put(THR, byte)
    assert port.output == b"hello"
    assert port.edges == [True, False, True]
    assert port.get(LSR) == 0x60
    port.put(IER, 0)
    assert not port.line


def test_receiving(port: Port) -> None:
    open_port(port)
    port.uart.push(b"ab")
    assert port.edges == [True]
    assert port.get(IIR) & 0xF == TIMEOUT
    assert port.get(LSR) & 1
    assert (port.get(RBR), port.line) == (ord("a"), True)
    assert (port.get(RBR), port.line) == (ord("b"), False)
    assert not port.get(LSR) & 1
    assert port.get(IIR) & 0xF == NO_INTERRUPT
    port.uart.push(b"x" * 8)
    assert port.get(IIR) & 0xF == RX


def test_input_larger_than_the_fifo_arrives_complete(port: Port) -> None:
    open_port(port)
    data = bytes(range(256)) * 3
    assert port.uart.push(data) == len(data) - 16
    received = bytearray()
    while port.get(LSR) & 1:
        received.append(port.get(RBR))
    assert received == data
    assert port.edges == [True, False]


def test_input_waits_for_rts_and_is_not_cleared_with_the_fifo(port: Port) -> None:
    assert port.uart.push(b"early") == 5
    port.put(FCR, 0x07)
    assert not port.get(LSR) & 1
    open_port(port)
    assert bytes(port.get(RBR) for _ in range(5)) == b"early"


def test_receive_comes_before_transmit(port: Port) -> None:
    open_port(port)
    port.put(IER, 3)
    port.uart.push(b"z")
    assert port.get(IIR) & 0xF == TIMEOUT
    assert port.get(RBR) == ord("z")
    assert port.line, "the transmitter is pending"
    assert port.get(IIR) & 0xF == TX
    assert port.edges == [True, False]


def test_loopback_keeps_bytes_inside(port: Port) -> None:
    port.put(FCR, 1)
    port.put(MCR, 0x10)
    port.get(MSR)
    for byte in range(20):
        port.put(THR, byte)
    assert port.output == b""
    assert port.get(LSR) & 2, "an overrun"
    assert not port.get(LSR) & 2, "cleared by the read"
    assert [port.get(RBR) for _ in range(16)] == list(range(16))
    port.put(IER, 8)
    port.put(MCR, 0x12)
    assert port.line
    assert port.get(IIR) & 0xF == MODEM
    assert port.get(MSR) == 0x11
    assert not port.line
    assert port.get(MSR) == 0x10


def test_divisor_latch(port: Port) -> None:
    port.put(LCR, 0x80)
    port.put(RBR, 0x34)
    port.put(IER, 0x12)
    assert (port.get(RBR), port.get(IER)) == (0x34, 0x12)
    port.put(LCR, 0x03)
    assert port.get(IER) == 0
    assert port.output == b""


def test_the_output_callback_may_push_input() -> None:
    """An echo in the callback: it runs without the device's lock."""
    echo: deque[bytes] = deque()

    def answer(data: bytes) -> None:
        echo.append(data)
        uart.push(data)

    uart = Serial16550(answer, lambda _level: None)
    uart.write(MCR, b"\x03")
    uart.write(THR, b"!")
    assert uart.read(RBR, 1) == b"!"
    assert list(echo) == [b"!"]


ACCESS = st.one_of(
    st.tuples(st.just("read"), st.integers(0, 7), st.sampled_from([1, 2, 4, 8])),
    st.tuples(st.just("write"), st.integers(0, 7), st.binary(min_size=1, max_size=8)),
    st.tuples(st.just("push"), st.just(0), st.binary(max_size=40)),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(ACCESS, max_size=80))
def test_no_access_raises(accesses: list[tuple[str, int, int | bytes]]) -> None:
    port = Port()
    for kind, offset, argument in accesses:
        if kind == "read":
            assert isinstance(argument, int)
            assert len(port.uart.read(offset, argument)) == argument
        elif kind == "write":
            assert isinstance(argument, bytes)
            port.uart.write(offset, argument)
        else:
            assert isinstance(argument, bytes)
            port.uart.push(argument)
    assert all(a != b for a, b in zip(port.edges, port.edges[1:], strict=False)), "a level reported twice"
    # In any state: low without enabled conditions, and an edge when the transmitter's is enabled.
    port.put(LCR, 3)
    port.put(IER, 0)
    assert not port.line
    port.put(IER, 2)
    assert port.line


def test_on_a_bus(port: Port) -> None:
    bus = Bus("port")
    bus.add(0x3F8, 8, port.uart)
    bus.write(0x3F8, b"A")
    assert bus.read(0x3FD, 1) == b"\x60"
    assert port.output == b"A"
