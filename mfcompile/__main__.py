"""``python -m mfcompile`` is the ``mfcompile`` command."""

import sys

from mfcompile.cli import main

if __name__ == "__main__":
    sys.exit(main())
