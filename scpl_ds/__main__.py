"""``python -m scpl_ds`` is ``scpl-ds``."""

from scpl_ds.cli import run

if __name__ == "__main__":
    run()
