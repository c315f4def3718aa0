"""Property tests give the same examples in every run, however slow the machine is at that moment."""

from hypothesis import HealthCheck, settings

settings.register_profile("kvmpass", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("kvmpass")
