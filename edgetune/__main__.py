"""`python -m edgetune`."""

import sys

from edgetune.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
