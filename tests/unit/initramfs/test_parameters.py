"""Module parameters, from the command line to insmod."""

from __future__ import annotations

import subprocess

import pytest

from kvmpass.initramfs import find_busybox, init
from kvmpass.initramfs.parameters import module_parameters, words


@pytest.mark.parametrize(
    ("text", "module", "options"),
    [
        ("quiet e1000e.IntMode=1 e1000.Debug=2", "e1000e", "IntMode=1"),
        ("usb-storage.delay_use=0 usb_storage.quirks=a:b:c", "usb_storage", "delay_use=0 quirks=a:b:c"),
        ("vfio", "vfio", ""),
        ('x.name="a  b" x.n=1', "x", 'name="a  b" n=1'),
        ('"x.name=a b" x.n=1', "x", 'name="a b" n=1'),
        ('x.name=a" b"c', "x", 'name=a" b"c'),
        ("x.switch x.n=*", "x", "switch n=*"),
        ("x.name=it's x.other=$HOME`id`", "x", "name=it's other=$HOME`id`"),
        ("root=x.name=1 a.x.name=1 x.a.b=1 .=1 x.=1 y", "x", ""),
        ('x.name="open end', "x", 'name="open end'),
        ("x.path=/lib/a.b=c", "x", "path=/lib/a.b=c"),
    ],
)
def test_modules_get_their_parameters(text: str, module: str, options: str) -> None:
    """One argument, as modprobe passes it to the kernel."""
    found = module_parameters(words(text))
    assert found.get(module, "") == options
    script = init.SCRIPT.read_text()
    load = script[script.index("load() {") : script.index(". /kvmpass/load")]
    call = init.calls([("load", module, "", options)]).decode()
    shell = [find_busybox(), "sh", "-c", f"insmod() {{ printf '%s\\0' \"$@\" >&3; }}; exec 3>&1\n{load}{call}"]
    done = subprocess.run(shell, capture_output=True, text=True, check=True)
    assert done.stdout.split("\0")[:-1] == [f"/kvmpass/modules/{module}.ko", *([options] if options else [])]


def test_words_are_unchanged() -> None:
    assert words('  a  b="c  d"\te"f g"h ') == ["a", 'b="c  d"', 'e"f g"h']
    assert words("") == []
