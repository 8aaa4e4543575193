"""Open the studio, a web page to paint regions and generate images: see `python app.py --help`."""

import sys

from localctl.cli.studio import main

if __name__ == "__main__":
    sys.exit(main())
