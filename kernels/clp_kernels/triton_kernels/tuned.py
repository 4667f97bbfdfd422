"""What was measured on devices, for `tuning`: written by `python -m bench tune --write`, not by hand. Empty: nothing was.

DEVICES[name]   capability  "sm_90", "gfx942", ...: devices of one kind share tiles
                source      when, with which versions and at which commit it was measured
                choices     (kernel, family, bytes of an element) -> {sizes: choice}, as the kernel's Tunable names them
"""

# fmt: off
DEVICES: dict = {}
