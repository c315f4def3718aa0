"""The initramfs: archive, copied files, scripts."""

from __future__ import annotations

import os
import re
import shutil
import signal
import stat
import subprocess
from pathlib import Path

import pytest
from support.kernel_files import module

from kvmpass.errors import KvmpassError
from kvmpass.files import find_daemon
from kvmpass.initramfs import GuestRoot, beside, elf, files, find_busybox, init
from kvmpass.initramfs import parameters as parameters_module
from kvmpass.initramfs.cpio import Tree
from kvmpass.initramfs.modules import ModuleTree
from kvmpass.initramfs.served import Entry, Served

Files = dict[str, tuple[int, bytes]]


def unpack(archive: bytes) -> Files:
    """Unpack a newc archive: mode and content by name, in order."""
    found: Files = {}
    at = 0
    while True:
        assert archive[at : at + 6] == b"070701"
        fields = [int(archive[at + 6 + 8 * index : at + 14 + 8 * index], 16) for index in range(13)]
        mode, size, length = fields[1], fields[6], fields[11]
        assert (fields[2], fields[3], fields[5]) == (0, 0, 0), "owner and time"
        name = archive[at + 110 : at + 110 + length - 1].decode()
        at = (at + 110 + length + 3) & ~3
        content = archive[at : at + size]
        at = (at + size + 3) & ~3
        if name == "TRAILER!!!":
            assert at == len(archive)
            return found
        assert name not in found
        parent = name.rpartition("/")[0]
        assert not parent or stat.S_ISDIR(found[parent][0]), f"{name} before its parent"
        found[name] = (mode, content)


@pytest.fixture
def busybox(tmp_path: Path) -> Path:
    """A script that lists applets as busybox does."""
    path = tmp_path / "fake-busybox"
    path.write_text("#!/bin/sh\nprintf 'sh\\nbusybox\\nls\\ninit\\n'\n")
    path.chmod(0o755)
    return path


def test_a_busybox_that_fails_is_named(busybox: Path) -> None:
    busybox.write_text('#!/bin/sh\necho $$ >"$0.pid"\necho sh\nexit 3\n')
    before = {*Path("/proc/self/fd").iterdir()}
    with pytest.raises(KvmpassError, match="fake-busybox --list failed with status 3: ") as failed:
        GuestRoot(busybox)
    assert "busybox-static" in failed.value.__notes__[0]
    busybox.write_text("no program")
    with pytest.raises(OSError, match="Exec format error"):
        GuestRoot(busybox)
    assert {*Path("/proc/self/fd").iterdir()} == before
    with pytest.raises(ChildProcessError):  # not -1: other tests of this process may have children of their own
        os.waitpid(int(busybox.with_name(f"{busybox.name}.pid").read_text()), os.WNOHANG)


def test_a_busybox_is_asked_where_the_kernel_keeps_no_status(busybox: Path) -> None:
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # as inherited from some supervisors
    try:
        GuestRoot(busybox)
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_programs_are_not_found_where_the_user_may_not_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    locked = tmp_path / "locked"
    locked.mkdir()
    for name in ("busybox", "virtiofsd"):
        (locked / name).touch(0o755)
    locked.chmod(0)
    monkeypatch.setattr("kvmpass.initramfs._PROGRAMS", (str(locked),))
    monkeypatch.setattr("kvmpass.files.program.PLACES", (f"{locked}/virtiofsd".lstrip("/"),))
    child = os.fork()
    if child == 0:
        try:
            if os.geteuid() == 0:  # who may search any directory
                os.setuid(65534)
            assert find_daemon() is None
            with pytest.raises(KvmpassError, match="no busybox on this host"):
                find_busybox()
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0


def test_equal_content_gives_equal_bytes(busybox: Path) -> None:
    def made() -> bytes:
        root = GuestRoot(busybox)
        root.run_command(["ls", "-l"])
        return root.build()

    assert made() == made()
    content = unpack(made())
    assert content["bin"] == (stat.S_IFLNK | 0o777, b"usr/bin")
    assert content["usr/bin/sh"] == (stat.S_IFLNK | 0o777, b"busybox")
    assert "usr/bin/init" not in content
    assert content["init"] == (stat.S_IFLNK | 0o777, b"/kvmpass/agent")
    assert content["kvmpass/agent"] == (stat.S_IFREG | 0o755, init.agent())
    assert content["kvmpass/init.sh"][0] == stat.S_IFREG | 0o755
    assert stat.S_ISCHR(content["dev/console"][0])
    assert content["tmp"][0] == stat.S_IFDIR | 0o1777
    assert content["kvmpass/command"][1] == b"exec ls -l\n"


