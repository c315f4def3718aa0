"""The lab's files: kernels, the initramfs, the cache, and the evidence of translation."""

from __future__ import annotations

import errno
import fcntl
import io
import os
import shutil
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import pytest

from kvmpass.cli.main import fail
from kvmpass.errors import LabError
from kvmpass.initramfs.cpio import newc
from kvmpass.lab import cache, initrd, kernels, proof, script
from kvmpass.lab.channels import Channels, Lines, Pump
from kvmpass.lab.kernels import Kernel
from kvmpass.lab.qemu import Emulator


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KVMPASS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def bzimage(release: str) -> bytes:
    head = bytearray(0x400)
    head[0x202:0x206] = b"HdrS"
    head[0x20E:0x210] = (0x300 - 0x200).to_bytes(2, "little")
    text = f"{release} (someone@somewhere) #1\0".encode()
    head[0x300 : 0x300 + len(text)] = text
    return bytes(head)


def test_kernel_release(tmp_path: Path) -> None:
    (tmp_path / "bzImage").write_bytes(bzimage("6.12.1-own"))
    assert kernels.kernel_release(tmp_path / "bzImage") == "6.12.1-own"


def test_a_file_that_is_not_a_kernel_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no kernel")
    with pytest.raises(LabError, match="not a Linux kernel"):
        kernels.kernel_release(tmp_path / "text")
    with pytest.raises(LabError, match="No such file"):
        kernels.kernel_release(tmp_path / "nothing")


def test_full_is_built_on_request_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(kernels.FULL_VARIABLE, raising=False)
    with pytest.raises(LabError) as caught:
        kernels.find("full", print)
    assert "kvmpass lab kernel" in caught.value.__notes__[0]


@pytest.mark.skipif(cache.find_tool("depmod") is None, reason="no depmod: apt-get install kmod makes it run")
def test_a_built_kernel_lists_its_drivers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bzImage").write_bytes(bzimage("6.12.1-own"))
    (tmp_path / "modules.builtin").write_text("kernel/drivers/vfio/pci/vfio-pci.ko\n")
    monkeypatch.setenv(kernels.FULL_VARIABLE, str(tmp_path / "bzImage"))
    kernel = kernels.find("full", print)
    assert (kernel.name, kernel.release) == ("full", "6.12.1-own")
    assert kernel.modules is not None
    assert kernel.modules.parts[-3:] == ("lib", "modules", "6.12.1-own")
    assert (kernel.modules / "modules.builtin.bin").is_file()
    assert initrd.root_modules(kernel) == []


def test_a_kernel_tree_is_found(tmp_path: Path) -> None:
    assert kernels.cached(tmp_path, "stock") is None
    (tmp_path / "boot").mkdir()
    (tmp_path / "boot" / "vmlinuz-6.12-x").touch()
    (tmp_path / "lib" / "modules" / "6.12-x").mkdir(parents=True)
    kernel = kernels.cached(tmp_path, "stock")
    assert kernel is not None
    assert kernel.release == "6.12-x"
    assert kernel.modules == tmp_path / "lib" / "modules" / "6.12-x"
    assert kernel.config is None


@pytest.mark.skipif(shutil.which("cpio") is None, reason="no cpio: apt-get install cpio makes it run")
def test_cpio_reads_the_archive(tmp_path: Path) -> None:
    data = newc({"d": initrd.DIRECTORY, "d/x": initrd.executable(b"five!"), "e": initrd.regular(b"")}.items())
    assert len(data) % 4 == 0
    subprocess.run(["cpio", "-idm", "--quiet"], cwd=tmp_path, input=data, check=True)
    assert (tmp_path / "d" / "x").read_bytes() == b"five!"
    assert os.access(tmp_path / "d" / "x", os.X_OK)
    assert (tmp_path / "e").stat().st_size == 0


def test_the_command_survives_the_shell(tmp_path: Path) -> None:
    job = script.Job(["printf", "%s|", "a b", "it's", "$HOME", "ü"], tmp_path, {"PATH": "/usr/bin:/bin"}, ())
    done = subprocess.run(["sh"], input=script.command_script(job), stdout=subprocess.PIPE, check=True)
    assert done.stdout.decode() == "a b|it's|$HOME|ü|"


def test_a_small_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "x")
    found = script.environment({"MORE": "1"})
    assert found["KVMPASS_LAB"] == found["MORE"] == "1"
    assert "SECRET" not in found


# --- the cache


def test_a_directory_is_never_seen_incomplete(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), cache.new_directory(tmp_path / "a") as draft:
        (draft / "half").touch()
        raise RuntimeError
    assert not list(tmp_path.glob("*a*"))
    with cache.new_directory(tmp_path / "a") as draft:
        (draft / "whole").touch()
        assert not (tmp_path / "a").exists()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["whole"]


