"""`python -m localctl.layout_predictor`: the former name of `localctl predict-layout`."""

import sys

from localctl.cli.predict_layout import main

if __name__ == "__main__":
    sys.exit(main())