def test_no_copied_file_replaces_the_guests_init(busybox: Path, tmp_path: Path) -> None:
    """Most root file systems that one copies have an /init, or a link to systemd, of their own."""
    own = tmp_path / "rootfs"
    (own / "kvmpass").mkdir(parents=True)
    (own / "init").write_text("another")
    for name in ("agent", "init.sh", "settings", "load"):
        (own / "kvmpass" / name).write_text("another")
    expected = unpack(GuestRoot(busybox).build())
    root = GuestRoot(busybox)
    root.copy(f"{own}/.:/")
    archive = root.build()
    assert unpack(archive) == expected
    assert archive == GuestRoot(busybox).build(), "nor does one move them behind the others"


def test_the_scripts_are_shell_scripts(busybox: Path, tmp_path: Path) -> None:
    root = GuestRoot(busybox)
    root.run_command(["true"])
    content = unpack(root.build())
    shells = [["sh", "-n"]] + ([["busybox", "sh", "-n"]] if shutil.which("busybox") else [])
    for name in ("init", "kvmpass/load", "kvmpass/settings", "kvmpass/command"):
        path = tmp_path / "script"
        path.write_bytes(content[name][1])
        for shell in shells:
            subprocess.run([*shell, path], check=True)


def test_variables_and_the_directory_of_a_command(busybox: Path) -> None:
    root = GuestRoot(busybox)
    root.run_command(["ls"], ["A=b c", "D="], "/a b", needs_agent="-t")
    content = unpack(root.build())
    assert content["kvmpass/command"][1] == b"export 'A=b c'\nexport D=\ncd '/a b' || exit 127\nexec ls\n"
    assert b"AGENT=-t\n" in content["kvmpass/settings"][1]
    for variable in ("A", "=b", "1=b", "A-B=c", ""):
        with pytest.raises(KvmpassError, match="NAME=VALUE"):
            root.run_command(["ls"], [variable])


@pytest.mark.parametrize("command", [["true"], None])
def test_settings_of_the_init_script(busybox: Path, tmp_path: Path, command: list[str] | None) -> None:
    root = GuestRoot(busybox)
    if command:
        root.run_command(command)
    term = "xterm-256color'; x"
    root.terminal(term, (50, 132))
    content = unpack(root.build())
    assert ("kvmpass/command" in content) == (command is not None)
    names = ("COMMAND", "EXPECTED", "TERM", "TERMINAL_SIZE")
    script = content["kvmpass/settings"][1] + b"".join(b'printf "%%s\\n" "$%s"\n' % name.encode() for name in names)
    done = subprocess.run(["sh"], input=script, capture_output=True, check=True, env=dict.fromkeys(names, "x"))
    assert done.stdout.decode().splitlines() == ["yes" if command else "", "", term, "rows 50 cols 132"]
    for name in names:
        assert re.search(rf"\${name}\b|export {name}\b", init.SCRIPT.read_text()), f"{name} is not used"


@pytest.mark.parametrize(
    "words", [["a b", "c'd", '"$HOME"', "`x`", "", "line\nbreak", "-n", "é\udcff", "*"], ["'", "\\", "!"]]
)
def test_arguments_arrive_unchanged(words: list[str], tmp_path: Path) -> None:
    path = tmp_path / "command"
    path.write_bytes(init.calls([("exec", "printf", "%s\\0", *words)]))
    done = subprocess.run(["sh", path], check=True, capture_output=True)
    assert done.stdout == b"".join(os.fsencode(word) + b"\0" for word in words)


def test_invalid_commands_are_refused(busybox: Path) -> None:
    root = GuestRoot(busybox)
    for command in ([], ["a", "b\0"]):
        with pytest.raises(KvmpassError):
            root.run_command(command)


def test_merged_directories() -> None:
    tree = Tree()
    tree.file("/lib/x86_64-linux-gnu/libz.so", b"1")
    assert "/usr/lib/x86_64-linux-gnu/libz.so" in tree
    tree.file("/usr/lib/x86_64-linux-gnu/libz.so", b"2")
    assert unpack(tree.archive())["usr/lib/x86_64-linux-gnu/libz.so"][1] == b"2"


@pytest.mark.parametrize("path", ["relative", "/a/../b", ""])
def test_paths_stay_in_the_guest(path: str) -> None:
    with pytest.raises(KvmpassError, match="absolute path"):
        Tree().file(path, b"")


def test_files_and_directories_never_replace_each_other() -> None:
    tree = Tree()
    tree.file("/a", b"")
    with pytest.raises(KvmpassError, match="not a directory"):
        tree.file("/a/b", b"")
    tree.directory("/d/e")
    for path in ("/d", "/lib"):
        with pytest.raises(KvmpassError, match="is a directory"):
            tree.file(path, b"")


