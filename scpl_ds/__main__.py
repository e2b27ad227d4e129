"""``python -m scpl_ds`` is ``scpl-ds``."""

import logging
import os
import sys
import threading
from typing import NoReturn

from scpl_ds.cli import main

_OUTSIDE = "scpl-watch"  # of distributed/watch.py, whose import would cost the CLI torch


def run() -> NoReturn:
    """:func:`main` as a program. A rank that failed, or that still has a thread outside Python
    (which waits there for another rank), ends without tidying up: an interpreter that ends in the
    usual way would be aborted."""
    try:
        code = main()
    except Exception as error:
        sys.excepthook(type(error), error, error.__traceback__)
        code = 1
    if code or any(thread.name == _OUTSIDE for thread in threading.enumerate()):
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    run()
