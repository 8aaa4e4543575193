"""Generate images that follow a condition inside a mask, or a layout of regions: see `python sample.py --help`."""

import sys

from localctl.cli.sample import main

if __name__ == "__main__":
    sys.exit(main())
