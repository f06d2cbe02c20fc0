"""The exchange: a background thread that trades pseudo-gradients and applies them in the same order everywhere."""

from lightning_async_localsgd.exchange.mailbox import Adoption, Mailbox, Push
from lightning_async_localsgd.exchange.thread import Exchange, ExchangeThread
from lightning_async_localsgd.exchange.transport import GlooTransport, Transport

__all__ = ["Adoption", "Exchange", "ExchangeThread", "GlooTransport", "Mailbox", "Push", "Transport"]
