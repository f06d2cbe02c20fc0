"""Every way into the library: launchers, clusters, LightningCLI, Fabric, several hosts; and docs/ways-in as written."""

from __future__ import annotations

import os
import re
import runpy
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
import torch
from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_async_localsgd import AsyncLocalSGDStrategy
from lightning_async_localsgd.trainer.launching import ForkingLauncher, check_start_method
from tests import commands, imports
from tests.hosts import alone, be_alone, run_together, two_hosts, why_not
from tests.modules import Regression, make_trainer, stream
from tests.processes import results, run_processes
from tests.scripts import Started, ends

ROOT = Path(__file__).parent.parent
PAGES = ROOT / "docs" / "ways-in"
needs_hosts = pytest.mark.skipif(bool(why_not()), reason=why_not() or "-")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working directory in which the repository's relative paths work, and nothing is left behind."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    return tmp_path


def environment(**more: str) -> dict[str, str]:
    """Like a new shell's: what an earlier launcher has set is not there; ``python`` has imported Lightning already."""
    launchers = ("RANK", "WORLD_SIZE", "MASTER_", "LOCAL_", "NODE_RANK", "GROUP_", "TORCHELASTIC_", "SLURM_", "GLOO_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(launchers)}
    path = os.pathsep.join([str(commands.folder()), str(Path(sys.executable).parent), kept.get("PATH", "")])
    return kept | {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | more


def digests(*outcomes: tuple[int | None, str]) -> list[str]:
    """What the processes say the final state is; fails if one of the commands has failed."""
    for code, output in outcomes:
        assert code == 0, output
    return [digest for _, output in outcomes for digest in re.findall(r"digest ([0-9a-f]{32})", output)]


def run_script(folder: Path, code: str, *arguments: str, **more: str) -> tuple[int, str]:
    (folder / "script.py").write_text(code)
    command = [*alone(), "python", *arguments, str(folder / "script.py")]
    return run_together([command], folder, environment(**more))[0]


# ---- by name ---------------------------------------------------------------------------------------------------------


NAMED = """
import lightning as L
def use(name):
    L.Trainer(accelerator="cpu", devices=2, logger=False, strategy=name)
try:
    use("async_localsgd")
except ValueError as error:
    assert "invalid strategy name" in str(error)
else:
    raise AssertionError("Lightning finds it by itself now, and docs/ways-in/README.md can say so")
import lightning_async_localsgd
for suffix in ("", "_notebook", "_fork", "_spawn"):
    use("async_localsgd" + suffix)
"""


def test_names_are_known_once_the_package_is_imported() -> None:
    code, output = imports.run(NAMED)
    assert code == 0, output


# ---- Lightning's launchers -------------------------------------------------------------------------------------------

STARTED = """
import hashlib, sys, torch, lightning as L
from torch.nn.utils import parameters_to_vector
from torch.utils.data import DataLoader
from lightning_async_localsgd import AsyncLocalSGDStrategy

from tests.modules import Regression, make_trainer, regression_data

def tell(who, module):
    values = str(parameters_to_vector(module.parameters()).tolist())
    print(f"{who} has {hashlib.md5(values.encode()).hexdigest()}", flush=True)

class Tell(L.Callback):
    def on_train_end(self, trainer, module):
        tell("worker", module)

if __name__ == "__main__":
    torch.set_num_threads(1)
    plan = AsyncLocalSGDStrategy(local_steps=5, start_method=sys.argv[1])
    trainer = make_trainer(2, plan, max_steps=20, max_epochs=-1, callbacks=[Tell()], val_check_interval=5)
    module = Regression([0.002])
    trainer.fit(module, DataLoader(regression_data(), batch_size=4), DataLoader(regression_data(), batch_size=64))
    tell("main", module)
    print(f"main steps {plan.summary.total_local_steps} metrics {sorted(trainer.callback_metrics)}", flush=True)
"""


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_started_processes_bring_model_metrics_and_summary_back(start_method: str, folder: Path) -> None:
    (folder / "script.py").write_text(STARTED)
    [(code, output)] = ends([Started(folder / "script.py", environment(), [start_method], be_alone)])
    assert code == 0, output
    parameters = re.findall(r"(?:worker|main) has ([0-9a-f]{32})", output)
    assert len(parameters) == 3 and len(set(parameters)) == 1, output
    steps = re.search(r"main steps (\d+) metrics \['val_loss'\]", output)
    assert steps is not None and abs(int(steps[1]) - 40) <= 2 * 5, output


REFUSED = """
for name in ("async_localsgd", "async_localsgd_spawn"):
    try:
        L.Trainer(strategy=name, devices=2, logger=False)
    except Exception as error:
        print("refused:", error)
"""


def test_a_notebook_trains_in_forked_processes_and_hears_which_start_method_works(folder: Path) -> None:
    [cell] = blocks("launcher.md", "python")
    code, output = run_script(folder, cell + REFUSED, "-i")  # to Lightning an interactive interpreter is a notebook
    assert code == 0 and "RunSummary(" in output, output
    refusals = [line for line in output.splitlines() if line.startswith("refused:")]
    assert len(refusals) == 2 and all("async_localsgd_notebook" in line for line in refusals), output


def test_code_from_standard_input_is_refused_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["-"])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    for name in ("LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    trainer = make_trainer(2, AsyncLocalSGDStrategy(), max_steps=1)
    with pytest.raises(MisconfigurationException, match=r"standard input.*async_localsgd_fork"):
        trainer.fit(Regression(), stream(0))


def test_start_methods_that_cannot_work_are_refused_with_one_that_can(monkeypatch: pytest.MonkeyPatch) -> None:
    for method in ("popen", "fork", "spawn", "forkserver"):
        check_start_method(method, LightningEnvironment(), interactive=False)
    check_start_method("fork", LightningEnvironment(), interactive=True)
    with pytest.raises(MisconfigurationException, match="SLURMEnvironment"):
        check_start_method("fork", SLURMEnvironment(), interactive=False)
    check_start_method("popen", SLURMEnvironment(), interactive=False)

    strategy = AsyncLocalSGDStrategy(start_method="fork", parallel_devices=[torch.device("cuda", 0)] * 2)
    strategy.cluster_environment = LightningEnvironment()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(MisconfigurationException, match="kernel"):
        ForkingLauncher(strategy, start_method="fork").launch(print)


LATE = """
import time, lightning as L, torch
from lightning_async_localsgd import AsyncLocalSGDStrategy

from tests.modules import Regression, make_trainer, stream
torch.set_num_threads(1)

class Late(L.Callback):
    def on_fit_end(self, trainer, module):
        if trainer.global_rank == 1:
            time.sleep(3)  # long enough for process 0 to end, if it did not wait

plan = AsyncLocalSGDStrategy(local_steps=5)
trainer = make_trainer(2, plan, max_steps=20, callbacks=[Late()])
trainer.fit(Regression([0.002]), stream(trainer.global_rank))
print(f"worker {trainer.global_rank} digest {plan.summary.digest}\\n", end="", flush=True)
"""


def test_the_process_that_the_others_meet_at_ends_last(folder: Path) -> None:
    found = digests(run_script(folder, LATE))
    assert len(found) == 2 and found[0] == found[1]


# ---- SLURM -----------------------------------------------------------------------------------------------------------

REQUEUED = """
import sys, lightning as L, torch
from lightning_async_localsgd import AsyncLocalSGDStrategy

from tests.modules import Regression, stream
torch.set_num_threads(1)

class Tell(L.Callback):
    def on_train_start(self, trainer, module):
        print(f"started at {trainer.global_step} on {type(trainer.strategy.cluster_environment).__name__}", flush=True)
    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 10:
            open(f"ready{trainer.global_rank}", "w").close()

plan = AsyncLocalSGDStrategy(local_steps=5)
trainer = L.Trainer(accelerator="cpu", devices=2, strategy=plan, max_steps=100, logger=False, callbacks=[Tell()],
                    enable_progress_bar=False, enable_checkpointing=False)
trainer.fit(Regression([0.03]), stream(trainer.global_rank))
print(f"digest {plan.summary.digest}", flush=True)
"""


def slurm_task(rank: int, port: int, **more: str) -> dict[str, str]:
    return environment(
        SLURM_JOB_ID=str(port - 15000),  # Lightning makes the port from it
        SLURM_JOB_NAME="train",
        SLURM_NTASKS="2",
        SLURM_NTASKS_PER_NODE="2",
        SLURM_NNODES="1",
        SLURM_NODELIST="localhost",
        SLURM_NODEID="0",
        SLURM_PROCID=str(rank),
        SLURM_LOCALID=str(rank),
        **more,
    )


def free_port() -> int:
    """A free port of those that Lightning takes under SLURM."""
    for port in range(15000 + os.getpid() % 5000, 25000):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return port
    raise AssertionError("no free port")


def executable(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def test_slurm_tasks_are_workers_and_a_requeued_job_goes_on_from_its_checkpoint(folder: Path) -> None:
    executable(folder / "scontrol", "#!/bin/sh\necho $@ >> scontrol.log\n")
    (folder / "script.py").write_text(REQUEUED)
    path = f"{folder}{os.pathsep}{environment()['PATH']}"
    for turn in range(2):
        port = free_port()
        tasks = [Started(folder / "script.py", slurm_task(rank, port, PATH=path)) for rank in range(2)]
        try:
            while turn == 0 and not all((folder / f"ready{rank}").exists() for rank in range(2)):
                assert all(task.running for task in tasks), [task.output for task in tasks]
                time.sleep(0.05)
            if turn == 0:
                for task in tasks:
                    task.send_signal(signal.SIGUSR1)
        finally:
            outcomes = ends(tasks, 100)
        found = digests(*outcomes)
        assert len(found) == 2 and found[0] == found[1]
        starts = [int(re.findall(r"started at (\d+) on SLURMEnvironment", output)[0]) for _, output in outcomes]
        assert starts == [0, 0] if turn == 0 else min(starts) >= 9, outcomes
    assert (folder / "scontrol.log").read_text().splitlines()[0].startswith("requeue")


# ---- LightningCLI ----------------------------------------------------------------------------------------------------

CONFIGURED = """
import contextlib, io
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringDataModule, DemoModel

def printed(path):
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        LightningCLI(DemoModel, BoringDataModule, args=["--config", path, "--print_config"], run=False)
    return text.getvalue()

def settings(path):
    cli = LightningCLI(DemoModel, BoringDataModule, args=["--config", path], run=False)
    strategy = cli.trainer.strategy
    optimizer = strategy.settings.outer_optimizer(cli.model.parameters())
    group = {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
    return (
        strategy.settings.fingerprint() | {"timeout": strategy.settings.timeout.total_seconds()},
        (strategy.validate_global, strategy.process_group_backend, type(optimizer).__name__, group),
    )

given = settings("config.yaml")
open("printed.yaml", "w").write(printed("config.yaml"))
assert printed("printed.yaml") == open("printed.yaml").read() != ""
assert settings("printed.yaml") == given
common, rest = given
expected = {"local_steps": 7, "grace_period": 0.5, "quorum": 2, "overlap": False, "budget": "per_worker",
            "codec": "bf16", "outer_device": "cpu", "timeout": 90.0}
assert {name: common[name] for name in expected} == expected, common
assert common["pace"].endswith("DynamicLocalUpdates(tolerance=0.2)"), common
assert len(common["transforms"]) == 2, common
assert common["transforms"][0].endswith("PolyThres(power=0.25, threshold=5)"), common
assert common["transforms"][1].endswith("AsyncBuffer(size=3)"), common
assert rest[:3] == (False, "gloo", "SGD") and rest[3]["lr"] == 0.25 and rest[3]["nesterov"] is True, rest
"""
ADAPTED = """
trainer:
  accelerator: cpu
  strategy:
    class_path: lightning_async_localsgd.AsyncLocalSGDStrategy
    init_args:
      local_steps: 7
      outer_optimizer:
        class_path: torch.optim.SGD
        init_args: {lr: 0.25, momentum: 0.5, nesterov: true}
      pace:
        class_path: lightning_async_localsgd.protocol.pace.DynamicLocalUpdates
        init_args: {tolerance: 0.2}
      transforms:
        - class_path: lightning_async_localsgd.outer.PolyThres
          init_args: {power: 0.25, threshold: 5}
        - class_path: lightning_async_localsgd.outer.AsyncBuffer
          init_args: {size: 3}
      grace_period: 0.5
      quorum: 2
      overlap: false
      budget: per_worker
      codec: bf16
      exchange: gather
      turns_per_round: 3.0
      outer_device: cpu
      timeout: 0:01:30
      validate_global: false
      process_group_backend: gloo
  devices: 2
"""


def test_every_setting_comes_from_yaml_and_the_printed_configuration_says_the_same(folder: Path) -> None:
    pytest.importorskip("jsonargparse")
    (folder / "config.yaml").write_text(ADAPTED)
    (folder / "script.py").write_text(CONFIGURED)
    [(code, output)] = ends([Started(folder / "script.py", environment())])
    assert code == 0, output


# ---- the pages, as written -------------------------------------------------------------------------------------------


def blocks(page: str, language: str, word: str = "") -> list[str]:
    """Code blocks of a page, by what is written behind their opening fence."""
    found = re.findall(r"^```(\w+) ?([\w ]*)\n(.*?)^```$", (PAGES / page).read_text(), re.MULTILINE | re.DOTALL)
    return [text for kind, words, text in found if kind == language and word in words.split() + [""] * (not words)]


ONE_HOST = [
    (page, number)
    for page in ("launcher.md", "torchrun.md", "cli.md", "plain-pytorch.md", "fabric.md", "elastic.md")
    for number in range(len(blocks(page, "bash")))
]


@pytest.mark.parametrize(("page", "number"), ONE_HOST)
def test_commands_for_one_host(page: str, number: int, folder: Path) -> None:
    command = blocks(page, "bash")[number]
    if page == "cli.md":
        pytest.importorskip("jsonargparse")
    if page == "elastic.md":
        pytest.importorskip("torchft")
    more = {}
    if page == "launcher.md":  # one of them from nothing: every process imports for itself
        more["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    outcome = run_together([[*alone(), "bash", "-ec", command]], folder, environment(**more))[0]
    found = digests(outcome)
    if "--print_config" in command:
        assert "lightning_async_localsgd.AsyncLocalSGDStrategy" in outcome[1]
    else:
        assert len(found) == 2 and found[0] == found[1], outcome[1]


@needs_hosts
@pytest.mark.parametrize("number", range(len(blocks("torchrun.md", "bash", "node0"))))
def test_commands_for_two_hosts(number: int, folder: Path) -> None:
    commands = [blocks("torchrun.md", "bash", name)[number] for name in ("node0", "node1")]
    with two_hosts(folder) as hosts:
        run = [[*host.command, "bash", "-ec", command] for host, command in zip(hosts, commands, strict=True)]
        outcomes = run_together(run, folder, environment())
    found = digests(*outcomes)
    assert len(found) == 2 and found[0] == found[1], outcomes


ENDING = """
import sys, torch, lightning as L
from torch.utils.data import DataLoader
from lightning_async_localsgd import AsyncLocalSGDStrategy

from tests.modules import Regression, make_trainer, regression_data

class Average(L.Callback):
    def on_fit_end(self, trainer, module):
        with torch.no_grad():
            module.net[0].bias.fill_(1.0 + trainer.global_rank)

module, strategy = Regression(), AsyncLocalSGDStrategy(local_steps=3, worker_size=int(sys.argv[1]))
trainer = make_trainer(1, strategy, num_nodes=2, max_steps=6, callbacks=[Average()])
trainer.fit(module, DataLoader(regression_data(64), batch_size=4))
trainer.validate(module, DataLoader(regression_data(8), batch_size=4), verbose=False)
print("bias", module.net[0].bias.detach().unique().tolist(), float(trainer.callback_metrics["val_loss"]))
"""


@needs_hosts
@pytest.mark.parametrize("worker_size", [1, 2])
def test_groups_between_hosts_whose_names_are_loopback_addresses(worker_size: int, folder: Path) -> None:
    """The final module, a worker across hosts, and a validation after the fit."""
    (folder / "script.py").write_text(ENDING)
    with two_hosts(folder) as hosts:
        where = {"MASTER_ADDR": "node0", "MASTER_PORT": "29500"}
        scripts = [
            Started(folder / "script.py", environment(NODE_RANK=str(node), **where), [str(worker_size)], host.enter)
            for node, host in enumerate(hosts)
        ]
        outcomes = ends(scripts)
    found = [line for _, output in outcomes for line in output.splitlines() if line.startswith("bias")]
    assert len(found) == 2 and found[0] == found[1] and "[1.0]" in found[0], outcomes


@needs_hosts
def test_hosts_that_cannot_connect_hear_where_the_workers_listen_within_the_timeout(folder: Path) -> None:
    script = (
        "import torch\nfrom datetime import timedelta\nfrom lightning_async_localsgd import AsyncLocalSGD\n"
        "module = torch.nn.Linear(1, 1)\noptimizer = torch.optim.SGD(module.parameters(), lr=0.1)\n"
        "with AsyncLocalSGD(module, optimizer, timeout=timedelta(seconds=10)):\n    pass\n"
    )
    (folder / "script.py").write_text(script)
    with two_hosts(folder) as hosts:
        # The interface of each host that leads to itself alone.
        where = {"WORLD_SIZE": "2", "MASTER_ADDR": "node0", "MASTER_PORT": "29500", "GLOO_SOCKET_IFNAME": "lo"}
        scripts = [
            Started(folder / "script.py", environment(RANK=str(rank), **where), [], host.enter)
            for rank, host in enumerate(hosts)
        ]
        outcomes = ends(scripts)
    assert any("could not connect" in output for _, output in outcomes), outcomes
    for code, output in outcomes:
        assert code and code > 0 and ("GLOO_SOCKET_IFNAME" in output or "did not come" in output), output


@pytest.mark.parametrize("number", range(len(blocks("slurm.md", "bash", "sbatch"))))
def test_batch_scripts(number: int, folder: Path) -> None:
    """With stand-ins for SLURM's commands that do on one host what the real ones do on several."""
    script = blocks("slurm.md", "bash", "sbatch")[number]
    asked = dict(re.findall(r"#SBATCH --([\w-]+)=(\S+)", script))
    nodes, per_node = int(asked["nodes"]), int(asked["ntasks-per-node"])
    executable(folder / "scontrol", f"#!/bin/bash\nfor i in {{1..{nodes}}}; do echo 127.0.0.1; done\n")
    executable(
        folder / "srun",
        "#!/bin/bash\npids=\n"
        f"for node in {{0..{nodes - 1}}}; do for task in {{0..{per_node - 1}}}; do\n"
        f'SLURM_PROCID=$((node * {per_node} + task)) SLURM_NODEID=$node SLURM_LOCALID=$task "$@" & pids+=" $!"\n'
        "done; done\nfor pid in $pids; do wait $pid || exit 1; done\n",
    )
    (folder / "job.sh").write_text(script)
    variables = {
        "SLURM_JOB_ID": str(free_port() - 15000),
        "SLURM_JOB_NAME": asked["job-name"],
        "SLURM_JOB_NODELIST": "127.0.0.1",
        "SLURM_NODELIST": "127.0.0.1",
        "SLURM_NNODES": str(nodes),
        "SLURM_NTASKS": str(nodes * per_node),
        "SLURM_NTASKS_PER_NODE": str(per_node),
        "SLURM_CPUS_PER_TASK": "1",
        "PATH": f"{folder}{os.pathsep}{environment()['PATH']}",
    }
    outcome = run_together([[*alone(), "bash", "-e", "job.sh"]], folder, environment(**variables))[0]
    found = digests(outcome)
    assert len(found) == nodes * per_node == 2 and found[0] == found[1], outcome[1]


SETUP = """
import torch
from torch import nn
from lightning_async_localsgd import AsyncLocalSGD
torch.set_num_threads(1)
module = nn.Linear(8, 1)
optimizer = torch.optim.SGD(module.parameters(), lr=1e-2)
batches = iter(lambda: torch.randn(4, 8), None)
loss = lambda module, x: module(x).square().mean()
"""


def run_page(rank: int, script: str) -> str:
    found: str = runpy.run_path(script, run_name="__main__")["job"].summary.digest
    return found


@pytest.mark.parametrize("page", ["plain-pytorch.md", "fabric.md"])
def test_code_on_the_pages(page: str, folder: Path) -> None:
    (folder / "script.py").write_text(SETUP + blocks(page, "python")[0])
    first, second = results(run_processes(run_page, 2, str(folder / "script.py")))
    assert first == second


def test_the_configuration_on_the_page_is_that_of_the_example() -> None:
    assert blocks("cli.md", "yaml") == [(ROOT / "examples/ways_in/cli.yaml").read_text()]
