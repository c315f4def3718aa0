"""Devices whose configuration space says anything: each is refused clearly, or works as far as it goes."""

from __future__ import annotations

import os
import random
from dataclasses import replace

import pytest
from support.fake_function import Board, FakeDevice

from kvmpass import pciregs
from kvmpass.errors import KvmpassError
from kvmpass.pciregs import capabilities, extended_capabilities
from kvmpass.vfio.device import MSI, MSIX

SPACES = 40_000 if os.environ.get("KVMPASS_SOAK") == "1" else 1_500
KNOWN = (0x01, 0x03, 0x05, 0x09, 0x10, 0x11, 0x12, 0x13, 0x0D)


def random_space(choose: random.Random) -> bytes:
    """256 or 4096 bytes; most have lists of capabilities that lead somewhere, often to the last bytes."""
    space = bytearray(choose.randbytes(choose.choice((256, 4096, 4096))))
    if choose.randrange(8):
        space[pciregs.STATUS] |= pciregs.STATUS_CAPABILITIES
        places = [choose.choice((0x40, 0x44, 0xF0, 0xF4, 0xF8, 0xFC, 4 * choose.randrange(16, 64))) for _ in range(6)]
        space[pciregs.CAPABILITIES] = places[0]
        for at, following in zip(places, [*places[1:], choose.choice((0, 0x40, places[0]))], strict=True):
            space[at : at + 2] = bytes([choose.choice(KNOWN), following])
    if len(space) > 256 and choose.randrange(4):
        places = [choose.choice((0x100, 0xFFC, 0xFF0, 4 * choose.randrange(64, 1024))) for _ in range(5)]
        for at, following in zip([0x100, *places], [*places, choose.choice((0, 0x100, 0x40))], strict=True):
            header = choose.choice((1, 3, 4, 0xB, 0x10, 0x23)) | 1 << 16 | following << 20
            space[at : at + 4] = header.to_bytes(4, "little")
    return bytes(space)


def use(board: Board, choose: random.Random) -> None:
    """As a guest would: walk the lists, then write anywhere."""
    for cap in capabilities(board.config_read):
        board.config_read(cap.offset, 4)
    assert len(extended_capabilities(board.config_read)) < 1000
    for _ in range(200):
        offset, size = choose.randrange(4096), choose.choice((1, 2, 4))
        if choose.randrange(2):
            board.config_write(offset, choose.getrandbits(8 * size), size)
        else:
            board.config_read(offset, size)


@pytest.mark.parametrize("seed", range(4))
def test_any_configuration_space(seed: int) -> None:
    choose = random.Random(seed)
    worked = 0
    for _ in range(SPACES // 4):
        device = FakeDevice(random_space(choose))
        vectors = choose.choice((0, 1, 5, 2048))
        for index in (MSI, MSIX):
            resizable = bool(choose.randrange(2))
            device.irqs[index] = replace(device.irqs[index], count=vectors, resizable=resizable)
        try:
            board = Board(device)
        except KvmpassError:
            continue
        worked += 1
        use(board, choose)
        board.close()
    assert worked > SPACES // 8, "most of them should work"


@pytest.mark.parametrize("id_", KNOWN)
@pytest.mark.parametrize("size", [256, 4096])
def test_a_capability_in_the_last_bytes(id_: int, size: int) -> None:
    """0xFC is the last place: two registers fit there, and those of few capabilities."""
    space = bytearray(size)
    space[pciregs.STATUS] = pciregs.STATUS_CAPABILITIES
    space[pciregs.CAPABILITIES] = 0xFC
    space[0xFC:0x100] = bytes([id_, 0, 0xFF, 0xFF])
    board = Board(FakeDevice(bytes(space)))
    shown = [cap.id for cap in capabilities(board.config_read)]
    assert shown == ([id_] if id_ in (0x03, 0x09, 0x10, 0x12, 0x13) else [])
    use(board, random.Random(id_))
    assert board.config_read(0x100) in (0, 0xFFFF_FFFF)
    board.close()


def test_registers_that_another_capability_begins_in() -> None:
    """MSI needs 24 bytes here, the next one begins after 16: what is emulated would cover its header."""
    space = bytearray(256)
    space[pciregs.STATUS] = pciregs.STATUS_CAPABILITIES
    space[pciregs.CAPABILITIES] = 0x40
    space[0x40:0x44] = bytes([pciregs.CAP_MSI, 0x50, 0x80, 0x01])
    space[0x50:0x54] = bytes([pciregs.CAP_POWER, 0, 0, 0])
    board = Board(FakeDevice(bytes(space)))
    assert [(cap.id, cap.offset) for cap in capabilities(board.config_read)] == [(pciregs.CAP_POWER, 0x50)]
    assert board.config_read(0x40) == 0
    board.close()
