"""``python -m lightning_async_localsgd``: the command ``async-localsgd`` without an installed script."""

import sys

from lightning_async_localsgd.cli import main

if __name__ == "__main__":
    sys.exit(main())
