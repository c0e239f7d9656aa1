"""`python -m vhostblk` is the `vhostblk` command."""

import sys

from vhostblk.cli.quick_start import main

sys.exit(main())
