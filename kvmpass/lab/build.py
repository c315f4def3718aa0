"""The full and the next kernel: Debian's kernel sources, and the configurations that ship with this package."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from importlib.resources import as_file, files
from pathlib import Path

from kvmpass.errors import LabError
from kvmpass.lab import cache, debian
from kvmpass.lab.cache import Say, cache_root, find_tool, locked, need_tool, new_directory, run_tool
from kvmpass.lab.kernels import Kernel, Recipe, cached, kernel_release
from kvmpass.lab.modules import BUILTIN_LISTS, index_builtin

TOOLS = ("gcc", "make", "flex", "bison", "bc", "xz")
HEADERS = {"libelf.h": "libelf-dev", "openssl/ssl.h": "libssl-dev"}
LOG_LINES = 15

Count = Callable[[int], None]
"""Called with the number of object files made so far."""


def missing_packages() -> list[str]:
    """Return the Debian packages that the build needs and this machine does not have."""
    lacking = cache.missing_packages(TOOLS)
    if find_tool("gcc") is not None:
        lacking += [package for header, package in HEADERS.items() if not compiles(header)]
    return lacking


def compiles(header: str) -> bool:
    """Return whether the compiler finds a header."""
    done = subprocess.run(
        ["gcc", "-E", "-x", "c", "-"],
        input=f"#include <{header}>\n".encode(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    return done.returncode == 0


def build(
    recipe: Recipe, say: Say, count: Count = lambda done: None, *, jobs: int = 0, again: bool = False
) -> Kernel:
    """Return the kernel of a recipe, built into the cache if it is missing, or if ``again``.

    ``jobs``: parallel compiler processes, 0: one for each CPU. ``count`` is called with the number of object files
    made so far. Raises ``LabError`` with the missing packages, or with the compiler's error.
    """
    with locked(f"{recipe.name}-kernel", say):
        kernel = cached(recipe.root, recipe.name)
        if kernel is not None and not again:
            return kernel
        lacking = missing_packages()
        if lacking:
            raise LabError("tools to build a kernel are missing", f"apt-get install {' '.join(lacking)}")
        with tempfile.TemporaryDirectory(prefix=".build-", dir=cache_root()) as name:
            tree = unpack_source(recipe, Path(name), say)
            configure(recipe, tree)
            _make(tree, jobs or os.cpu_count() or 1, say, count)
            _keep(tree, recipe.root)
    kernel = cached(recipe.root, recipe.name)
    assert kernel is not None
    return kernel


def unpack_source(recipe: Recipe, folder: Path, say: Say) -> Path:
    """Download the source of a recipe's kernel, and return its tree below ``folder``. Raises ``LabError``."""
    package = folder / "package"
    if recipe.suites:
        debian.unpack_alone(recipe.source, recipe.suites, package, say)
    else:
        debian.download_and_unpack(recipe.source, package, say)
    archives = list((package / "usr" / "src").glob("linux-source-*.tar.*"))
    if len(archives) != 1:
        raise LabError(f"{recipe.source} does not contain a kernel source")
    say("unpacking the kernel source")
    run_tool(["tar", "-xf", archives[0], "-C", folder], "the kernel source is damaged")
    shutil.rmtree(package)
    return next(folder.glob("linux-source-*"))


def configure(recipe: Recipe, tree: Path) -> None:
    """Write the configuration of a recipe's kernel. Raises ``LabError`` if the source does not know all of it."""
    failed = "the kernel could not be configured"
    run_tool(["make", "tinyconfig"], failed, cwd=tree)
    with as_file(files("kvmpass.lab").joinpath(recipe.config)) as fragment:
        run_tool([tree / "scripts/kconfig/merge_config.sh", "-m", ".config", fragment], failed, cwd=tree)
        run_tool(["make", "olddefconfig"], failed, cwd=tree)
        lost = sorted(_options(fragment) - _options(tree / ".config"))
    if lost:
        raise LabError(f"the kernel source ignores {', '.join(lost[:5])}")


def _options(config: Path) -> set[str]:
    """Options that a configuration enables."""
    return set(re.findall(r"^CONFIG_\w+=[^n\n].*$", config.read_text(), re.MULTILINE))


def _make(tree: Path, jobs: int, say: Say, count: Count) -> None:
    say(f"building the kernel, {jobs} parallel jobs")
    last: list[str] = []
    with subprocess.Popen(
        [need_tool("make"), f"-j{jobs}", "bzImage"],
        cwd=tree,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**os.environ, "KBUILD_BUILD_USER": "kvmpass", "KBUILD_BUILD_HOST": "lab"},
    ) as process:
        assert process.stdout is not None
        made = 0
        try:
            for line in process.stdout:
                last = [*last[-LOG_LINES:], line.rstrip()]
                if re.match(r"\s+(CC|AS|AR|LD) ", line):
                    made += 1
                    count(made)
        except BaseException:
            process.terminate()
            raise
    if process.returncode:
        errors = [line for line in last if "rror" in line] or last[-1:]
        raise LabError(f"the kernel could not be built: {errors[0] if errors else 'unknown reason'}")


def _keep(tree: Path, root: Path) -> None:
    image = tree / "arch" / "x86" / "boot" / "bzImage"
    release = kernel_release(image)
    lists = [tree / name for name in BUILTIN_LISTS if (tree / name).is_file()]
    with new_directory(root) as draft:
        boot = draft / "boot"
        boot.mkdir()
        shutil.copy(image, boot / f"vmlinuz-{release}")
        shutil.copy(tree / ".config", boot / f"config-{release}")
        for path in lists:
            shutil.copy(path, boot / path.name)
        index_builtin(boot, draft, release)
