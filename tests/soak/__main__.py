"""`make soak`: an hour of everything at once; ends with a table, or with what has gone wrong."""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from tests.soak.soak import Soak

_ROUND = 30.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(prog="make soak", description=__doc__)
    parser.add_argument("--seconds", type=float, default=3600.0, help="default: 3600")
    parser.add_argument("--round", type=float, default=_ROUND, help="seconds; default: 30")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 1_000_000_000)
    parser.add_argument("--folder", default="/var/tmp", help="images are made in one below it")
    args = parser.parse_args(arguments)
    print(f"seed {args.seed}", flush=True)
    # Ends of the soak itself take its daemons with them.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))
    with tempfile.TemporaryDirectory(prefix="vb-", dir=args.folder) as folder:
        soak = Soak(Path(folder), args.seed)
        try:
            end = time.monotonic() + args.seconds
            while time.monotonic() < end:
                print(soak.round(min(args.round, max(end - time.monotonic(), 1.0))), flush=True)
            soak.finish()
        except Exception:
            traceback.print_exc()
            return 1
        finally:
            soak.give_up()
        print(soak.figures())
    return 0


if __name__ == "__main__":
    sys.exit(main())
