"""A job that is started again in the store of its dead attempts trains every sample of every epoch, once."""

from __future__ import annotations

import ast
import os
from pathlib import Path

from tests import commands
from tests.hosts import alone, run_together
from tests.processes import make_store, results, run_processes
from tests.restarted import DEATHS, EPOCHS, SAMPLES, VICTIMS, train


def check_complete(trained: list[list[int]]) -> None:
    assert sorted(map(tuple, trained)) == [(epoch, index) for epoch in range(EPOCHS) for index in range(SAMPLES)]


def test_two_deaths_in_a_row_lose_no_batch(tmp_path: Path) -> None:
    store = make_store()
    for attempt in range(DEATHS):
        outcomes = run_processes(train, 2, attempt, str(tmp_path), store=store)
        victim = VICTIMS[attempt]
        assert outcomes[victim].error == "killed"
        assert f"PeerLostError: Worker {victim}" in outcomes[1 - victim].error
    finished = results(run_processes(train, 2, DEATHS, str(tmp_path), store=store))
    check_complete([sample for trained, _ in finished for sample in trained])
    assert len({version for _, version in finished}) == 1


def test_under_torchrun(tmp_path: Path) -> None:
    command = [
        *alone(),
        "torchrun",
        "--nproc-per-node=2",
        f"--max-restarts={DEATHS}",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=127.0.0.1:29500",
        "-m",
        "tests.restarted",
        str(tmp_path),
    ]
    path = f"{commands.folder()}{os.pathsep}{os.environ['PATH']}"
    ((code, output),) = run_together([command], tmp_path, os.environ | {"OMP_NUM_THREADS": "1", "PATH": path})
    assert code == 0, output
    check_complete([s for rank in range(2) for s in ast.literal_eval((tmp_path / f"trained-{rank}").read_text())])
