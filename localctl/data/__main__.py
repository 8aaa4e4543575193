"""`python -m localctl.data check`: the former name of `localctl check-data`."""

import sys

from localctl.cli.check_data import main

if __name__ == "__main__":
    sys.exit(main())
