"""The members of a job: its store and the roster of its workers."""

from lightning_async_localsgd.membership.roster import Roster
from lightning_async_localsgd.membership.static import StaticJob, join_job
from lightning_async_localsgd.membership.store import JobStore
from lightning_async_localsgd.membership.values import as_json, from_json

__all__ = ["JobStore", "Roster", "StaticJob", "as_json", "from_json", "join_job"]
