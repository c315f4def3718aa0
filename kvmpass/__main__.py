"""``python -m kvmpass``."""

from kvmpass.cli.main import main

main()
