"""Packages of Debian's archive, downloaded and unpacked without being installed."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from kvmpass.errors import LabError
from kvmpass.lab.cache import Say, cache_root, run_tool

UNKNOWN = "apt-get update, with Debian 12's main and security archives among apt's sources"
BACKPORTS = ("trixie", "trixie-backports")
"""The suites of Debian 13 and of its backports."""
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")

# As root, apt-get switches to a user of its own, who cannot write to root's cache.
_OWN_USER = ("-o", "APT::Sandbox::User=" + ("root" if os.geteuid() == 0 else ""))


def candidate(package: str) -> str:
    """Return the version that apt would install. Raises ``LabError`` if there is none."""
    text = run_tool(["apt-cache", "policy", package], f"apt-cache failed for {package}")
    found = re.search(r"Candidate: (\S+)", text)
    if found is None or found[1] == "(none)":
        raise LabError(f"{package} is unknown to this machine's apt", UNKNOWN)
    return found[1]


def dependency(package: str, pattern: str) -> str:
    """Return the first dependency of a (meta) package that matches ``pattern``. Raises ``LabError``."""
    candidate(package)
    text = run_tool(["apt-cache", "show", "--no-all-versions", package], f"apt-cache failed for {package}")
    for line in text.splitlines():
        found = re.search(pattern, line) if line.startswith("Depends:") else None
        if found:
            return found[0]
    raise LabError(f"{package} has no dependency that matches {pattern}", UNKNOWN)


def download_and_unpack(package: str, target: Path, say: Say) -> None:
    """Download the candidate version of ``package``, and unpack its files below ``target``. Raises ``LabError``."""
    version = candidate(package)
    say(f"downloading {package} {version}")
    with download_folder() as folder:
        run_tool(
            ["apt-get", "-q", *_OWN_USER, "download", package],
            f"{package} could not be downloaded",
            "check the network, then apt-get update",
            cwd=folder,
        )
        unpack(folder.glob("*.deb"), target)


def unpack(archives: Iterator[Path], target: Path) -> None:
    """Unpack packages below ``target``, without running their scripts. Raises ``LabError``."""
    for archive in archives:
        run_tool(["dpkg-deb", "-x", archive, target], f"{archive.name} could not be unpacked")


@contextmanager
def download_folder() -> Iterator[Path]:
    """Yield a temporary directory in the cache."""
    cache_root().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=cache_root()) as name:
        yield Path(name)


def main_archive() -> str:
    """Return the URL of this machine's Debian archive. Raises ``LabError`` on another distribution."""
    text = run_tool(
        ["apt-get", "indextargets", "--format", "$(SITE) $(ORIGIN) $(COMPONENT)", "Created-By: Packages"],
        "apt-get failed to list its sources",
        UNKNOWN,
    )
    for line in text.splitlines():
        words = line.split()
        if "Debian" in words and "main" in words and not words[0].endswith("-security"):
            return words[0]
    raise LabError("apt has no Debian archive among its sources", UNKNOWN)


def unpack_with_dependencies(packages: Sequence[str], suites: Sequence[str], target: Path, say: Say) -> None:
    """Unpack packages of the last of ``suites``, and all of their dependencies, below ``target``.

    Raises ``LabError``.
    """
    release = suites[-1]
    with _archive(suites, say) as (folder, options):
        say(f"downloading {', '.join(packages)} and their dependencies")
        run_tool(
            ["apt-get", "-q", "-y", *options, "--download-only", "install", *packages],
            f"{', '.join(packages)} of {release} could not be downloaded",
            "check the network",
        )
        archives = sorted((folder / "cache" / "archives").glob("*.deb"))
        say(f"unpacking {len(archives)} packages")
        unpack(iter(archives), target)


def unpack_alone(package: str, suites: Sequence[str], target: Path, say: Say) -> None:
    """Unpack a package of the last of ``suites``, without its dependencies, below ``target``. Raises ``LabError``."""
    release = suites[-1]
    with _archive(suites, say) as (folder, options):
        say(f"downloading {package}")
        failed = f"{package} of {release} could not be downloaded"
        run_tool(["apt-get", "-q", *options, "download", package], failed, "check the network", cwd=folder)
        unpack(folder.glob("*.deb"), target)


@contextmanager
def _archive(suites: Sequence[str], say: Say) -> Iterator[tuple[Path, list[str]]]:
    """Yield a folder, and options with which apt-get takes packages from the last of ``suites``.

    apt uses a state in which nothing is installed; the machine's own state is not changed. Raises ``LabError``.
    """
    site, release = main_archive(), suites[-1]
    if not KEYRING.is_file():
        raise LabError(f"{KEYRING} is missing", "apt-get install debian-archive-keyring")
    with download_folder() as folder:
        (folder / "sources.list").write_text(
            "".join(f"deb [signed-by={KEYRING}] {site} {suite} main\n" for suite in suites)
        )
        (folder / "status").touch()
        for name in ("lists/partial", "cache/archives/partial", "parts"):
            (folder / name).mkdir(parents=True)
        settings = {
            "Dir::Etc::SourceList": folder / "sources.list",
            "Dir::Etc::SourceParts": folder / "parts",
            "Dir::Etc::Preferences": "/dev/null",
            "Dir::Etc::PreferencesParts": folder / "parts",
            "Dir::State": folder,
            "Dir::State::Lists": folder / "lists",
            "Dir::State::status": folder / "status",
            "Dir::Cache": folder / "cache",
            "APT::Architecture": "amd64",
            "APT::Architectures": "amd64",
            "APT::Default-Release": release,
            "APT::Install-Recommends": "false",
            "Acquire::Languages": "none",
            "Debug::NoLocking": "true",
        }
        options = [*_OWN_USER, *(word for key, value in settings.items() for word in ("-o", f"{key}={value}"))]
        say(f"reading the package lists of {release}")
        failed = f"the archive of {release} could not be read"
        run_tool(["apt-get", "-q", *options, "update", "--error-on=any"], failed, "check the network")
        yield folder, options
