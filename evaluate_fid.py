"""Distances of generated images to photos: see `python evaluate_fid.py --help`."""

import sys

from localctl.cli.evaluate_fid import main

if __name__ == "__main__":
    sys.exit(main())
