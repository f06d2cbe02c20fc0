"""The job's processes leave together."""

from __future__ import annotations

import threading
from datetime import timedelta

import pytest
from torch.distributed import HashStore

from lightning_async_localsgd.membership import StaticJob
from lightning_async_localsgd.membership.pulse import Watch


def test_the_host_of_the_store_leaves_when_all_have() -> None:
    store = HashStore()
    host, other = (StaticJob(store, rank, 2, timedelta(seconds=30), hosts_store=rank == 0) for rank in range(2))
    for job in (host, other):
        job.next_stage()
    leaving = threading.Thread(target=host.leave)
    leaving.start()
    leaving.join(0.2)
    assert leaving.is_alive()
    other.leave()  # hosts nothing, so that it waits for nobody
    leaving.join(30)
    assert not leaving.is_alive()


def test_a_worker_that_never_leaves_is_named() -> None:
    job = StaticJob(HashStore(), 0, 2, timedelta(seconds=0.1), hosts_store=True)
    job.next_stage()
    with pytest.warns(UserWarning, match="Worker 1 of 2"):
        job.leave()


@pytest.mark.parametrize("patient", [False, True])
def test_who_sets_its_key_and_leaves_between_two_looks_has_come(patient: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    store = HashStore()
    one, other = (StaticJob(store, rank, 2, timedelta(seconds=2)) for rank in range(2))
    for job in (one, other):
        job.next_stage()
    check = Watch.check

    def come_and_leave(self: Watch, missing: list[int]) -> None:
        other.tell("word", 7)
        other.leave()
        check(self, missing)

    monkeypatch.setattr(Watch, "check", come_and_leave)
    if patient:
        assert one.wait_for_living({1: "word"}) == {}
    else:
        one.wait_for({1: "word"})
    assert one.hear("word") == 7
