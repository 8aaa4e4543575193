"""Compare sets of generated images: see `python evaluate_quantitative_metrics.py --help`."""

import sys

from localctl.cli.evaluate_metrics import main

if __name__ == "__main__":
    sys.exit(main())
