"""``python -m scpl_ds`` is ``scpl-ds``."""

import sys

from scpl_ds.cli import main

if __name__ == "__main__":
    sys.exit(main())
