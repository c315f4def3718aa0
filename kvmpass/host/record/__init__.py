"""A recording of what this host shows of itself, and the host that is read from one."""

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
