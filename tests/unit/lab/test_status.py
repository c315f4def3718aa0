"""`kvmpass lab status` shows what is missing, and downloads nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvmpass.errors import LabError
from kvmpass.lab import build, debian, kernels, proof, qemu, status
from kvmpass.lab.qemu import Emulator


@pytest.fixture(autouse=True)
def bare_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVMPASS_CACHE", str(tmp_path / "cache"))
    for recipe in kernels.RECIPES.values():
        monkeypatch.delenv(recipe.variable, raising=False)
    monkeypatch.setattr(build, "missing_packages", lambda: ["flex", "bison"])
    monkeypatch.setattr(debian, "download_and_unpack", lambda *_: pytest.fail("a download"))


def table() -> dict[str, status.Row]:
    return {row.part: row for row in status.rows()}


def test_a_bare_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing() -> Emulator:
        raise LabError("no QEMU is installed", "apt-get install qemu-system-x86")

    monkeypatch.setattr(qemu, "system", nothing)
    rows = table()
    assert not rows["QEMU system"].ok
    assert "apt-get install qemu-system-x86" in rows["QEMU system"].text
    assert rows["QEMU modern"].ok, "it is fetched on request only"
    assert "kvmpass lab qemu" in rows["QEMU modern"].text
    assert kernels.STOCK_PACKAGE in rows["kernel stock"].text
    assert rows["kernel full"].text == "not built: apt-get install flex bison, then kvmpass lab kernel"
    assert rows["kernel next"].text.endswith("then kvmpass lab kernel --next")


def test_a_broken_qemu_counts_as_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Emulator("system", Path("/q"), (10, 0, 2), ("/q",))
    monkeypatch.setattr(qemu, "system", lambda: broken)
    assert not table()["QEMU system"].ok
    assert "broken" in table()["QEMU system"].text


def test_missing_tools_are_named_with_their_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "find_tool", lambda name: None if name == "modprobe" else Path(name))
    row = table()["tool missing"]
    assert (row.ok, row.text) == (False, "modprobe: apt-get install kmod")


def test_the_last_result_of_the_translation_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proof, "verdicts", lambda: {"QEMU 7.2.22 (system), kernel 6.12": "translated (18 times)"})
    assert table()["DMA"].text == "QEMU 7.2.22 (system), kernel 6.12: translated (18 times)"
