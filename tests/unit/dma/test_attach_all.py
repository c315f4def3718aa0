"""Several devices that are attached at once, over either back end: opened at the same time, all of them or none."""

from __future__ import annotations

import itertools
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from support.dma_stage import DISK, NIC, SOUND, Stage
from support.fake_vfio import Refused

from kvmpass.dma.backend import Open
from kvmpass.errors import DeviceInUse
from kvmpass.vfio import Device

ALL = {NIC: 1, SOUND: 1, DISK: 2}


def test_devices_are_opened_at_the_same_time(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the kernel resets each when it is opened (type 1), or bound (IOAS)."""
    together = threading.Barrier(len(ALL), timeout=10)
    call = stage.kernel.call

    def wait(what: str, work: Callable[[], object]) -> object:
        if what in ("get_device_fd", "bind"):
            together.wait()
        return call(what, work)

    monkeypatch.setattr(stage.kernel, "call", wait)
    devices = stage.domain.attach_all(ALL, {})
    assert [device.name for device in devices] == [*ALL]
    assert [name for name, _ in stage.calls].count("map") == 2
    stage.check()
    with pytest.raises(DeviceInUse):
        stage.domain.attach(SOUND, 1)


@pytest.mark.parametrize("order", list(itertools.permutations(ALL)))
def test_devices_with_a_token_are_opened_in_order(stage: Stage, order: tuple[str, ...]) -> None:
    """A physical function sets the token that its virtual functions need. Others are opened meanwhile."""
    token = uuid.uuid4()
    opened: dict[threading.Thread, list[str]] = {}
    beside = threading.Barrier(2, timeout=10)
    real = stage.domain.backend.attaching

    @contextmanager
    def attaching(name: str, group: int, vf_token: uuid.UUID | None = None) -> Iterator[Open]:
        def call() -> Callable[[], Device]:
            this = threading.current_thread()
            if this not in opened:
                opened[this] = []
                beside.wait()
            opened[this].append(name)
            return open_device()

        with real(name, group, vf_token) as open_device:
            yield call

    stage.domain.backend.attaching = attaching  # type: ignore[method-assign]
    tokens = {name: token for name in order if name != SOUND}
    devices: list[Any] = stage.domain.attach_all({name: ALL[name] for name in order}, tokens)
    assert [(device.name, device.vf_token) for device in devices] == [(name, tokens.get(name)) for name in order]
    assert sorted(opened.values(), key=len) == [[SOUND], [*tokens]]
    stage.check()


def test_a_token_of_another_device_is_refused(stage: Stage) -> None:
    with pytest.raises(ValueError, match=f"a VF token of {DISK}, which is not among the devices"):
        stage.domain.attach_all({NIC: 1}, {DISK: uuid.uuid4()})
    assert stage.kernel.log == []


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("present", [{}, {SOUND: 1}, {DISK: 2}], ids=["first", "same group", "other group"])
def test_several_are_attached_all_or_none(stage: Stage, present: dict[str, int], after: bool) -> None:
    stage.domain.attach_all(present, {})
    before = stage.kernel.state()
    wanted = {name: group for name, group in ALL.items() if name not in present}
    for number in itertools.count(1):
        stage.kernel.fail(number, after=after)
        try:
            stage.domain.attach_all(wanted, {})
        except Refused:
            stage.kernel.fail(0)
            assert stage.kernel.state() == before
            stage.check()
        else:
            break
    assert number > 4
    stage.check()
