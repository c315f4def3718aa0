"""``--copy-out SRC[:DST]``: where on the host a file or directory of the guest goes."""

from __future__ import annotations

import os
from pathlib import Path

from kvmpass._dataclass import dataclass
from kvmpass.errors import KvmpassError
from kvmpass.files.user import sudo_caller


@dataclass(frozen=True, slots=True)
class Destination:
    """A place on the host for a file or directory of the guest."""

    source: str
    """Its path in the guest, absolute."""
    directory: Path
    """The directory in which it is created. It exists, or its parent does."""
    name: str
    """Its name there; empty: the directory gets the content of the source, a directory."""

    @property
    def path(self) -> Path:
        """Its path on the host."""
        return self.directory / self.name

    @classmethod
    def parse(cls, spec: str) -> Destination:
        """Return the destination of ``SRC[:DST]``, split at the last colon.

        ``SRC`` is absolute. ``DST`` is the new file or directory, by default ``SRC``'s own name. If it ends with a
        slash, the source is copied into that directory under its own name; if the source ends with ``.``, its
        content is copied to ``DST``. A symlink at ``DST`` is followed. Raises ``KvmpassError``, also if nothing can
        be created there.
        """
        source, colon, target = spec.rpartition(":")
        if not colon:
            source, target = spec, ""
        if not source.startswith("/") or "\0" in spec:
            raise KvmpassError(f"--copy-out {spec!r} is not SRC[:DST] with an absolute SRC")
        if colon and not target:
            raise KvmpassError(f"--copy-out {spec!r} has no DST after the colon")
        return cls.at(source, target, f"--copy-out {spec!r}")

    @classmethod
    def at(cls, source: str, target: str, what: str) -> Destination:
        """Return the destination of an absolute ``source`` at ``target``, as ``parse`` does; ``what`` begins errors.

        An empty ``target`` is the source's own name in the current directory.
        """
        own = source.rstrip("/").rpartition("/")[2]
        place = Path(os.path.realpath(target or "."))
        if own in ("", ".", ".."):
            directory, name = place, ""
        elif target.rpartition("/")[2] in ("", ".", ".."):
            directory, name = place, own
        else:
            directory, name = place.parent, place.name
        existing = directory if directory.exists() else directory.parent
        if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
            raise KvmpassError(f"{what}: {existing} is not a directory to write to")
        return cls(source, directory, name)

    def open(self) -> int:
        """Return a descriptor of the directory, which is created if it does not exist. Raises ``OSError``."""
        try:
            self.directory.mkdir()
        except FileExistsError:
            pass
        else:
            if owner := sudo_caller():
                os.chown(self.directory, owner.uid, owner.gid, follow_symlinks=False)
        return os.open(self.directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
