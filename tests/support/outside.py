"""What tests need and only the machine outside can make: the emulated host has no network, and little CPU."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sys
from pathlib import Path

from kvmpass.errors import LabError
from kvmpass.lab import debian, headers
from kvmpass.lab.cache import cache_root, new_directory, run_tool
from support.repository import ROOT

OLDER_KERNEL = "KVMPASS_OLDER_KERNEL"
FAULTY_MODULE = "KVMPASS_FAULTY_MODULE"

_DOCS = ROOT / "docs"
_SOURCES = tuple(sorted((_DOCS / "examples" / "driver").iterdir()))
_COMMANDS = re.compile(r"^<!-- (?:build|change): driver -->\n```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)


def older_kernel() -> str | None:
    """Name Debian 12's own kernel, for a guest, by ``OLDER_KERNEL``. Returns why there is none."""
    if OLDER_KERNEL in os.environ:
        return None
    root = cache_root() / "kernels" / "older"
    try:
        if not root.is_dir():
            package = debian.dependency("linux-image-amd64", r"linux-image-6\.1\.\S*-amd64")
            with new_directory(root) as draft:
                debian.download_and_unpack(package, draft, print)
                for image in (draft / "boot").glob("vmlinuz-*"):
                    image.rename(draft / image.name)
                for part in ("boot", "lib", "usr"):
                    shutil.rmtree(draft / part, ignore_errors=True)
        os.environ[OLDER_KERNEL] = str(next(root.glob("vmlinuz-*")))
    except (LabError, OSError, StopIteration) as error:
        return f"no kernel 6.1 for a guest ({OLDER_KERNEL}=FILE names one): {error or root}"
    return None


def fio() -> str | None:
    """Return why ``fio`` and ``nvme`` cannot be run, in a guest with this host's root as well."""
    missing = [name for name in ("fio", "nvme") if shutil.which(name) is None]
    return f"no {' and no '.join(missing)} here: apt-get install fio nvme-cli makes it run" if missing else None


def faulty_module() -> str | None:
    """Name a module of the cookbook, built by its commands, by ``FAULTY_MODULE``. Returns why there is none.

    The other modules are beside it, and below ``changed`` as the cookbook's change has made them. One build for each
    content of the sources and each kernel is kept in the cache.
    """
    if FAULTY_MODULE in os.environ:
        return None
    try:
        tree = headers.fetch(print)
        commands = _COMMANDS.findall((_DOCS / "cookbook.md").read_text())
        assert len(commands) == 2, "the cookbook's commands"
        content = b"\0".join([os.fsencode(tree), *map(str.encode, commands), *(f.read_bytes() for f in _SOURCES)])
        root = cache_root() / "tests" / f"faulty-{hashlib.sha256(content).hexdigest()[:16]}"
        if not root.is_dir():
            with new_directory(root) as draft:
                for directory, command in zip((draft, draft / "changed"), commands, strict=True):
                    directory.mkdir(exist_ok=True)
                    for source in _SOURCES:
                        shutil.copy(source, directory)
                    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # where kvmpass is
                    run_tool(
                        ["sh", "-ec", command],
                        "it could not be built, which needs gcc, make and libelf1",
                        cwd=directory,
                        env={**os.environ, "PATH": path},
                    )
        os.environ[FAULTY_MODULE] = str(root / "faulty.ko")
    except (LabError, OSError) as error:
        return f"no faulty.ko for the lab's stock kernel ({FAULTY_MODULE}=FILE names one): {error}"
    return None
