"""Guests that several tests use."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from kvmpass.testing.pool import Pool, Recording, Wish, shared_out
from kvmpass.testing.state import Mode, State


class Guests:
    """Makes guests that know whether they run."""

    def __init__(self) -> None:
        self.made: list[Any] = []

    def start(self, devices: tuple[str, ...], **options: Any) -> Any:
        guest = SimpleNamespace(devices=devices, ended=None, stopped=0)

        def stop() -> None:
            guest.stopped += 1
            guest.ended = "the guest was stopped"

        guest.stop = stop
        self.made.append(guest)
        return guest


@pytest.fixture
def guests() -> Guests:
    return Guests()


def test_a_guest_is_used_again_until_it_dies(guests: Guests) -> None:
    pool = Pool(guests.start)
    first = pool.get(("a",), ("nvme",), {})
    assert pool.get(("a",), ("nvme",), {}) is first
    guests.made[0].ended = "the guest panicked"
    assert pool.get(("a",), ("nvme",), {}) is not first
    assert [guest.stopped for guest in guests.made] == [1, 0]


def test_a_device_is_in_one_guest_at_a_time(guests: Guests) -> None:
    pool = Pool(guests.start)
    pool.get(("a",), ("nvme",), {})
    pool.get(("b",), ("nic",), {})
    pool.get(("c",), ("nic", "edu"), {})
    assert [guest.stopped for guest in guests.made] == [0, 1, 0]
    pool.close()
    assert [guest.stopped for guest in guests.made] == [1, 1, 1]


def test_all_are_stopped_even_if_one_fails(guests: Guests) -> None:
    pool = Pool(guests.start)
    pool.get(("a",), ("nvme",), {})
    pool.get(("b",), ("nic",), {})

    def fail() -> None:
        raise OSError("a driver hangs")

    guests.made[0].stop = fail
    with pytest.raises(OSError, match="hangs"):
        pool.close()
    assert guests.made[1].stopped == 1


def test_a_test_gets_its_part_of_the_console() -> None:
    console = Recording()
    console(b"before\r\n")
    size = console.size
    assert console.since(size) == ""
    console(b"mine\r\n")
    assert console.since(size) == "mine\n"


def item(name: str, **arguments: Any) -> pytest.Item:
    mark = pytest.mark.guest(**arguments).mark
    return cast(pytest.Item, SimpleNamespace(nodeid=name, get_closest_marker=lambda wanted: mark))


def test_tests_share_a_guest_by_the_arguments_of_the_marker() -> None:
    def key(name: str, **arguments: Any) -> object:
        wish = Wish.of(item(name, **arguments))
        assert wish is not None
        return wish.key(item(name, **arguments))

    assert key("a.py::x", devices=("nvme",)) == key("b.py::y", devices=("nvme",), may_die=True)
    assert key("a.py::x", devices=("nvme",)) != key("a.py::x", devices=("nvme",), memory="1G")
    assert key("a.py::x", reuse="module") == key("a.py::y", reuse="module") != key("b.py::y", reuse="module")
    assert key("a.py::x", reuse="test") != key("a.py::y", reuse="test")
    for wrong in ({"reuse": "ever"}, {"devices": "nvme"}):
        with pytest.raises(pytest.UsageError):
            key("a.py::x", **wrong)


def roles(*names: str) -> pytest.Config:
    state = State(Mode.HARDWARE, dict.fromkeys(names, "0000:01:00.0"))
    config = SimpleNamespace(stash=pytest.Stash())
    state.store(cast(pytest.Config, config))
    return cast(pytest.Config, config)


def test_workers_share_the_devices_out() -> None:
    config = roles("nvme", "nvme2", "nvme3", "nvme4", "nic")

    def share(worker: int, *wanted: str) -> list[str]:
        environ = {"PYTEST_XDIST_WORKER": f"gw{worker}", "PYTEST_XDIST_WORKER_COUNT": "2"}
        return shared_out(config, wanted, environ)

    assert shared_out(config, ("nvme2",), {}) == ["nvme2"]
    both = [share(worker, "nvme", "nvme2") for worker in range(2)]
    assert both == [["nvme", "nvme3"], ["nvme2", "nvme4"]]
    assert share(0, "nic") == ["nic"]
    with pytest.raises(pytest.fail.Exception, match="2 workers and 1 devices of the kind nic"):
        share(1, "nic")