def test_many_symlinks_are_as_each_alone() -> None:
    many, alone = Tree(), Tree()
    names = ["[", "ls", "cat", "..."]
    many.symlinks("/bin", names, "busybox")
    for name in names:
        alone.symlink(f"/bin/{name}", "busybox")
    assert many.archive() == alone.archive()
    assert "/usr/bin/ls" in many
    many.directory("/usr/bin/d/e")
    with pytest.raises(KvmpassError, match="is a directory"):
        many.symlinks("/bin", ["d"], "busybox")
    for name in ("../x", ".."):
        with pytest.raises(KvmpassError, match="absolute path"):
            many.symlinks("/bin", [name], "busybox")


def test_a_directory_keeps_modes_and_symlinks(tmp_path: Path) -> None:
    source = tmp_path / "tree"
    (source / "sub").mkdir(parents=True)
    (source / "sub/tool").write_bytes(b"data")
    (source / "sub/tool").chmod(0o750)
    (source / "link").symlink_to("sub/nowhere")
    tree = Tree()
    files.copy_into(tree, source, "/opt/tree")
    content = unpack(tree.archive())
    assert content["opt/tree/sub/tool"] == (stat.S_IFREG | 0o750, b"data")
    assert content["opt/tree/link"] == (stat.S_IFLNK | 0o777, b"sub/nowhere")


@pytest.mark.parametrize("program", ["/bin/ls", "/usr/bin/env"])
def test_a_program_is_copied_with_its_libraries_and_runs(program: str, tmp_path: Path) -> None:
    """Verified by the dynamic linker, on the copy."""
    tree = Tree()
    files.copy_into(tree, Path(program), "/tool")
    content = unpack(tree.archive())
    interpreter = elf.dynamic(Path(program).read_bytes()).interpreter
    if interpreter is None:
        pytest.skip(f"{program} is static here: a dynamically linked one makes it run")
    for name, (mode, data) in content.items():
        place = tmp_path / name
        if stat.S_ISDIR(mode):
            place.mkdir()
        elif stat.S_ISLNK(mode):
            place.symlink_to(data.decode())
        else:
            place.write_bytes(data)
            place.chmod(stat.S_IMODE(mode))
    linker = tmp_path / Tree.canonical(interpreter)
    libraries = ":".join(sorted({str(tmp_path / Path(name).parent) for name in content if ".so" in name}))
    done = subprocess.run(
        [linker, "--inhibit-cache", "--library-path", libraries, "--list", tmp_path / "tool"],
        check=True,
        capture_output=True,
        text=True,
    )
    loaded = [line.split("=>")[1].split()[0] for line in done.stdout.splitlines() if "=>" in line]
    assert loaded
    assert all(path.startswith(str(tmp_path)) for path in loaded if path != interpreter)


def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elf, "library_directories", lambda: (str(tmp_path),))
    with pytest.raises(KvmpassError, match=r"needs lib.*\.so.*not on this host"):
        files.copy_into(Tree(), Path("/bin/ls"), "/ls")


