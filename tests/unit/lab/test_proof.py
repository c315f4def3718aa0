"""The evidence that DMA is translated."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvmpass.errors import LabError
from kvmpass.lab import proof
from kvmpass.lab.kernels import Kernel
from kvmpass.lab.qemu import Emulator

EMULATOR = Emulator("system", Path("/q"), (7, 2, 22), ("/q",))
KERNEL = Kernel("stock", Path("/k"), "6.12")
TRANSLATED = "amdvi_translation_result devid: 00:1f.2 gpa 0xfffff000 hpa 0x102000\n"
BLOCKED = "amdvi_translation_result devid: 00:04.0 gpa 0x100000 hpa 0x0\n"
SAME = "amdvi_translation_result devid: 00:04.0 gpa 0x100000 hpa 0x100000\n"


def test_only_translated_accesses_count(tmp_path: Path) -> None:
    (tmp_path / "t").write_text(BLOCKED + TRANSLATED + SAME + "noise\n" + TRANSLATED)
    assert proof.translations(tmp_path / "t") == 2


def test_evidence_is_required_and_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proof, "SECONDS", 0.0)
    (tmp_path / "t").write_text(BLOCKED + SAME)
    with pytest.raises(LabError, match="not translated"):
        proof.require(tmp_path / "t", EMULATOR, KERNEL)
    assert "NOT TRANSLATED" in next(iter(proof.verdicts().values()))
    (tmp_path / "t").write_text(TRANSLATED)
    assert proof.require(tmp_path / "t", EMULATOR, KERNEL) == 1
    assert list(proof.verdicts()) == ["QEMU 7.2.22 (system), kernel 6.12"]
    assert "translated (1 times)" in proof.verdicts()["QEMU 7.2.22 (system), kernel 6.12"]


@pytest.mark.parametrize(
    ("append", "expected"),
    [("", False), ("quiet iommu=pt", True), ("iommu.passthrough=1", True), ("xiommu=pt", False)],
)
def test_command_lines_that_disable_translation(append: str, expected: bool) -> None:
    assert proof.bypassed(append) is expected
