"""The checks of what a guest's jobs said can fail."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest

LINES = """\
before 28:         13          2  PCI-MSIX-0000:00:01.0   0-edge      nvme0q0, nvme0q1
after 28:         13          {last}  {kind}   0-edge      nvme0q0, nvme0q1
"""


@pytest.fixture
def inside(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    from support import inside

    yield inside


def test_interrupts_of_the_right_kind_that_grow_are_seen(inside: ModuleType) -> None:
    done = inside.Done(0, LINES.format(last=3, kind="PCI-MSIX-0000:00:01.0"))
    assert (done.interrupts("before"), done.interrupts("after")) == (({"PCI-MSIX"}, 15), ({"PCI-MSIX"}, 16))
    done.check_interrupts("PCI-MSIX", 1)


@pytest.mark.parametrize(
    "text",
    [
        LINES.format(last=2, kind="PCI-MSIX-0000:00:01.0"),
        LINES.format(last=9, kind="IO-APIC"),
        LINES.format(last=9, kind="PCI-MSI-0000:00:01.0"),
        LINES.splitlines()[0],
        "",
    ],
    ids=["none came", "INTx", "MSI", "gone", "silence"],
)
def test_other_interrupts_are_caught(inside: ModuleType, text: str) -> None:
    with pytest.raises(AssertionError):
        inside.Done(0, text).check_interrupts("PCI-MSIX", 1)


def test_a_job_that_failed_is_caught(inside: ModuleType) -> None:
    with pytest.raises(AssertionError, match="status 1\nno drive"):
        _ = inside.Done(1, "no drive").checked


def test_a_job_without_an_end_is_caught(inside: ModuleType) -> None:
    jobs = [inside.Job(name, "0000:00:04.0", "true") for name in ("one", "two")]
    whole = "=== one\nfirst\n=== one 0\n=== two\n=== two 3\n"
    assert inside.outcomes(jobs, whole) == {"one": inside.Done(0, "first\n"), "two": inside.Done(3, "")}
    with pytest.raises(AssertionError):
        inside.outcomes(jobs, whole.removesuffix("=== two 3\n"))
