"""``kvmpass assign``: its steps (:mod:`.assign`) and its plan (:mod:`.plan`)."""
