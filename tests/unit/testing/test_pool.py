"""Guests that several tests use."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from kvmpass.errors import GuestDied, NotEnoughMemory
from kvmpass.testing.pool import Pool, Recording, Wish
from kvmpass.testing.state import Mode, State


class Guests:
    """Makes guests that know whether they run."""

    def __init__(self) -> None:
        self.made: list[Any] = []

    def start(self, devices: tuple[str, ...], **options: Any) -> Any:
        guest = SimpleNamespace(devices=devices, ended=None, answering=True, stopped=0, asked=[])

        def stop() -> None:
            guest.stopped += 1
            guest.ended = "the guest was stopped"

        guest.stop, guest.ping = stop, guest.asked.append
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
    with pytest.warns(pytest.PytestWarning, match="was lost after the tests before: the guest panicked"):
        assert pool.get(("a",), ("nvme",), {}) is not first
    assert [guest.stopped for guest in guests.made] == [1, 0]
    guests.made[1].answering = False
    with pytest.warns(pytest.PytestWarning, match="was lost after the tests before: it does not answer"):
        pool.get(("a",), ("nvme",), {})
    assert [guest.stopped for guest in guests.made] == [1, 1, 0]


@pytest.mark.parametrize(
    ("error", "reason"),
    [(TimeoutError("10 seconds"), "it does not answer"), (GuestDied("the guest panicked"), "the guest panicked")],
)
def test_a_guest_that_has_just_hung_is_not_used_again(guests: Guests, error: Exception, reason: str) -> None:
    """Its silence makes ``answering`` false after half a minute only: it is asked."""

    def ping(timeout: float) -> float:
        raise error

    pool = Pool(guests.start)
    first = pool.get(("a",), ("nvme",), {})
    assert pool.get(("a",), ("nvme",), {}, slowdown=2) is first
    assert guests.made[0].asked == [20.0]
    guests.made[0].ping = ping
    with pytest.warns(pytest.PytestWarning, match=f"was lost after the tests before: {reason}"):
        assert pool.get(("a",), ("nvme",), {}) is not first
    assert [guest.stopped for guest in guests.made] == [1, 0]


@pytest.mark.filterwarnings("error")
def test_a_warning_that_is_an_error_is_that_of_one_test(guests: Guests) -> None:
    """With ``-W error``."""
    pool = Pool(guests.start)
    first = pool.get(("a",), ("nvme",), {})
    guests.made[0].ended = "the guest panicked"
    with pytest.raises(pytest.PytestWarning, match="the guest panicked"):
        pool.get(("a",), ("nvme",), {})
    assert guests.made[0].stopped == 1
    assert pool.get(("a",), ("nvme",), {}) is not first


def test_a_device_is_in_one_guest_at_a_time(guests: Guests) -> None:
    pool = Pool(guests.start)
    pool.get(("a",), ("nvme",), {})
    pool.get(("b",), ("nic",), {})
    pool.get(("c",), ("nic", "edu"), {})
    assert [guest.stopped for guest in guests.made] == [0, 1, 0]
    pool.release({"nvme", "edu"}, kept=("c",))
    assert [guest.stopped for guest in guests.made] == [1, 1, 0]
    pool.close()
    assert [guest.stopped for guest in guests.made] == [1, 1, 1]


def test_the_guests_of_a_module_end_with_it(guests: Guests) -> None:
    pool = Pool(guests.start)
    for name in ("a.py::x", "b.py::x"):
        for reuse in ("session", "module"):
            wish = Wish.of(item(name, reuse=reuse))
            assert wish is not None
            pool.get(wish.key(item(name)), (), {})
    pool.end("a.py")
    assert [guest.stopped for guest in guests.made] == [0, 1, 0]


def test_other_guests_are_stopped_if_memory_is_short(guests: Guests) -> None:
    def start(devices: tuple[str, ...], **options: Any) -> Any:
        if sum(guest.stopped == 0 for guest in guests.made) == 2:
            raise NotEnoughMemory("1 GiB is missing")
        return guests.start(devices, **options)

    pool = Pool(start)
    for key in "abc":
        pool.get((key,), (), {})
    assert [guest.stopped for guest in guests.made] == [1, 1, 0]
    guests.start(())
    with pytest.raises(NotEnoughMemory):
        Pool(start).get(("d",), (), {})


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


def test_a_device_may_be_missing() -> None:
    config = cast(pytest.Config, SimpleNamespace(stash=pytest.Stash()))
    State(Mode.HARDWARE, {"nvme": "0000:01:00.0"}).store(config)
    assert Wish(("nvme?", "nic?")).addresses(config) == ("0000:01:00.0",)
    with pytest.raises(pytest.skip.Exception, match="KVMPASS_TEST_NIC is not set"):
        Wish(("nvme", "nic")).addresses(config)
