"""Train a local adapter: see `python train_adapter.py --help`."""

import sys

from localctl.cli.train import main

if __name__ == "__main__":
    sys.exit(main())
