"""The contents of a guest: modules under test and their parameters, files, and the memory for them."""

from __future__ import annotations

import dataclasses
import gzip
import lzma
import os
import re
import shutil
import stat
import subprocess
import time
from pathlib import Path

import pytest
from support.guests import GUEST_SECONDS, boot, run

import kvmpass
from kvmpass.errors import GuestDied, NotEnoughMemory
from kvmpass.guest import Guest, GuestSpec, prepare
from kvmpass.initramfs import GuestRoot
from kvmpass.initramfs.modules import ModuleTree, decompress
from kvmpass.machine import GuestOutcome, Machine

pytestmark = pytest.mark.amdvi(duration=20)


@pytest.mark.amdvi(profile="stock")
def test_a_driver_under_test_replaces_the_kernels_own(nvme: str, tmp_path: Path) -> None:
    """Debian's module with a byte after its signature: the kernel then marks it as unsigned."""
    module = next(Path(f"/lib/modules/{os.uname().release}").rglob("nvme.ko*"), None)
    if module is None:
        pytest.skip("this host's nvme driver is no module: run with --lab-kernel=stock")
    data = module.read_bytes()
    data = lzma.decompress(data) if module.suffix == ".xz" else data
    (tmp_path / "nvme.ko").write_bytes(data + b"\0")
    arguments = ("assign", nvme, "--memory", "384M", "--module", str(tmp_path / "nvme.ko"))
    result = run(*arguments, "--", "sh", "-c", "grep ^nvme /proc/modules; ls /dev/nvme0n1")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.decode().splitlines()
    assert lines[-1] == "/dev/nvme0n1"
    assert re.search(r"^nvme .*\(.*E.*\)$", result.stdout.decode(), re.MULTILINE), lines
    broken = tmp_path / "broken.ko"
    broken.write_bytes(b"no module")
    result = run("assign", nvme, "--module", str(broken), "--", "true")
    assert (result.returncode, result.stdout) == (125, b"")
    assert b"broken.ko" in result.stderr


def build_tree(directory: Path, *names: str) -> None:
    """Debian's kernel and some of its modules, as ``make bzImage modules`` leaves them: uncompressed, no tables."""
    release = os.uname().release
    installed = ModuleTree(release)
    files = {path for name in names for path in installed.lookup(name) or ()}
    for path in files:
        place = directory / path.removeprefix("kernel/").partition(".ko")[0]
        place.parent.mkdir(parents=True, exist_ok=True)
        place.with_name(f"{place.name}.ko").write_bytes(decompress(installed.directory / path))
    order = sorted(path.removeprefix("kernel/").partition(".ko")[0] for path in files)
    (directory / "modules.order").write_text("".join(f"{path}.o\n" for path in order))
    for name in ("modules.builtin", "modules.builtin.modinfo"):
        shutil.copy(installed.directory / name, directory)
    for path in ("arch/x86/boot", "include/config"):
        (directory / path).mkdir(parents=True)
    shutil.copy(f"/boot/vmlinuz-{release}", directory / "arch/x86/boot/bzImage")
    (directory / "include/config/kernel.release").write_text(f"{release}\n")


