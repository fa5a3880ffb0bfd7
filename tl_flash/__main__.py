"""`python -m tl_flash`: the command line."""

import sys

from tl_flash.cli import main

if __name__ == "__main__":
    sys.exit(main())