def test_directories_of_killed_runs_are_removed(own_cache: Path) -> None:
    abandoned = own_cache / "runs" / "run-killed"
    abandoned.mkdir(parents=True)
    (abandoned / "lock").touch()
    with cache.run_directory() as mine, cache.run_directory() as other:
        assert not abandoned.exists()
        assert mine.exists() and other.exists()
        with pytest.raises(LabError, match="running"):
            cache.clean()
    assert list((own_cache / "runs").iterdir()) == []


NAMED = "set KVMPASS_CACHE to use another directory than"


def test_a_cache_that_cannot_be_written_is_named(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(*arguments: object, **more: object) -> str:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(own_cache / "runs/run-x"))

    own_cache.parent.joinpath("file").write_text("")
    for place, change in ((own_cache, read_only), (own_cache.parent / "file", None)):
        with monkeypatch.context() as patch:
            patch.setenv("KVMPASS_CACHE", str(place))
            if change is not None:
                patch.setattr(tempfile, "mkdtemp", change)
            with pytest.raises(OSError) as refused, cache.run_directory():
                pass
            assert refused.value.__notes__ == [f"{NAMED} {place}"]


def test_a_full_cache_is_named_once(own_cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """write(2) has no path; the output of tools counts, too; errors elsewhere get no hint."""
    note = f"kvmpass lab clean empties the cache; {NAMED} {own_cache}"
    with pytest.raises(OSError) as refused, cache.locked("one", print), cache.locked("two", print):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert refused.value.__notes__ == [note]
    fail("lab", refused.value, as_json=False)
    assert capsys.readouterr().err == f"kvmpass: {own_cache}: No space left on device\n  hint: {note}\n"
    with pytest.raises(LabError, match="unpacked: tar: No space left on device") as failed:
        cache.run_tool(["sh", "-c", "echo tar: No space left on device >&2; exit 1"], "not unpacked")
    assert failed.value.__notes__ == [note]
    with pytest.raises(OSError) as elsewhere, cache.locked("one", print):
        raise OSError(errno.EACCES, "", "/root/secret")
    assert not hasattr(elsewhere.value, "__notes__")


def test_clean_removes_the_cache(own_cache: Path) -> None:
    cache.write_atomic(own_cache / "kernels" / "x", b"x" * 10000)
    assert cache.clean() >= 10000
    assert not own_cache.exists()
    assert cache.clean() == 0


def test_clean_fails_while_the_cache_is_in_use(own_cache: Path) -> None:
    with cache.locked("full-kernel", print), pytest.raises(LabError, match="prepares full-kernel"):
        cache.clean()


def test_waiting_for_a_lock_is_reported(own_cache: Path) -> None:
    said: list[str] = []
    own_cache.mkdir()
    with (own_cache / ".kernel.lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        release = threading.Timer(0.2, fcntl.flock, (other, fcntl.LOCK_UN))
        release.start()
        with cache.locked("kernel", said.append):
            pass
        release.join()
    assert said == ["waiting for another run that prepares kernel"]


def test_the_last_line_of_a_failed_tool() -> None:
    with pytest.raises(LabError, match="it failed: the reason"):
        cache.run_tool(["sh", "-c", "echo one; echo the reason >&2; exit 3"], "it failed")


# --- the evidence

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


# --- the channels


def test_bytes_are_copied_and_counted() -> None:
    channels, target = Channels(["out"]), io.BytesIO()
    pump = Pump(channels.outer["out"], target, lambda: None)
    pump.start()
    os.write(channels.inner["out"], b"x" * 1000)
    assert pump.wait_for(1000, time.monotonic() + 5)
    assert not pump.wait_for(1001, time.monotonic() + 0.05)
    channels.close_inner()
    assert pump.wait_for(1001, time.monotonic() + 5), "the end of the port ends the wait"
    assert target.getvalue() == b"x" * 1000
    channels.close()


def test_a_writer_that_fails_is_reported() -> None:
    class Broken(io.BytesIO):
        def write(self, data: object) -> int:
            raise BrokenPipeError

    channels, failed = Channels(["out"]), threading.Event()
    pump = Pump(channels.outer["out"], Broken(), failed.set)
    pump.start()
    os.write(channels.inner["out"], b"x")
    assert failed.wait(5)
    assert isinstance(pump.failure, BrokenPipeError)
    channels.close_inner()
    pump.join(5)
    channels.close()


def test_lines_have_deadlines() -> None:
    channels = Channels(["status"])
    lines = Lines(channels.outer["status"])
    os.write(channels.inner["status"], b"ready\nexit 0")
    assert lines.read(time.monotonic() + 5) == "ready"
    with pytest.raises(TimeoutError):
        lines.read(time.monotonic() + 0.05)
    channels.close_inner()
    assert lines.read(time.monotonic() + 5) is None
    channels.close()
