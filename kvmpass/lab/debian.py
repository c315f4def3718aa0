"""Packages of the machine's own Debian archive, downloaded and unpacked without being installed."""

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
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")

# When root calls it apt-get drops to a user of its own, who cannot write to root's cache.
_OWN_USER = ("-o", "APT::Sandbox::User=" + ("root" if os.geteuid() == 0 else ""))


def candidate(package: str) -> str:
    """The version that apt would install. Raises ``LabError`` if it knows none."""
    text = run_tool(["apt-cache", "policy", package], f"apt cannot tell about {package}")
    found = re.search(r"Candidate: (\S+)", text)
    if found is None or found[1] == "(none)":
        raise LabError(f"this machine's apt does not know {package}", UNKNOWN)
    return found[1]


def dependency(package: str, pattern: str) -> str:
    """The package matching ``pattern`` that a meta package stands for."""
    candidate(package)
    text = run_tool(["apt-cache", "show", "--no-all-versions", package], f"apt cannot tell about {package}")
    for line in text.splitlines():
        found = re.search(pattern, line) if line.startswith("Depends:") else None
        if found:
            return found[0]
    raise LabError(f"{package} has no dependency like {pattern}", UNKNOWN)


def download_and_unpack(package: str, target: Path, say: Say) -> None:
    """Fetch ``package`` (its candidate version) and unpack its files below ``target``."""
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
    """Unpack packages below ``target``; nothing of theirs is run."""
    for archive in archives:
        run_tool(["dpkg-deb", "-x", archive, target], f"{archive.name} could not be unpacked")


@contextmanager
def download_folder() -> Iterator[Path]:
    cache_root().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=cache_root()) as name:
        yield Path(name)


def main_archive() -> str:
    """The address of the archive that this machine gets Debian from. Raises ``LabError`` on another distribution."""
    text = run_tool(
        ["apt-get", "indextargets", "--format", "$(SITE) $(ORIGIN) $(COMPONENT)", "Created-By: Packages"],
        "apt cannot list its sources",
        UNKNOWN,
    )
    for line in text.splitlines():
        words = line.split()
        if "Debian" in words and "main" in words and not words[0].endswith("-security"):
            return words[0]
    raise LabError("apt has no Debian archive among its sources", UNKNOWN)


def unpack_with_dependencies(packages: Sequence[str], suites: Sequence[str], target: Path, say: Say) -> None:
    """Unpack packages of the last of ``suites`` with all they depend on, libraries included, below ``target``.

    apt works on a state of its own, in which nothing is installed; the machine's own state is not touched.
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
            "APT::Install-Recommends": "false",
            "Acquire::Languages": "none",
            "Debug::NoLocking": "true",
        }
        options = [*_OWN_USER, *(word for key, value in settings.items() for word in ("-o", f"{key}={value}"))]
        say(f"reading the package lists of {release}")
        failed = f"the archive of {release} could not be read"
        run_tool(["apt-get", "-q", *options, "update", "--error-on=any"], failed, "check the network")
        say(f"downloading {', '.join(packages)} and what they need")
        run_tool(
            ["apt-get", "-q", "-y", *options, "-t", release, "--download-only", "install", *packages],
            f"{', '.join(packages)} of {release} could not be downloaded",
            "check the network",
        )
        archives = sorted((folder / "cache" / "archives").glob("*.deb"))
        say(f"unpacking {len(archives)} packages")
        unpack(iter(archives), target)
