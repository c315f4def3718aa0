"""Recordings of a host, and :class:`Sysfs` over a recording."""

from kvmpass.host.record.anonymity import Anonymity
from kvmpass.host.record.recorded import BadRecord, RecordedSysfs, open_recorded
from kvmpass.host.record.recording import Recorder, record

__all__ = [
    "Anonymity",
    "BadRecord",
    "RecordedSysfs",
    "Recorder",
    "open_recorded",
    "record",
]
