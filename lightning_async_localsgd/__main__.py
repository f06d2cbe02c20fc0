"""``python -m lightning_async_localsgd``: the command ``async-localsgd`` where no script was installed."""

import sys

from lightning_async_localsgd.cli import main

if __name__ == "__main__":
    sys.exit(main())
