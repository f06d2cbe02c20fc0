"""The subcommands of ``async-localsgd``, a module each.

What they need is imported when they run, for ``--help`` and what is mistyped shall not wait for it.
"""

from lightning_async_localsgd.commands.usage import UsageError

__all__ = ["UsageError"]
