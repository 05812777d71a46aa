"""``python -m emerging_optimizers.lab`` is the command ``soap``."""

import sys

from emerging_optimizers.lab.cli import main

if __name__ == "__main__":
    sys.exit(main())
