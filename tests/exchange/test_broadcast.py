"""One worker's tensors reach all, and no byte travels that need not."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_async_localsgd.exchange.broadcast import as_bytes, broadcast, from_bytes
from lightning_async_localsgd.exchange.transport import GlooTransport
from lightning_async_localsgd.membership import Roster
from tests.hosts import alone, run_together, why_not
from tests.processes import job_store, results, run_processes
from tests.test_ways_in import environment

LARGE = 700_000  # elements: several chunks, the last of them not full


def tensors_of(rank: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return {
        "equal": torch.ones(LARGE),
        "large": torch.randn(LARGE, generator=generator),
        "transposed": torch.randn(40, 30, generator=generator).t(),
        "half": torch.randn(7, generator=generator).bfloat16(),
        "phase": torch.randn(2, 3, dtype=torch.complex64, generator=generator),
        "count": torch.tensor(rank),
        "flag": torch.tensor(rank == 0),
        "grown": torch.zeros(3 + rank),
    } | ({"here alone": torch.zeros(2)} if rank == 0 else {})


def give(rank: int, size: int, root: int) -> Any:
    timeout = timedelta(seconds=20)
    roster = Roster.introduce(job_store(), rank, size, {}, timeout)
    transport = GlooTransport(job_store(), roster, timeout)
    tensors = tensors_of(rank)
    broadcast(transport, tensors, rank, size, root)
    sent, received = transport.bytes_sent, transport.bytes_received
    broadcast(transport, tensors_of(root) | {"grown": torch.zeros(3)}, rank, size, root)  # now all are equal
    again = transport.bytes_sent - sent
    return {name: tensor.tolist() for name, tensor in tensors.items()}, sent, received, again


@pytest.mark.parametrize("root", [0, 2])
def test_all_take_what_differs_and_nothing_else_is_sent(root: int) -> None:
    ends = results(run_processes(give, 3, 3, root))
    expected = {name: tensor.tolist() for name, tensor in tensors_of(root).items()}
    for rank, (found, *_) in enumerate(ends):
        assert found.pop("grown") == [0.0] * (3 + rank)
        assert found.pop("here alone", []) == ([0.0, 0.0] if rank == 0 else [])
        assert found == {name: expected[name] for name in found}
    assert sum(sent for _, sent, _, _ in ends) == sum(received for _, _, received, _ in ends)
    assert 2 * 4 * LARGE < ends[root][1] < 2 * 4 * (LARGE + 10_000)
    assert all(again < 20_000 for *_, again in ends)


@pytest.mark.parametrize("name", sorted(tensors_of(0)))
def test_bytes_are_read_as_they_were_written(name: str) -> None:
    tensor = tensors_of(0)[name]
    like = torch.zeros_like(tensor)
    from_bytes(like, as_bytes(tensor))
    assert torch.equal(like, tensor)
    if tensor.is_complex():
        from_bytes(like, as_bytes(tensor.conj()))
        assert torch.equal(like, tensor.conj())


SLOW = """
import threading
from datetime import timedelta

import torch
from torch import nn
from torch.distributed import HashStore

from lightning_async_localsgd import Settings, Worker

store, bytes_sent = HashStore(), {}


def run(rank):
    module = nn.ModuleList([nn.Linear(1, 1), nn.Linear(1000, 2000, bias=False)])  # 8 MB that are frozen
    nn.init.constant_(module[1].weight, rank + 1.0)
    module[1].requires_grad_(False)
    worker = Worker(module, [], store, rank, 2, Settings(local_steps=2, timeout=timedelta(seconds=2)))
    worker.start(4)
    while worker.step():
        pass
    assert bool((module[1].weight == 1).all())
    bytes_sent[rank] = worker.finish().bytes_sent


threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert 8e6 < bytes_sent[0] < 9e6, bytes_sent
print("both have ended")
"""


@pytest.mark.skipif(bool(why_not()), reason=why_not() or "-")
def test_a_model_that_takes_longer_than_the_timeout_starts_over_a_slow_link(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SLOW)
    link = "tc qdisc add dev lo root tbf rate 16mbit burst 128kb limit 512kb"
    command = [*alone(), "bash", "-c", f"{link} && exec python script.py"]
    code, output = run_together([command], tmp_path, environment())[0]
    assert code == 0 and "both have ended" in output, output
