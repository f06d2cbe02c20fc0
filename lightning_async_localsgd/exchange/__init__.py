"""The exchange: a background thread that trades pseudo-gradients and applies them in the same order everywhere."""

from lightning_async_localsgd.exchange.ledger import Beat, Ledger, OuterUpdate, Progress
from lightning_async_localsgd.exchange.mailbox import Adoption, Mailbox, Push
from lightning_async_localsgd.exchange.thread import ExchangeThread
from lightning_async_localsgd.exchange.transport import GlooTransport, Transport

__all__ = [
    "Adoption",
    "Beat",
    "ExchangeThread",
    "GlooTransport",
    "Ledger",
    "Mailbox",
    "OuterUpdate",
    "Progress",
    "Push",
    "Transport",
]
