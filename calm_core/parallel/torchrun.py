"""`python -m calm_core.parallel.torchrun` is `python -m calm_core.distributed.torchrun`."""

import sys

from calm_core.distributed.torchrun import main

if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
