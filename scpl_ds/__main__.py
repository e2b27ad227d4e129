"""``python -m scpl_ds`` is ``scpl-ds``."""

import logging
import os
import sys
from typing import NoReturn

from scpl_ds.cli import main


def run() -> NoReturn:
    """:func:`main` as a program. A rank that failed ends without tidying up: one of its threads may
    wait for a message outside Python, which aborts an interpreter that ends in the usual way."""
    try:
        code = main()
    except Exception:
        sys.excepthook(*sys.exc_info())
        code = 1
    if code:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    run()
