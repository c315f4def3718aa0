"""The whole job of ``kvmpass assign``, done (:mod:`.assign`) and planned (:mod:`.plan`)."""
