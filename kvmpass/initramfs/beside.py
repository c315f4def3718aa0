"""The agent for an initramfs of the user's own: an archive that comes before it.

The kernel unpacks all archives of an initramfs, in their order
(Documentation/driver-api/early-userspace/buffer-format.rst), and starts the agent (``PROGRAM``), which becomes the
user's init, and leaves a child that runs what the host starts (cffi_build/agent/beside.c).
"""

from __future__ import annotations

from collections.abc import Sequence

from kvmpass.initramfs import init
from kvmpass.initramfs.cpio import Tree
from kvmpass.initramfs.modules import ModuleTree, plan

PROGRAM = f"{init.DIRECTORY}/beside"
"""What the kernel starts."""
_NAMES_INIT = "rdinit="
_DEFAULT = "/init"  # init/main.c: ramdisk_execute_command


def before(initrd: bytes, modules: ModuleTree, parameters: Sequence[str]) -> tuple[bytes, list[str]]:
    """Return ``initrd`` with the agent's archive before it, for a kernel with ``modules``, and its ``parameters``.

    One of the given parameters may name the user's init. The agent is named before the others: what comes before
    ``rdinit=`` does not become an argument of init (``rdinit_setup``, init/main.c). Raises ``KvmpassError``, and the
    ``OSError`` of reading a module.
    """
    end = next((at for at, word in enumerate(parameters) if _plain(word) == "--"), len(parameters))
    own = parameters[:end]  # the others are the init's
    named = [word for word in own if _plain(word).startswith(_NAMES_INIT)]
    tree = Tree(merged=False)  # how the user's has them is unknown
    # The kernel opens the former for PID 1, the agent the latter for processes without input.
    tree.character_device("/dev/console", 5, 1)
    tree.character_device("/dev/null", 1, 3, 0o666)
    tree.directory(f"{init.DIRECTORY}/mount")
    tree.file(PROGRAM, init.agent(), 0o755)
    tree.symlink(f"{init.DIRECTORY}/init", _value(named[-1]) if named else _DEFAULT)
    for number, module in enumerate(plan(modules, (), (), init.PORT_DRIVERS).modules):
        tree.file(f"{init.DIRECTORY}/modules/{number:02}", module.data)
    words = [word for word in own if word not in named]
    return tree.archive() + initrd, [_NAMES_INIT + PROGRAM, *words, *parameters[end:]]


def _plain(word: str) -> str:
    """Return a parameter without the quotes around it, as the kernel compares it (``next_arg``, lib/cmdline.c)."""
    return word.removeprefix('"').removesuffix('"') if word.startswith('"') else word


def _value(word: str) -> str:
    """Return the value of a parameter, without the quotes around either."""
    return _plain(_plain(word).partition("=")[2])
