"""The subcommands of ``async-localsgd``, a module each.

What one of them needs beyond the package itself is imported when it runs: ``--help`` and what is mistyped shall not
wait for it.
"""

from lightning_async_localsgd.commands.usage import UsageError

__all__ = ["UsageError"]
