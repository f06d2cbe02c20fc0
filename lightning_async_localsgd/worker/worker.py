"""A worker: counts its local steps, pushes a delta at the end of each round, adopts new global parameters."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import Store
from torch.optim import Optimizer
from torch.profiler import record_function

from lightning_async_localsgd.errors import PeerLostError
from lightning_async_localsgd.exchange import Adoption, ExchangeThread, GlooTransport, Mailbox, Push
from lightning_async_localsgd.exchange.causes import Causes
from lightning_async_localsgd.exchange.share import share
from lightning_async_localsgd.membership import Roster
from lightning_async_localsgd.outer import GlobalState
from lightning_async_localsgd.outer.layout import Layout
from lightning_async_localsgd.protocol import machine as protocol
from lightning_async_localsgd.protocol.budget import Budget
from lightning_async_localsgd.protocol.header import PROTOCOL, Flag
from lightning_async_localsgd.protocol.machine import Action, Machine
from lightning_async_localsgd.protocol.messages import Cut, Message
from lightning_async_localsgd.protocol.progress import Beat, OuterUpdate, Progress
from lightning_async_localsgd.protocol.round_length import AUTO
from lightning_async_localsgd.protocol.rounds import Rounds
from lightning_async_localsgd.protocol.speed_meter import Stopwatch
from lightning_async_localsgd.settings import Settings
from lightning_async_localsgd.worker.dropped_deltas import Drops
from lightning_async_localsgd.worker.replica import Replica
from lightning_async_localsgd.worker.summary import RunSummary

__all__ = ["Worker"]

_SAVED_PROGRESS = (
    "steps",
    "round_steps",
    "local_steps",
    "shard_samples",
    "updates",
    "total_staleness",
    "max_staleness",
    "dropped",
)


class Worker:
    """One replica of a module in an asynchronous Local-SGD run. Needs neither Lightning nor a default process group.

    The training thread owns the module and this object. Between :meth:`start` and :meth:`finish` it calls
    :meth:`step` after every local step, until that returns False::

        worker = Worker(module, [optimizer], store, rank, size, Settings(local_steps=50))
        worker.start(max_steps=1000)
        running = True
        while running:
            loss(module, next(batches)).backward()
            optimizer.step()
            optimizer.zero_grad()
            running = worker.step(samples=32)
        summary = worker.finish()

    Args:
        module: the module to train, on its device. Its trainable parameters and float buffers are overwritten with
            those of worker 0.
        optimizers: its inner optimizers. Their state stays on this worker.
        store: a store of ``torch.distributed`` that all workers share, used by this run alone.
        rank: this worker.
        size: number of workers.
        settings: settings of the run.
        credentials: further JSON values, by name, that must be equal on all workers.

    Raises:
        ValueError: if the settings are impossible for ``size`` workers, or nothing in the module is trainable.
        WorkerMismatchError: if the workers were started with different models, settings or library versions.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizers: Sequence[Optimizer],
        store: Store,
        rank: int,
        size: int,
        settings: Settings,
        credentials: Mapping[str, Any] | None = None,
    ) -> None:
        settings.check_workers(size)
        self._store = store
        self._settings = settings
        self.rank = rank
        self.size = size
        self._rounds = Rounds(rank, size, settings)
        self._machine = Machine(self._rounds, settings.overlap)
        layout = Layout(module, bool(settings.exchange_frozen), settings.local_buffers)
        self._replica = Replica(module, optimizers, layout, settings.weight_copies, settings.constraint)
        self._state = GlobalState(
            layout,
            settings.outer_optimizer,
            size,
            settings.quorum,
            torch.device(settings.outer_device),
            settings.transforms,
            settings.constraint,
        )
        self._roster = Roster.introduce(
            store,
            rank,
            size,
            {"protocol": PROTOCOL, "torch": torch.__version__.split("+")[0]}
            | settings.credentials()
            | dict(credentials or {})
            | {"model": list(layout.describe())},
            settings.timeout,
        )
        self._drops = Drops(self._roster.name(rank), layout)
        self._transport = GlooTransport(store, self._roster, settings.timeout)
        self._share_initial_parameters()

        self.steps_made: tuple[int, ...] = ()
        """Local steps of each worker, as far as this one knew with its latest step."""
        self.version = 0
        """Version of the global parameters that this worker has adopted."""
        self.blocked_seconds = 0.0
        self._round_started = 0.0
        self._step_ended = 0.0
        self._start_version = 0  # of the global parameters that this round has begun from
        self._pauses = 0
        self._lent_for_cut = False
        self._progress = Progress.at_start(size, settings.round_length(None).first())
        self._resumed_progress = False
        self._resumed_round: Mapping[str, Any] | None = None
        self._has_others_copies = False  # inner optimizers were loaded from another worker's
        self.on_cut: Callable[[Cut], None] | None = None
        """Called on the training thread when the exchange stands still for a checkpoint; see :meth:`cut`."""
        self.on_progress: Callable[[], None] | None = None
        """Called on the training thread after each turn that it waits for: there may be messages to heed."""
        self._measure_updates = False
        self._exchange: ExchangeThread | None = None
        self._stopwatch = Stopwatch(settings.round_length(None).longest)

    def _share(self, tensors: Mapping[str, Tensor]) -> None:
        """Give all workers worker 0's values. Who waits for a worker that waits for a lost one names the lost one."""
        try:
            share(self._transport, tensors, self.rank, self.size)
        except PeerLostError as error:
            raise Causes(self._store, self._roster, self._settings.timeout).first(error) from None

    def _share_initial_parameters(self) -> None:
        """Take worker 0's tensors, and begin from them."""
        replica = self._replica
        named = dict(zip((slot.name for slot in replica.layout.slots), replica.in_module, strict=True))
        with replica.copies.following():
            self._share(named | replica.others)
        odd = self._state.begin(replica.in_module)
        if odd:
            warnings.warn(
                f"{', '.join(map(repr, odd))} have elements that are not finite. These stay as they are and are not "
                "exchanged; if they are no mask, look at how the parameters are initialized.",
                stacklevel=3,
            )

    # ---- the run ----------------------------------------------------------------------------------------------------

    def start(self, max_steps: int | None = None, open_end: bool = False) -> None:
        """Start the exchange thread and the first round.

        Args:
            max_steps: local steps per worker; with ``budget="shared"`` all workers together make ``max_steps * size``,
                the fast ones more of it. None: until :meth:`step` is no longer called.
            open_end: ``max_steps`` is only what is expected, of epochs for instance: :meth:`step` does not end the run.
        """
        budget = Budget(max_steps, self.size, self._settings.shares_budget(self.size), open_end)
        if not self._resumed_progress:  # only now the length of the run is known
            length = self._settings.round_length(max_steps)
            self._progress = replace(Progress.at_start(self.size, length.first()), version=self._progress.version)
        steps, round_steps = self._progress.steps, self._progress.round_steps
        progress = replace(
            self._progress,
            caps=budget.caps(steps, round_steps),
            exhausted=budget.exhausted(steps),
            stop=False,
            over=False,
        )
        self._rounds.start(progress, max_steps, open_end)
        self._mailbox = Mailbox(progress)
        self._mailbox.measure_updates = self._measure_updates
        self._replica.begin(self._state.flat)
        self._exchange = ExchangeThread(
            self._mailbox, self._state, self._transport, self._store, self._roster, self._settings, budget
        )
        if self._has_others_copies:
            self._replica.copies.reset(self._replica.layout.by_name(self._state.flat))
        if self._resumed_round is not None:
            self._resume_round(self._resumed_round)
        self._report()  # a turn may open before this worker's first step has ended
        self.steps_made = self._rounds.steps_made(self._mailbox.progress)
        if not self.budget_spent:
            self._mailbox.begin_step()
        self._replica.synchronize()  # from here on the other thread moves the global state
        self._exchange.start()
        if not self._settings.overlap:
            while self._replica.in_flight:  # what a run that goes on had pushed
                self._wait(protocol.Reason.ADOPTION, self._mailbox.progress)
        self._round_started = self._step_ended = time.monotonic()
        self._stopwatch.resume()

    def step(self, samples: int = 0) -> bool:
        """Count one local step; push, adopt or wait where it is time to. Call it after each step of the optimizer.

        Args:
            samples: samples this worker learned in this step: a whole number from 0 to 2^32.

        Returns:
            Whether to go on training. Once False, call :meth:`finish`.

        Raises:
            TypeError: if ``samples`` is not a number.
            ValueError: if it is not a whole one, or outside its range.
            AsyncLocalSGDError: if the exchange has failed, on this worker or another.
        """
        self._stopwatch.step()
        self._step_ended = time.monotonic()
        self._rounds.count(samples)
        self._replica.stepped(first=self._rounds.round_steps == 1)
        self._adopt_if_ready()
        self._cut_if_asked()
        self._report()
        running = self._execute(self._after_step)
        self.steps_made = self._rounds.steps_made(self._mailbox.progress)
        if self._rounds.round_steps == 0:  # what came between two rounds was waiting
            self._round_started = time.monotonic()
        if running:
            self._mailbox.begin_step()
        seconds = self._stopwatch.resume()
        if running:  # else it was the end of the run that this worker waited for, not its next step
            self.blocked_seconds += seconds
        return running

    def _report(self) -> None:
        """Tell the exchange thread how this worker stands."""
        progress = self._mailbox.progress
        speed = self._stopwatch.speed(progress.round_steps[self.rank])
        self._mailbox.report(self.local_steps, speed, self._rounds.patience(progress, speed))

    def _execute(self, decide: Callable[[Progress], Action]) -> bool:
        """Execute the machine's actions up to the next step; returns whether there is one."""
        idle = False
        while True:
            progress = self._mailbox.progress
            action = decide(progress)
            if isinstance(action, protocol.Push):
                self._push_last() if action.last else self._push()
                decide = self._machine.after_push
            elif isinstance(action, protocol.Extend):
                self._extend_push(action.most)
                decide = self._machine.after_extension
            elif isinstance(action, protocol.Wait):
                if action.reason is protocol.Reason.BUDGET and not idle:
                    idle = True
                    self._mailbox.flag(Flag.IDLE)
                    self._mailbox.announce()
                self._wait(action.reason, progress)
                decide = self._after_wait
            else:
                if idle and isinstance(action, protocol.Train):
                    self._mailbox.unflag(Flag.IDLE)
                return isinstance(action, protocol.Train)

    def _after_step(self, progress: Progress) -> Action:
        return self._machine.after_step(progress, self._replica.in_flight, self._mailbox.push_wanted)

    def _after_wait(self, progress: Progress) -> Action:
        return self._machine.after_wait(progress, self._replica.in_flight)

    def _wait(self, reason: protocol.Reason, than: Progress) -> None:
        """Wait for an adoption, or for newer progress than this."""
        if reason in (protocol.Reason.ADOPTION, protocol.Reason.LAST_ADOPTION):
            adoption = self._mailbox.wait_for_adoption()
            if adoption is not None:
                self._adopt(adoption)
            self._cut_if_asked()
            return
        self._mailbox.wait_for_progress(than)
        self._adopt_if_ready()
        self._cut_if_asked()
        if self.on_progress is not None:
            self.on_progress()

    @property
    def budget_spent(self) -> bool:
        """Whether no step is left for this worker, as of the latest exchange: in a run that goes on, at its start."""
        return self._rounds.budget_spent(self._mailbox.progress)

    def finish(self, stop: bool = False) -> RunSummary:
        """End this worker's part: push what it has not pushed, wait for the others, take the final global parameters.

        Args:
            stop: ask all other workers to end their training as well.

        Returns:
            The run in numbers.

        Raises:
            AsyncLocalSGDError: if the exchange fails before the end.
        """
        assert self._exchange is not None
        if stop:
            self._mailbox.flag(Flag.STOP)
        self._execute(lambda _: self._machine.finish(self._replica.in_flight))
        progress = self._mailbox.progress
        self._exchange.join(self._settings.timeout.total_seconds())
        with self._replica.copies.following():
            self._replica.load(self._state.flat)
        self._share(self._replica.others)
        self._transport.close()
        self._rounds.final_job_steps(progress)
        self.steps_made = progress.steps
        return self.summary(digest=self._state.digest())

    def abort(self, error: BaseException) -> None:
        """Leave because of ``error``; the other workers are told and stop too."""
        if self._exchange is not None:
            self._exchange.abort(error)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do something other than training (validation, a checkpoint) that is not to count in this worker's speed."""
        self.pause()
        try:
            yield
        finally:
            self.resume()

    def pause(self) -> None:
        """Begin a pause; see :meth:`paused`. There can be one within another."""
        self._pauses += 1
        self._mailbox.flag(Flag.PAUSED)
        self._stopwatch.pause()

    def resume(self) -> None:
        """End a pause."""
        self._pauses -= 1
        if self._pauses == 0:
            self._mailbox.unflag(Flag.PAUSED)
            self._stopwatch.resume()

    def watch(self, optimizers: Sequence[Optimizer]) -> None:
        """From now on these are the inner optimizers."""
        self._replica.watch(optimizers)

    # ---- what the run looks like ------------------------------------------------------------------------------------

    @property
    def local_steps(self) -> int:
        """Local steps this worker has made in this run."""
        return self._rounds.local_steps

    @property
    def round(self) -> int:
        """Rounds this worker has pushed."""
        return self._rounds.round

    @property
    def shard(self) -> int:
        """The data shard of this worker's current round: its own at first, then drawn by progress (Eq. 2)."""
        return self._rounds.shard

    @property
    def job_steps(self) -> int:
        """Steps of the job: local steps of all workers over their number, rounded down. Never goes back.

        Between two exchanges the others are taken to advance at their pace. Learning-rate schedules count these.
        """
        return self._rounds.job_steps(self._mailbox.progress)

    @property
    def stop_requested(self) -> bool:
        """Whether some worker has asked all to end their training."""
        return self._mailbox.progress.stop

    @property
    def speeds(self) -> tuple[float, ...]:
        """Local steps per second of each worker, as of the latest exchange; 0 while unknown."""
        return self._mailbox.progress.speeds

    @property
    def alignment(self) -> float:
        """Cosine between worker 0's latest delta and the outer momentum, about; known on worker 0 alone, else NaN."""
        return self._mailbox.alignment

    @property
    def exchanged_at(self) -> float:
        """When the latest exchange was, which :meth:`summary` is as of, in seconds of the monotonic clock."""
        return self._mailbox.published_at

    @property
    def share(self) -> float:
        """This worker's share of the pace of all, as of the latest exchange."""
        round_steps = self._mailbox.progress.round_steps if self._exchange is not None else self._progress.round_steps
        return round_steps[self.rank] / sum(round_steps)

    def agree(self, decision: bool) -> bool:
        """A decision that all processes of the worker are to make alike: that of its first."""
        return decision

    def measure_updates(self) -> None:
        """Compute every outer update's ``norm`` and ``alignment`` from now on, on the exchange thread."""
        self._measure_updates = True
        if self._exchange is not None:
            self._mailbox.measure_updates = True

    def take_updates(self) -> list[OuterUpdate]:
        """The outer updates since the last call, oldest first (at most 4096: older ones are forgotten)."""
        return self._mailbox.take_updates()

    def send(self, message: Message) -> None:
        """Send a message to all workers, this one included. It comes with the next exchange, which begins now.

        Raises:
            ValueError: if it is longer than a header has room for, about 4 KB.
        """
        self._mailbox.send(message)

    def take_messages(self) -> list[tuple[int, Message]]:
        """Messages since the last call, as pairs of sender and message, in the same order on every worker."""
        return self._mailbox.take_messages()

    def summary(self, digest: str = "") -> RunSummary:
        """The run in numbers, as of the latest exchange."""
        progress = self._mailbox.progress
        return RunSummary(
            version=progress.version,
            total_local_steps=sum(progress.steps),
            local_steps=progress.steps,
            mean_staleness=progress.total_staleness / max(1, progress.updates),
            max_staleness=progress.max_staleness,
            round_length=progress.local_steps,
            dropped=progress.dropped,
            bytes_sent=progress.bytes_sent,
            bytes_received=progress.bytes_received,
            blocked_seconds=self.blocked_seconds,
            digest=digest,
        )

    def global_tensors(self) -> dict[str, Tensor]:
        """Copies of the global parameters and buffers of now, by name, on the CPU."""
        with self._mailbox.global_state():
            return self._state.tensors()

    def lend_global(self, for_cut: bool = False) -> None:
        """Put the global parameters and buffers of now into the module, until :meth:`take_back_own`.

        Args:
            for_cut: they become those of the next :meth:`cut`.
        """
        self._lent_for_cut = for_cut
        self._replica.put_aside()
        self._lend_of_now()

    def _lend_of_now(self) -> None:
        with self._mailbox.global_state():
            self._replica.lend(self._state.flat)

    def take_back_own(self) -> None:
        """Put this worker's own parameters back, bit for bit."""
        self._replica.take_back_own()

    @property
    def has_lent(self) -> bool:
        """Whether the module holds the global parameters, and this worker its own."""
        return self._replica.has_lent

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    @contextmanager
    def cut(self, what: Cut) -> Iterator[None]:
        """Have the exchange stand still between two turns, on all workers, so that all can save the same moment.

        On the other workers ``on_cut(what)`` is called at the end of their current step; here the body of the ``with``
        runs at once. Each worker's exchange goes on when its own is done; their training does not wait for it.

        Args:
            what: what the others are to do.
        """
        try:
            self._mailbox.send(what)
            self._mailbox.wait_for_cut()
            self._adopt_if_ready()
            if self.has_lent and self._lent_for_cut:  # an update may have come since
                self._lend_of_now()
            yield
        finally:
            self._mailbox.release()

    def _cut_if_asked(self) -> None:
        what = self._mailbox.cut
        if what is None:
            return
        try:
            self._adopt_if_ready()  # it comes with the turn that carried the cut
            if self.on_cut is not None:
                with self.paused():
                    self.on_cut(what)
        finally:
            self._mailbox.release()

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
        return {"global": state, "progress": counts | {"beat": tuple(progress.beat)}}

    def local_state_dict(self) -> dict[str, Any]:
        """What this worker alone knows: its own parameters and where in its round it is. To be called during a cut.

        Progress that is not applied yet, pushed or not, is the difference between ``tensors`` and ``base``. The former
        are the module's own, and what this worker holds between two pushes is not copied either: it is to be saved or
        copied before the next step.
        """
        steps, samples, shard = self._rounds.round_steps, self._rounds.round_samples, self.shard
        base, version = self._replica.base, self._start_version
        assert self._exchange is not None
        push = self._mailbox.untaken_push() or self._exchange.pending
        if push is not None:
            pushed = push.round
            steps, samples, shard = steps + pushed.steps, samples + pushed.samples, pushed.shard
            base, version = push.base, pushed.start_version
        same = version == self._state.version and not self._replica.rounds_base
        if push is not None and not same:  # the exchange thread makes it the delta, or has done so
            base = push.base + push.snapshot if push is self._exchange.pending else push.base.to("cpu", copy=True)
        assert base is not None
        return {
            "tensors": [t.detach() for t in self._replica.own],
            # Without updates since the round began, the base is the global state itself (if the module can hold it).
            "base": None if same else base,
            "round": self.round - (push is not None),
            "start_version": version,
            "round_steps": steps,
            "round_samples": samples,
            "shard": shard,
            "next_shard": None if push is None else self.shard,  # it has been drawn already
            "local_steps": self.local_steps,
            "shard_generator": self._rounds.shard_generator.get_state(),
        }

    def gather_from_devices(self) -> list[Tensor]:
        """What the other processes of this worker, if there are any, have to save of their own: bytes of each."""
        return []

    def load_global_state_dict(
        self, state_dict: Mapping[str, Any], same_workers: bool, settings: Mapping[str, Any] | None = None
    ) -> None:
        """Go on from a saved global state, with the settings of now. To be called before :meth:`start`.

        Args:
            state_dict: what :meth:`global_state_dict` gave.
            same_workers: whether the workers are as many as they were; else their counts begin anew.
            settings: the settings of then, as ``Settings.credentials`` gave them; None: they are not known.

        Raises:
            ValueError: if it belongs to another model, or to an outer optimizer that cannot be this one.
        """
        differences = self._state.load_state_dict(state_dict["global"]) + self._settings.differences(settings or {})
        if differences and self.rank == 0:
            warnings.warn(
                "Training goes on with the settings of now, which differ from those of the checkpoint: "
                f"{'; '.join(differences)}.",
                stacklevel=2,
            )
        if not same_workers:
            self._state.begin_rounds(range(self.size))
        self._replica.load(self._state.flat)
        self._has_others_copies = not same_workers
        self.version = self._start_version = self._state.version
        self._progress = replace(self._progress, version=self.version)
        if same_workers:
            saved: dict[str, Any] = state_dict["progress"] | {"beat": Beat(*state_dict["progress"]["beat"])}
            saved.setdefault("local_steps", max(saved["round_steps"]))  # of a version that did not tell
            if self._settings.local_steps not in (AUTO, saved["local_steps"]):  # it was another number
                saved |= {"round_steps": self._progress.round_steps, "local_steps": self._progress.local_steps}
            self._resumed_progress = True
            self._rounds.beat = saved["beat"]
            self._progress = replace(self._progress, **saved)

    def load_local_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from where this worker was. To be called after :meth:`load_global_state_dict`, before :meth:`start`."""
        self._rounds.round = state_dict["round"]
        self._rounds.shard = state_dict["shard"]
        self._rounds.local_steps = state_dict["local_steps"]
        self._rounds.shard_generator.set_state(state_dict["shard_generator"])
        self._resumed_round = state_dict

    @torch.no_grad()
    def _resume_round(self, saved: Mapping[str, Any]) -> None:
        self._rounds.round_steps = saved["round_steps"]
        self._rounds.round_samples = saved["round_samples"]
        torch._foreach_copy_(self._replica.in_module, saved["tensors"])
        self._start_version = saved.get("start_version", self.version)  # the round stays as stale as it was
        assert self._replica.base is not None
        if saved["base"] is not None:
            if self._start_version == self._state.version:
                self._replica.base.copy_(saved["base"])
            else:  # learned on top of older global parameters
                correction = self._state.flat - saved["base"].to(self._state.flat.device)
                self._state.clear_holes(correction)
                self._replica.rebase(self._state.flat, correction)
        self._resumed_round = None
        next_shard = saved.get("next_shard")
        if next_shard is not None or self._rounds.push_is_due(self._mailbox.progress, wanted=False):
            self._push(shard=None if next_shard is None else saved["shard"])
        if next_shard is not None:
            self._rounds.shard = next_shard

    # ---- rounds -----------------------------------------------------------------------------------------------------

    def _push_last(self) -> None:
        """Push what has not been pushed, and tell that no other push will come."""
        if self._rounds.round_steps > 0:
            self._push(Flag.FINAL)
        else:
            self._mailbox.flag(Flag.FINAL)
            self._mailbox.announce()

    def _push(self, flags: Flag = Flag.NONE, shard: int | None = None) -> None:
        """Hand the local parameters of now to the exchange thread; training may go on at once.

        Args:
            flags: to raise with it.
            shard: the round's shard, if that of the next one has been drawn already; None: the current one.
        """
        with record_function("async_localsgd::push"):
            written = self._replica.write(self._rounds.round_steps)
            seconds = self._step_ended - self._round_started
            ended = self._rounds.end_round(self._mailbox.progress, seconds, self._start_version, shard)
            self._report()
            self._mailbox.push(Push(*written, ended), flags)

    def _extend_push(self, most: int) -> None:
        """Add the steps made since the push to the round it ended, while its turn is held open for others.

        Args:
            most: the most local steps that the pushed round may have for that.
        """
        push = self._mailbox.take_back(most)
        if push is None:
            return
        self._replica.take_back(push.base, push.snapshot)
        self._rounds.reopen(push.round)
        self._round_started -= push.round.seconds
        self._push(shard=push.round.shard)  # samples of the next one may be on their way already

    def _adopt_if_ready(self) -> None:
        adoption = self._mailbox.collect()
        if adoption is not None:
            self._adopt(adoption)

    def _adopt(self, adoption: Adoption) -> None:
        """Take over new global parameters, keeping what was learned since the push."""
        self._drops.look(adoption.unsendable)
        self._replica.adopt(adoption, self._rounds.round_steps)
        if adoption.restart:
            self._rounds.restart()
        self.version = self._start_version = adoption.version
