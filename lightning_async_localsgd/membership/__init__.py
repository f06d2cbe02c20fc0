"""Who takes part: the job's store and the roster of its workers."""

from lightning_async_localsgd.membership.roster import Roster
from lightning_async_localsgd.membership.static import StaticJob, join_job

__all__ = ["Roster", "StaticJob", "join_job"]
