"""The saved state of a worker: what checkpoints hold of it, and how it goes on from that."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_async_localsgd.codecs import ErrorFeedback
from lightning_async_localsgd.exchange import Exchange, Mailbox
from lightning_async_localsgd.outer import GlobalModel
from lightning_async_localsgd.protocol.budget import Budget
from lightning_async_localsgd.protocol.progress import Progress, ReferenceTurn
from lightning_async_localsgd.protocol.round_length import AUTO
from lightning_async_localsgd.protocol.rounds import Rounds
from lightning_async_localsgd.settings import Settings
from lightning_async_localsgd.worker.replica import Replica
from lightning_async_localsgd.worker.round_trip import RoundTrip

__all__ = ["SavedState"]

_SAVED_PROGRESS = (
    "steps",
    "round_steps",
    "local_steps",
    "fragment",
    "shard_samples",
    "updates",
    "total_staleness",
    "max_staleness",
    "dropped",
)


class SavedState:
    """Saves a worker's state during a cut, and has a worker that has not started go on from a saved one.

    Args:
        rank: the worker.
        size: number of workers.
        settings: settings of the run.
        rounds: its rounds.
        replica: its replica.
        state: the global state.
        feedbacks: errors of the codec that are not made up for yet, of each fragment.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        settings: Settings,
        rounds: Rounds,
        replica: Replica,
        state: GlobalModel,
        feedbacks: Sequence[ErrorFeedback],
    ) -> None:
        self.progress = Progress.at_start(size, settings.round_length(None).first())
        """Shared progress that the run starts from."""
        self.version = 0
        """Version of the global parameters that the run starts from."""
        self._rank = rank
        self._size = size
        self._settings = settings
        self._rounds = rounds
        self._replica = replica
        self._state = state
        self._feedbacks = feedbacks
        self._has_progress = False  # of a run of as many workers
        self._has_others_copies = False  # inner optimizers were loaded from another worker's
        self._round: Mapping[str, Any] | None = None  # to go on with
        self._mailbox: Mailbox
        self._exchange: Exchange
        self._trip: RoundTrip

    # ---- going on ---------------------------------------------------------------------------------------------------

    def load_global_state_dict(
        self, state_dict: Mapping[str, Any], same_workers: bool, settings: Mapping[str, Any] | None = None
    ) -> None:
        """Go on from a saved global state, with the settings of now. To be called before the worker starts.

        Args:
            state_dict: what :meth:`global_state_dict` gave.
            same_workers: whether the workers are as many as they were; else their counts begin anew.
            settings: the settings of then, as ``Settings.fingerprint`` gave them; None: they are not known.

        Raises:
            ValueError: if it belongs to another model, or to an outer optimizer that cannot be this one.
        """
        differences = self._state.load_state_dict(state_dict["global"]) + self._settings.differences(settings or {})
        if differences and self._rank == 0:
            warnings.warn(
                "Training goes on with the settings of now, which differ from those of the checkpoint: "
                f"{'; '.join(differences)}.",
                stacklevel=2,
            )
        self._replica.load(self._state.flat)
        self._has_others_copies = not same_workers
        self.version = self._state.version
        self.progress = replace(self.progress, version=self.version)
        if same_workers:
            saved = dict(state_dict["progress"])
            saved["reference_turn"] = ReferenceTurn(*saved.pop("beat"))
            saved.setdefault("local_steps", max(saved["round_steps"]))  # of a version that did not tell
            if self._settings.local_steps not in (AUTO, saved["local_steps"]):  # it was another number
                saved |= {"round_steps": self.progress.round_steps, "local_steps": self.progress.local_steps}
            self._has_progress = True
            self._rounds.reference_turn = saved["reference_turn"]
            self.progress = replace(self.progress, **saved)

    def load_local_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from where this worker was. To be called after :meth:`load_global_state_dict`."""
        self._rounds.round = state_dict["round"]
        self._rounds.shard = state_dict["shard"]
        self._rounds.local_steps = state_dict["local_steps"]
        self._rounds.shard_generator.set_state(state_dict["shard_generator"])
        if "feedback" in state_dict:  # not in one of an earlier version
            saved = state_dict["feedback"]
            for feedback, state in zip(self._feedbacks, saved if isinstance(saved, list) else [saved], strict=True):
                feedback.load_state_dict(state)
        self._round = state_dict

    def start(self, budget: Budget) -> Progress:
        """Shared progress that a run with this budget starts from."""
        if not self._has_progress:  # only now the length of the run is known
            length = self._settings.round_length(budget.max_steps)
            self.progress = replace(Progress.at_start(self._size, length.first()), version=self.version)
        steps, round_steps = self.progress.steps, self.progress.round_steps
        caps, exhausted = budget.caps(steps, round_steps), budget.exhausted(steps)
        return replace(self.progress, caps=caps, exhausted=exhausted, stop=False, over=False)

    def begin(self, mailbox: Mailbox, exchange: Exchange, trip: RoundTrip) -> None:
        """Go on with the saved round, if there is one. From here on the state can be saved.

        Args:
            mailbox: where the worker's two threads meet.
            exchange: the exchange thread, which has not started.
            trip: pushes the worker's rounds.
        """
        self._mailbox, self._exchange, self._trip = mailbox, exchange, trip
        trip.version, trip.start_versions = self.version, list(self._state.versions)
        if self._has_others_copies:
            self._replica.copies.reset(self._replica.layout.by_name(self._state.flat))
        saved, self._round = self._round, None
        if saved is not None:
            self._resume_round(saved)

    @torch.no_grad()
    def _resume_round(self, saved: Mapping[str, Any]) -> None:
        rounds, versions = self._rounds, self._state.versions
        rounds.round_steps, rounds.round_samples = saved["round_steps"], saved["round_samples"]
        rounds.unsent = list(saved.get("unsent", [rounds.round_steps]))  # an earlier version knew one fragment
        torch._foreach_copy_(self._replica.in_module, saved["tensors"])
        start = saved.get("start_versions") or [saved.get("start_version", self._state.version)]
        self._trip.start_versions = list(start)  # progress stays as stale as it was
        if saved["base"] is not None:
            for fragment in range(len(versions)):
                self._resume_fragment(fragment, saved["base"])
        next_shard = saved.get("next_shard")
        if next_shard is not None or self._rounds.push_is_due(self._mailbox.progress, wanted=False):
            self._trip.push(shard=None if next_shard is None else saved["shard"])
        if next_shard is not None:
            self._rounds.shard = next_shard

    def _resume_fragment(self, fragment: int, saved_base: Tensor) -> None:
        """Go on with the progress of a fragment, whose global parameters may have moved since it began."""
        state = self._state.fragments[fragment]
        base = saved_base[state.layout.span]
        assert self._replica.base is not None
        if self._trip.start_versions[fragment] == state.version:
            self._replica.base[state.layout.span].copy_(base)
        else:
            correction = state.flat - base.to(state.flat.device)
            state.clear_holes(correction)
            self._replica.rebase(fragment, state.flat, correction)

    # ---- saving -----------------------------------------------------------------------------------------------------

    def global_state_dict(self, tensors: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
        """The global state and the run's shared progress: equal on all workers during a cut.

        Args:
            tensors: where to copy the global parameters and buffers, by name, and what the state then holds; None: new
                tensors.
        """
        progress = self._mailbox.progress
        with self._mailbox.global_state():
            state = self._state.state_dict(tensors)
            self._replica.synchronize()
        counts = {name: getattr(progress, name) for name in _SAVED_PROGRESS}
        return {"global": state, "progress": counts | {"beat": tuple(progress.reference_turn)}}

    def local_state_dict(self) -> dict[str, Any]:
        """What this worker alone knows: its own parameters and where in its round it is. To be called during a cut.

        Progress that is not applied yet, pushed or not, is the difference between ``tensors`` and ``base``. The former
        are the module's own, and what this worker holds between two pushes is not copied either: it is to be saved or
        copied before the next step.
        """
        rounds = self._rounds
        steps, samples, shard, unsent = rounds.round_steps, rounds.round_samples, rounds.shard, list(rounds.unsent)
        base = self._replica.base
        push = self._mailbox.untaken_push() or self._exchange.pending
        if push is not None:
            pushed = push.round
            steps, samples, shard = steps + pushed.steps, samples + pushed.samples, pushed.shard
            unsent[pushed.fragment] += pushed.fragment_steps
            base = push.base
        versions = tuple(self._trip.start_versions)
        same = versions == self._state.versions and not self._replica.rounds_base
        if push is not None and not same:  # the exchange thread makes a part of it the delta, or has done so
            base = push.base.clone()
            if push is self._exchange.pending:
                base[self._replica.layout.fragments[push.round.fragment].span].add_(push.snapshot)
        assert base is not None
        return {
            "tensors": [t.detach() for t in self._replica.own],
            # Without updates since the round began, the base is the global state itself (if the module can hold it).
            "base": None if same else base,
            "round": self._rounds.round - (push is not None),
            "start_versions": versions,
            "unsent": unsent,
            "round_steps": steps,
            "round_samples": samples,
            "shard": shard,
            "next_shard": None if push is None else self._rounds.shard,  # it has been drawn already
            "local_steps": self._rounds.local_steps,
            "shard_generator": self._rounds.shard_generator.get_state(),
            "feedback": [feedback.state_dict() for feedback in self._feedbacks],
        }
