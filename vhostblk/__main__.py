"""`python -m vhostblk` is the `vhostblk` command."""

import sys

from vhostblk.cli.main import main

sys.exit(main())