@pytest.mark.amdvi(profile="stock")
def test_parameters_with_spaces_and_a_module_for_no_device(nvme: str, tmp_path: Path) -> None:
    """The kernel's own modules, and those that the module needs, come from a build tree."""
    module = next(Path(f"/lib/modules/{os.uname().release}").rglob("scsi_debug.ko*"), None)
    if module is None:
        pytest.skip("this host has no scsi_debug module: run with --lab-kernel=stock")
    build_tree(tmp_path, "nvme", "virtio_pci", "virtio_console", "scsi_mod")
    result = run(
        *("assign", nvme, "--memory", "384M", "--kernel", str(tmp_path), "--module", str(module)),
        *("--append", 'scsi_debug.inq_vendor="a  b" scsi-debug.num_tgts=2'),
        *("--", "sh", "-c", "cd /sys/module/scsi_debug/parameters; cat inq_vendor num_tgts; ls /dev/nvme0n1"),
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.decode().splitlines() == ["a  b", "2", "/dev/nvme0n1"]
    assert f"kvmpass: warning: --module {module}: no alias of it matches a device" in result.stderr.decode()


def test_copied_trees_are_where_cp_puts_them(tmp_path: Path) -> None:
    """``TREE:/``, ``TREE/.:/``, into a directory of the guest's; the root of the guest works on."""
    (tmp_path / "tree/sub").mkdir(parents=True)
    (tmp_path / "tree/sub/file").write_text("content\n")
    (tmp_path / "tree/run").write_text("#!/bin/sh\ncat /tree/sub/file sub/file /sub/file /root/tree/sub/file\n")
    (tmp_path / "tree/run").chmod(0o755)
    copies = ("tree:/", "tree/.:/", "tree:/root/", "tree/sub:/root/sub")
    result, output = boot("/tree/run", copy=tuple(f"{tmp_path}/{copy}" for copy in copies))
    assert (result.status, output) == (0, b"content\n" * 4)


def test_files_come_out_whatever_the_commands_status(tmp_path: Path) -> None:
    """A directory with a file of several megabytes, odd names, and what is never brought out."""
    script = """mkdir -p /tmp/results/sub "/tmp/results/a b
c"; cd /tmp/results; dd if=/dev/zero bs=1M count=5 | tr '\\0' x >big; echo log >sub/log; chmod 4777 sub/log
        ln -s /etc/passwd link; ln big hard; mknod null c 1 3; mkfifo pipe;
        ln -s /tmp/results/sub /tmp/followed; exit 3"""
    spec = GuestSpec(
        command=("sh", "-c", script),
        copy_out=(
            f"/tmp/results:{tmp_path}/out",
            f"/etc/passwd:{tmp_path}/",
            f"/missing:{tmp_path}/",
            "/tmp/followed",
        ),
    )
    os.chdir(tmp_path)
    image = prepare(spec, [])
    with (
        Machine(memory="192M") as machine,
        Guest(machine, console=None, output=print, errors=print, copy_out=spec.copy_out) as guest,
    ):
        image.load(machine)
        result = guest.run(timeout=200)
    assert (result.status, result.failures) == (3, ())
    results, passwd, missing, followed = result.copied_out
    assert (results.error, passwd.error, followed.error) == (None, None, None), result
    assert missing.error == "no such file or directory in the guest"
    assert {line.partition(": ")[0] for line in results.left_out} >= {"out/link", "out/null", "out/pipe"}
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    links = {"out/big", "out/hard"} & files  # the archive has the content once
    assert files - links == {"out", "out/a b\nc", "out/sub", "out/sub/log", "passwd", "followed", "followed/log"}
    assert all((tmp_path / path).read_bytes() == b"x" * (5 << 20) for path in links)
    assert links
    assert stat.S_IMODE((tmp_path / "out/sub/log").stat().st_mode) & 0o7002 == 0
    assert (tmp_path / "passwd").read_text().startswith("root:")


def test_files_that_exceed_the_guests_memory(tmp_path: Path) -> None:
    """Refused on the host, by their size; an incomplete root file system is an error in the guest, too."""
    with (tmp_path / "large").open("wb") as file:
        for _ in range(110):
            file.write(os.urandom(1 << 20))
    spec = GuestSpec(command=("true",), copy=(f"{tmp_path}/large:/large",))
    image = prepare(spec, [])
    (tmp_path / "large").unlink()  # what is left is copied out of the emulated host
    with Machine(memory="256M") as machine, pytest.raises(NotEnoughMemory, match=r"11\d MiB unpacked"):
        image.load(machine)
    output = bytearray()
    with (
        Machine(memory="256M") as machine,
        Guest(machine, console=None, output=output.extend, errors=output.extend) as guest,
    ):
        dataclasses.replace(image, unpacked=0).load(machine)
        result = guest.run(timeout=200)
    assert result.status is None
    assert result.failures == ("the root file system is incomplete: the guest has too little memory to unpack it",)


def check_refusals(directory: Path, *words: str) -> None:
    """Check that too little memory is refused, for the kernel and for a large file, and that the hint works."""
    (directory / "large").write_bytes(os.urandom(40 << 20))
    hints = set()
    for memory, copy in (("32M", ()), ("64M", ("--copy", f"{directory}/large:/")), ("2M", ())):
        assign = ("assign", *words, *copy, "--memory")
        refused = run(*assign, memory, "--", "true")
        assert (refused.returncode, refused.stdout) == (125, b"")
        hint = re.search(rb"hint: give the guest (\d+) MiB \(--memory (\d+M)\)", refused.stderr)
        assert hint and b"are too little" in refused.stderr, refused.stderr
        if hint[2] in hints:
            continue  # a guest has had that memory
        hints.add(hint[2])
        result = run(*assign, hint[2].decode(), "--", "ls", "/init", *(["/large"] if copy else []))
        assert result.returncode == 0, result.stderr
        assert result.stdout.split() == [b"/init", b"/large"][: len(copy) or 1]
    (directory / "large").unlink()  # what is left is copied out of the emulated host


def test_the_memory_of_a_hint_is_enough(nvme: str, tmp_path: Path) -> None:
    check_refusals(tmp_path, nvme)


def test_the_memory_of_a_hint_is_enough_for_an_older_kernel(nvme: str, tmp_path: Path, older_kernel: Path) -> None:
    check_refusals(tmp_path, nvme, "--kernel", str(older_kernel))


# --- an initramfs of the user's own

OWN_INIT = b"""#!/bin/sh
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir /dev/pts /new
mount -t devpts devpts /dev/pts
mount -t tmpfs new /new
cp -a /usr /bin /sbin /lib /new
echo "$1" >/new/root
for place in dev proc sys; do mkdir /new/$place; mount -o move /$place /new/$place; done
exec switch_root /new /bin/sh -c 'echo settled >/dev/console; while :; do sleep 1000; done' own
"""


def wait_until_settled(guest: kvmpass.Session) -> None:
    """What starts before stays in a root that is being emptied."""
    deadline = time.monotonic() + GUEST_SECONDS
    while "settled" not in guest.console:
        assert time.monotonic() < deadline, guest.console
        time.sleep(0.02)


def test_an_initramfs_of_the_users_own_gets_the_agent(tmp_path: Path) -> None:
    """Its init is PID 1 and goes to another root, where commands run, too."""
    own = GuestRoot().tree
    own.file("/init", OWN_INIT, 0o755)
    (tmp_path / "initrd").write_bytes(gzip.compress(own.archive(), 1))
    with kvmpass.start(initrd=tmp_path / "initrd", memory="192M", append="-- moved") as guest:
        wait_until_settled(guest)
        script = "tr '\\0' ' ' </proc/1/cmdline; cat /root; ls -d /kvmpass /new; tty; mount -t tmpfs more /sbin; cat"
        script += "; cat /proc/$PPID/oom_score_adj /proc/self/oom_score_adj"
        script += '; [ "$(stat -c %d /proc/$PPID/root/)" = "$(stat -c %d /)" ] || echo apart'
        done = guest.run(["sh", "-c", script], input=b"input\n", timeout=GUEST_SECONDS)
        assert done.stdout.decode().splitlines() == [
            "/bin/sh -c echo settled >/dev/console; while :; do sleep 1000; done own moved",
            "not a tty",
            "input",
            "-1000",
            "0",
            "apart",  # it keeps nobody from unmounting that root
        ]
        with guest.popen(["tty"], stdout=subprocess.PIPE, tty=True) as process:
            assert process.stdout is not None and process.stdout.read() == b"/dev/pts/0\r\n"
        (tmp_path / "file").write_text("content")
        guest.copy_in(tmp_path / "file", "/copied/")
        guest.copy_out("/copied/file", tmp_path / "back")
        assert (tmp_path / "back").read_text() == "content"
    assert guest.stop().outcome is GuestOutcome.POWEROFF


@pytest.mark.soak("another guest")
def test_the_end_of_the_agent_beside_an_init_is_noticed(tmp_path: Path) -> None:
    own = GuestRoot().tree
    own.file("/init", OWN_INIT, 0o755)
    (tmp_path / "initrd").write_bytes(own.archive())
    with kvmpass.start(initrd=tmp_path / "initrd", memory="192M", append="-- moved") as guest:
        wait_until_settled(guest)
        begin = time.monotonic()
        with pytest.raises(GuestDied, match=r"^the agent in the guest has ended$"):
            guest.run(["sh", "-c", "(sleep 12; poweroff -f) & kill -9 $PPID; sleep 1000"], timeout=GUEST_SECONDS)
        assert time.monotonic() - begin >= 5
        assert not guest.answering
        assert guest.wait(GUEST_SECONDS)
    assert guest.stop().outcome is GuestOutcome.POWEROFF
