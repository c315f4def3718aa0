"""Files of the host in a guest: its root, shares, what a guest cannot do to them, and what is left at the end."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from support.drivers import facts, until

pytestmark = pytest.mark.amdvi(duration=14)
KVMPASS = (sys.executable, "-m", "kvmpass")
OWNER = 4321
# In the initramfs, of which the guest's root is a mount: there the file system of the host's files is at hand.
ATTACK = """
chroot /proc/1/root /usr/bin/busybox sh -c '
    files=/kvmpass/lower
    mount -o remount,rw $files
    for tree in $files/"$0" /kvmpass/root/data; do
        echo changed >$tree/file || echo refused write
        echo made >$tree/made || echo refused create
        chmod 4777 $tree/file || echo refused chmod
        chown 1:1 $tree/file || echo refused chown
        mknod $tree/disk b 8 0 || echo refused mknod
        ln -s /etc/shadow $tree/link || echo refused symlink
        mv $tree/file $tree/other || echo refused rename
        rm $tree/file || echo refused unlink
        touch $tree || echo refused utimes
    done
    cat $files/etc/shadow || echo refused shadow
    ls -A $files/proc $files/sys $files/dev $files/run | grep -v : | wc -w
' "$TREE" 2>/dev/null
"""
SCRIPT = """
pwd; python3 -c 'print(6 * 7)'; cd /usr/share && ls -d doc; id -u; hostname; echo "$HOME"
echo mine >/etc/kvmpass-was-here && cat /etc/kvmpass-was-here
rm /usr/bin/env && ! test -e /usr/bin/env && echo removed
test -b /dev/nvme0n1 && test -w /dev/ptmx && grep -q . /proc/self/mounts && echo devices
cat /data/file; echo result >/out/result; mkdir /out/made; stat -c %u /out/result
"""


@pytest.fixture
def tree() -> Iterator[Path]:
    """A directory of this host that modes protect from nobody."""
    with TemporaryDirectory(dir="/var/tmp") as made:
        tree = Path(made, "tree")
        tree.mkdir()
        (tree / "file").write_text("content\n")
        for path in (tree.parent, tree, tree / "file"):
            path.chmod(0o777)
        yield tree


def digest(*paths: Path) -> list[tuple[str, int, int, int]]:
    """Contents, and the times of their last changes."""
    found = []
    for path in paths:
        status = path.stat()
        content = path.read_bytes() if path.is_file() else " ".join(map(str, path.iterdir())).encode()
        found.append((hashlib.sha256(content).hexdigest(), status.st_mode, status.st_mtime_ns, status.st_ctime_ns))
    return found


def daemons() -> list[str]:
    listed = subprocess.run(["ps", "-e", "-o", "comm="], capture_output=True, text=True, check=True).stdout
    return [name for name in listed.split() if name in ("virtiofsd", "confine")]


def test_a_guest_works_with_the_hosts_files_and_changes_none(nvme: str, tree: Path) -> None:
    """With nothing copied; a hostile one gets EROFS. What it writes to a share belongs to the share's owner."""
    out = tree.parent / "out"
    out.mkdir()
    os.chown(out, OWNER, OWNER)
    watched = (tree, tree / "file", Path("/etc/passwd"), Path("/usr/bin/env"), Path("/etc"))
    before, mounts, bindings = digest(*watched), Path("/proc/self/mountinfo").read_text(), facts()
    words = [*KVMPASS, "assign", "--memory", "256M", "--root", "host", "--share", f"{tree}:/data"]
    words += ["--share", f"{out}:/out,rw", nvme, "--", "bash", "-c", f"TREE={str(tree).lstrip('/')}{SCRIPT}{ATTACK}"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=200, cwd=tree, check=False)
    print(done.stdout, done.stderr)
    lines = done.stdout.splitlines()
    expected = [str(tree), "42", "doc", "0", "kvmpass", "/root", "mine", "removed", "devices", "content", "0"]
    assert lines[: len(expected)] == expected
    attempts = ["write", "create", "chmod", "chown", "mknod", "symlink", "rename", "unlink", "utimes"]
    assert lines[len(expected) :] == [f"refused {name}" for name in [*attempts, *attempts, "shadow"]] + ["0"]
    assert digest(*watched) == before
    assert not Path("/etc/kvmpass-was-here").exists()
    assert (out / "result").read_text() == "result\n"
    assert {path.stat().st_uid for path in out.iterdir()} == {OWNER}
    assert facts() == bindings
    assert Path("/proc/self/mountinfo").read_text() == mounts
    until(lambda: not daemons())


@pytest.mark.usefixtures("usual_signals")
def test_nothing_is_left_when_kvmpass_is_killed(edu: str, tree: Path, tmp_path: Path) -> None:
    """A share in the minimal root; no process, no mount, and a device that restore rebinds."""
    bindings, mounts = facts(), Path("/proc/self/mountinfo").read_text()
    sockets = Path("/proc/net/unix").read_text().count("\n")
    environment = os.environ | {"KVMPASS_STATE_DIR": str(tmp_path / "state")}
    words = [*KVMPASS, "assign", "--memory", "192M", "--share", str(tree), edu, "--"]
    words += ["sh", "-c", f"cat {tree}/file; touch {tree}/made || echo refused; sleep 100"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        assert [process.stdout.readline() for _ in range(2)] == ["content\n", "refused\n"]
        assert sorted(set(daemons())) == ["confine", "virtiofsd"]
        os.kill(process.pid, signal.SIGKILL)
    until(lambda: not daemons())
    assert Path("/proc/self/mountinfo").read_text() == mounts
    assert Path("/proc/net/unix").read_text().count("\n") <= sockets
    subprocess.run([*KVMPASS, "restore"], env=environment, check=True, timeout=100)
    assert facts() == bindings


def test_the_guest_ends_with_its_daemon(edu: str, tree: Path) -> None:
    words = [*KVMPASS, "assign", "--memory", "192M", "--share", str(tree), edu, "--"]
    words += ["sh", "-c", f"cat {tree}/file; exec sleep 100"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "content\n"
        subprocess.run(["pkill", "-KILL", "-x", "virtiofsd"], check=True)
        assert process.wait(60) == 126
        said = process.stderr.read()
    assert "kvmpass.share0" in said, said
    assert f"virtiofsd, which serves {tree}, was ended by SIGKILL" in said, said
    until(lambda: not daemons())


def test_what_is_not_there_is_refused_before_anything_changes(edu: str, tree: Path) -> None:
    bindings = facts()
    for words, expected in (
        (["--share", f"{tree}/missing"], "No such file"),
        (["--share", "/etc,rw"], "belongs to root"),
        (["--root", str(tree)], "has no bin/sh"),
    ):
        done = subprocess.run(
            [*KVMPASS, "assign", *words, edu, "--", "true"], capture_output=True, text=True, timeout=100, check=False
        )
        assert (done.returncode, expected in done.stderr) == (125, True), done.stderr
    assert facts() == bindings