def test_a_library_found_by_origin_stays_beside_its_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``$ORIGIN`` is another directory in the guest than on the host."""
    library = tmp_path / "app/lib/libown.so.1"
    library.parent.mkdir(parents=True)
    library.write_bytes(Path("/bin/ls").read_bytes())
    own = elf.Dynamic(None, ("libown.so.1",), ("$ORIGIN/../lib",))
    monkeypatch.setattr(elf, "dynamic", lambda data: own if data == b"program" else elf.Dynamic(None, (), ()))
    found = elf.closure(tmp_path / "app/bin/tool", b"program", "/opt/bin/tool")
    assert found == {"/opt/lib/libown.so.1": library.read_bytes()}


def test_scripts_are_copied_with_their_interpreter(tmp_path: Path) -> None:
    script = tmp_path / "tool"

    def content(first: str) -> Files:
        script.write_text(first + "\n")
        script.chmod(0o755)
        tree = Tree()
        tree.symlink("/usr/bin/sh", "busybox")
        files.copy_into(tree, script, "/tool")
        return unpack(tree.archive())

    for first in ("#!/bin/sh -e", "#!/usr/bin/env sh", "#!/usr/bin/env", "#!"):
        assert [name for name in content(first) if name.startswith("usr/bin/")] == ["usr/bin/sh"]
        assert content(first)["usr/bin/sh"][1] == b"busybox"
    assert "usr/bin/bash" in content("#!/bin/bash")
    assert "usr/bin/bash" in content("#! /usr/bin/env bash")
    with pytest.raises(KvmpassError, match="/no/such"):
        content("#!/no/such -x")
    with pytest.raises(KvmpassError, match="no-such"):
        content("#!/usr/bin/env no-such")


@pytest.mark.parametrize(
    ("spec", "result"),
    [
        ("a:/b", ("a", "/b")),
        ("dir/a:/b/", ("dir/a", "/b/a")),
        ("dir/a/:/b/", ("dir/a", "/b/a")),
        ("a:/", ("a", "/a")),
        ("a/.:/", ("a", "/")),
        ("..:/b/", ("..", "/b/")),
        ("a:b:/c", ("a:b", "/c")),
    ],
)
def test_specs(spec: str, result: tuple[str, str]) -> None:
    source, target = files.split_spec(spec)
    assert (str(source), target) == result


@pytest.mark.parametrize("spec", ["", "a", ":/b", "a:", "a:b"])
def test_invalid_specs(spec: str) -> None:
    with pytest.raises(KvmpassError, match="SRC:DST"):
        files.split_spec(spec)


def test_sources_that_cannot_be_copied(tmp_path: Path) -> None:
    with pytest.raises(KvmpassError, match="does not exist"):
        files.copy_into(Tree(), tmp_path / "none", "/x")
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(KvmpassError, match="neither"):
        files.copy_into(Tree(), tmp_path / "fifo", "/x")
    broken = tmp_path / "broken"
    broken.write_bytes(Path("/bin/ls").read_bytes()[:100])
    files.copy_into(Tree(), broken, "/data")
    broken.chmod(0o755)
    with pytest.raises(KvmpassError, match="broken ELF"):
        files.copy_into(Tree(), broken, "/x")


def test_the_path_is_that_of_init() -> None:
    assert f"export PATH={init.PATH} HOME=" in init.SCRIPT.read_text()


def test_a_program_that_is_not_there_is_warned_of(busybox: Path) -> None:
    """Before the guest boots, as far as it can be known."""

    def warnings(*command: str, mounted: str = "") -> list[str]:
        root = GuestRoot(busybox)
        if mounted:
            root.serve([Served("tag", mounted)])
        root.run_command(command)
        return root.warnings

    for known in ("ls", "/bin/ls", "/usr/bin/ls", "./relative"):
        assert warnings(known) == []
    for missing in ("fio", "/bin/fio", "/data/tool"):
        (warning,) = warnings(missing)
        assert missing in warning
        assert "--root host" in warning
    assert warnings("/data/tool", mounted="/data") == []
    root = GuestRoot(busybox)
    root.serve([Served("root", "/")], Path("/"), Entry())
    root.run_command(["fio"])
    assert root.warnings == [], "init cannot know what is in the host's root"
    with pytest.raises(ValueError, match="needs its source"):
        GuestRoot(busybox).serve([Served("root", "/")])


def test_a_root_gets_the_directories_that_it_lacks(busybox: Path, tmp_path: Path) -> None:
    """Those that the guest has of its own are mounted there."""
    (tmp_path / "proc").mkdir()
    root = GuestRoot(busybox)
    root.serve([Served("root", "/")], tmp_path, Entry(), empty=["/root"])
    content = unpack(root.build())
    made = {name.removeprefix("kvmpass/upper/") for name in content if name.startswith("kvmpass/upper/")}
    assert made == {"dev", "run", "sys", "tmp", "root"}


# --- before an initramfs of the user's own


@pytest.mark.parametrize(
    ("parameters", "own", "given"),
    [
        ("", "/init", ""),
        ("quiet rdinit=/a rdinit=/b x -- rdinit=/c", "/b", "quiet x -- rdinit=/c"),
        ('quiet "rdinit=/a b" x', "/a b", "quiet x"),  # as the kernel reads them: next_arg in lib/cmdline.c
        ('rdinit="/a b" "--" rdinit=/c', "/a b", '"--" rdinit=/c'),
    ],
)
def test_the_agent_comes_before_another_initramfs(tmp_path: Path, parameters: str, own: str, given: str) -> None:
    """It has nothing that could be in the way of the other's files: how /bin is related to /usr/bin, for example."""
    tree = tmp_path / "6.1-test"
    tree.mkdir()
    for name in ("virtio_pci", "virtio_console"):
        (tree / f"{name}.ko").write_bytes(module(name=name))
    (tree / "modules.dep").write_text("virtio_pci.ko:\nvirtio_console.ko: virtio_pci.ko\n")
    archive, words = beside.before(b"other", ModuleTree("6.1-test", tmp_path), parameters_module.words(parameters))
    assert " ".join(words) == f"rdinit=/kvmpass/beside {given}".strip()
    found = unpack(archive.removesuffix(b"other"))
    assert [*found] == [
        *("dev", "kvmpass", "kvmpass/modules", "kvmpass/mount", "dev/console", "dev/null", "kvmpass/beside"),
        *("kvmpass/init", "kvmpass/modules/00", "kvmpass/modules/01"),
    ]
    assert found["kvmpass/init"] == (stat.S_IFLNK | 0o777, own.encode())
    assert found["kvmpass/beside"] == (stat.S_IFREG | 0o755, init.AGENT.read_bytes())
    assert b"name=virtio_pci\0" in found["kvmpass/modules/00"][1]
