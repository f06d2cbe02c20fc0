"""A worker with a slow link: the others go on, one turn ahead of it, and nothing is lost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import timedelta
from itertools import count
from typing import Any

import pytest
from torch import Tensor
from torch.distributed import Store

from lightning_async_localsgd import RunSummary, Settings
from lightning_async_localsgd.codecs import Codec
from lightning_async_localsgd.exchange.trade import Reduce
from lightning_async_localsgd.worker import connections
from tests.processes import job_store, results, run_processes
from tests.worker.test_worker import Loop, flat

SLOW = 2
HELD = 4  # turns


class ObservedLoop(Loop):
    """On a fast worker: tells the slow one which versions it has left behind."""

    left_behind = 0

    def train_step(self) -> None:
        super().train_step()
        for version in range(self.left_behind, self.worker.summary().version):
            self.store.set(f"beyond/{version}", "1")
        self.left_behind = self.worker.summary().version

    store: Store


def receive_slowly(monkey: pytest.MonkeyPatch, loop: Loop, store: Store) -> None:
    """Receive the sums of the first turns only when the others have applied those of the next turn, too."""
    bring, turns = Reduce.sums, count(1)

    def sums(reduce: Reduce, groups: Sequence[Sequence[int]], own: Tensor | None, codec: Codec) -> Iterator[None]:
        if any(groups) and next(turns) <= HELD:
            behind = loop.worker.summary().version + sum(map(len, groups))
            post = reduce._transport.receive

            def receive(wire: Tensor, peer: int, channel: Any) -> Any:
                wait = post(wire, peer, channel)

                def wait_slowly() -> None:
                    store.wait([f"beyond/{behind}"], timedelta(seconds=60))
                    wait()

                return wait_slowly

            with pytest.MonkeyPatch.context() as held:
                held.setattr(reduce._transport, "receive", receive)
                yield from bring(reduce, groups, own, codec)
        else:
            yield from bring(reduce, groups, own, codec)

    monkey.setattr(Reduce, "sums", sums)


def train(rank: int, settings: Settings) -> tuple[RunSummary, list[float], int]:
    with pytest.MonkeyPatch.context() as monkey:
        monkey.setattr(
            connections, "slice_shares", lambda links: [0.0 if w == SLOW else 0.5 for w in range(len(links))]
        )
        loop = ObservedLoop(rank, 3, settings, pause=0.01)
        loop.store = job_store()
        if rank == SLOW:
            loop.left_behind = 1 << 62  # tells nothing
            receive_slowly(monkey, loop, loop.store)
        return loop.run(80), flat(loop.module), loop.worker.local_steps


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("codec", ["fp32", "int8"])
def test_the_others_apply_a_turn_while_a_slow_link_still_brings_the_last_one(codec: str, overlap: bool) -> None:
    timeout = timedelta(seconds=90)
    settings = Settings(local_steps=5, grace_period=0.0, codec=codec, overlap=overlap, timeout=timeout)
    ends = results(run_processes(train, 3, settings, timeout=150))
    summaries = [summary for summary, _, _ in ends]
    assert len({summary.digest for summary in summaries}) == 1
    assert ends[0][1] == ends[1][1] == ends[2][1]
    assert sum(steps for _, _, steps in ends) == summaries[0].total_local_steps
    assert sum(summary.bytes_sent for summary in summaries) == sum(summary.bytes_received for summary in summaries)
