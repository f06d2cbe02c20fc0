"""The command `async-localsgd`: its output, its reaction to signals, and its errors."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import lightning_async_localsgd
from lightning_async_localsgd.cli import main
from tests.scripts import Started

TINY = ["--vocab-size", "300", "--width", "16", "--layers", "1", "--heads", "2", "--context", "16", "--batch-size", "4"]
JOB = ["--local-steps", "4", "--evaluate-every", "6", "--speeds", "2", "1"]


@pytest.fixture
def simulate(tmp_path: Path) -> list[str]:
    """The command line of a simulation that takes moments; its output is in `tmp_path / "out"`."""
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"line {n} of a text, {n * n % 97} and {n * 7 % 31}" for n in range(3_000)))
    return ["simulate", "--output-dir", str(tmp_path / "out"), "--text", str(text), *TINY, *JOB]


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The message about invalid arguments; fails unless it is one line with the exit code 2."""
    try:
        code: Any = main(arguments)
    except SystemExit as ended:
        code = ended.code
    out, err = capsys.readouterr()
    assert code == 2 and not out
    assert err.startswith("async-localsgd: error: ") and err.endswith("\n") and err.count("\n") == 1
    return err


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("", "COMMAND"),
        ("train", "'train'"),
        ("simulate --workers 0", "--workers: must be a whole number, at least 1, got 0"),
        ("simulate --workers two", "--workers: must be a whole number, at least 1, got two"),
        ("simulate --speeds", "--speeds: expected at least one argument"),
        ("simulate --speeds 1 0", "--speeds: must be a number, more than 0, got 0"),
        ("simulate --speeds 1 -2", "--speeds: must be a number, more than 0, got -2"),
        ("simulate --speeds inf", "--speeds: must be a number, more than 0, got inf"),
        ("simulate --step-times nan", "--step-times: must be a number, more than 0, got nan"),
        ("simulate --speeds 1 --step-times 1", "not allowed with"),
        ("simulate --speeds 1 2 3 --workers 2", "3 speeds for --workers 2"),
        ("simulate --noise -0.1", "--noise: must be a number, at least 0, got -0.1"),
        ("simulate --latency -1", "--latency: must be a number, at least 0, got -1"),
        ("simulate --bandwidth 0", "--bandwidth: must be a number, more than 0, got 0"),
        ("simulate --method adam", "'adam'"),
        ("simulate --pace slow", "'slow'"),
        ("simulate --codec int7", "'int7'"),
        ("simulate --local-steps 0", "--local-steps: must be a whole number, at least 1, got 0"),
        ("simulate --max-steps 0", "--max-steps: must be a whole number, at least 1, got 0"),
        ("simulate --max-steps 2 --speeds 1 1 --local-steps 50", "give at least 25"),
        ("simulate --quorum 5 --speeds 1 1", "`quorum=5` is larger than the number of workers, 2"),
        ("simulate --grace-period -1", "--grace-period: must be a number, at least 0, got -1"),
        ("simulate --vocab-size 10", "--vocab-size: must be a whole number, at least 257, got 10"),
        ("simulate --width 30 --heads 4", "must be a multiple of the number of heads (4)"),
        ("simulate --text no/such/file.txt", "no/such/file.txt"),
        ("simulate --sites 0 1 --speeds 1 1 1", "--sites gives 2 sites for 3 workers"),
        ("plan --parameters 0", "--parameters: must be a number, at least 1, got 0"),
        ("plan --parameters many", "--parameters: must be a number, at least 1, got many"),
        ("plan --memory-bandwidth 0", "--memory-bandwidth: must be a number, more than 0, got 0"),
        ("plan --bandwidth -5", "--bandwidth: must be a number, more than 0, got -5"),
        ("plan --local-steps 2.5", "--local-steps: must be a whole number, at least 1, got 2.5"),
        ("plan --step-times 1 0", "--step-times: must be a number, more than 0, got 0"),
        ("plan --speeds 1 2 3 --workers 2", "3 speeds for --workers 2"),
        ("plan --sites 0 1", "--sites gives 2 sites for 4 workers"),
        ("plan --site-bandwidth 5", "give the --sites"),
        ("plan --codec int7", "'int7'"),
        ("plan --method adam", "'adam'"),
        ("plan --quorum 5", "`quorum=5` is larger than the number of workers, 4"),
        ("plan --json .", "--json"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    arguments: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert said in refusal(arguments.split(), capsys)
    assert not list(tmp_path.iterdir())


def test_a_refusal_leaves_an_earlier_run_as_it_was(simulate: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    out = Path(simulate[2])
    out.mkdir()
    (out / "rounds.csv").write_text("of an earlier run")
    refusal([*simulate, "--quorum", "5"], capsys)
    assert (out / "rounds.csv").read_text() == "of an earlier run"


def test_a_text_that_is_too_small_is_refused(simulate: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    Path(simulate[4]).write_text("too small")
    assert "The corpus" in refusal(simulate, capsys)


HEAVY = ("torch", "lightning", "numpy", "matplotlib", "datasets", "tokenizers")
RUN = f"""
import sys
from lightning_async_localsgd.cli import main
try:
    code = main(sys.argv[1:])
except SystemExit as ended:
    code = ended.code
heavy = sorted(set({HEAVY}) & set(sys.modules))
assert not heavy, heavy
sys.exit(code)
"""


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ("--help", 0, "COMMAND"),
        ("--version", 0, f"async-localsgd {lightning_async_localsgd.__version__}"),
        ("simulate --help", 0, "--warmup-steps"),
        ("plan --help", 0, "--memory-bandwidth"),
        ("simulate --nonsense", 2, "--nonsense"),
        ("simulate --max-steps 1 --local-steps 20", 2, "--max-steps 1 is"),
        ("plan --speeds x", 2, "--speeds"),
        ("plan --sites 0 1", 2, "--sites gives 2 sites"),
    ],
)
def test_help_and_what_is_wrong_with_an_argument_do_not_wait_for_heavy_imports(
    arguments: str, code: int, said: str
) -> None:
    outcome = subprocess.run([sys.executable, "-c", RUN, *arguments.split()], capture_output=True, text=True)
    assert outcome.returncode == code and said in outcome.stdout + outcome.stderr, outcome.stderr


# ---- output ----------------------------------------------------------------------------------------------------------


def test_a_run_leaves_its_result_as_json_csv_picture_and_table(
    simulate: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*simulate, "--max-steps", "24", "--bandwidth", "1", "--latency", "10"]) == 0
    out = tmp_path / "out"
    result = json.loads((out / "result.json").read_text())
    assert result["finished"] is True
    assert result["workers"] == 2 and result["total_local_steps"] == 48
    for name in ("rounds", "losses", "updates"):
        expected = [{key: str(value) for key, value in entry.items()} for entry in result[name]]
        assert rows(out / f"{name}.csv") == expected and expected
    metrics = [(r["metric"], float(r["value"])) for r in rows(out / "evaluations.csv")]
    assert metrics == [pair for entry in result["evaluations"] for pair in entry["metrics"].items()]
    assert {name for name, _ in metrics} == {"held_out_loss", "perplexity"}
    with Image.open(out / "run.png") as picture:
        assert picture.format == "PNG"
    printed = capsys.readouterr().out
    assert "48 together" in printed and "unfinished" not in printed


def test_the_same_seed_gives_the_same_run(simulate: list[str], tmp_path: Path) -> None:
    def result(seed: str, folder: str) -> dict[str, Any]:
        out = tmp_path / folder
        assert main([*simulate, "--max-steps", "12", "--noise", "0.3", "--seed", seed, "--output-dir", str(out)]) == 0
        read: dict[str, Any] = json.loads((out / "result.json").read_text())
        assert read.pop("arguments")["seed"] == int(seed)
        return read

    first = result("1", "a")
    assert result("1", "b") == first
    assert result("2", "c")["digest"] != first["digest"]


@pytest.mark.parametrize("method", ["sync", "dn", "poly"])
def test_methods_are_taken_by_name(method: str, simulate: list[str], tmp_path: Path) -> None:
    assert main([*simulate, "--max-steps", "12", "--method", method, "--evaluate-every", "0"]) == 0
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["version"] > 0 and not result["evaluations"]


def test_methods_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["simulate", "--list-methods"])
    assert ended.value.code == 0
    assert {"dn", "sync", "poly"} <= {line.split()[0] for line in capsys.readouterr().out.splitlines()}


def test_a_plan_is_printed_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "folder" / "plan.json"
    arguments = "plan --parameters 1e6 --speeds 2 1 --bandwidth 100 --latency 20 --local-steps 20 --codec bf16 --json"
    assert main([*arguments.split(), str(path)]) == 0
    written = json.loads(path.read_text())
    assert written["plan"]["parameters"] == 1_000_000 and written["plan"]["codec"] == "bf16"
    assert written["plan"] in written["tried"] and written["best"] in written["tried"]
    printed = capsys.readouterr().out
    assert f"utilization  {written['plan']['utilization']:.1%}" in printed
    assert printed.endswith(written["recommendation"] + "\n")


def test_a_plan_has_no_two_equal_rows(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--parameters", "1e8", "--speeds", "3", "1", "--bandwidth", "100", "--local-steps", "20"]) == 0
    table = capsys.readouterr().out.split("\n\n")[1].splitlines()[1:]
    rows = [(codec, *figures) for codec, _, *figures in map(str.split, table)]
    assert len(set(rows)) == len(rows) > 1
    assert re.fullmatch(r"10-\d+", table[0].split()[1])


def test_without_matplotlib_everything_but_the_picture_is_written(
    simulate: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "lightning_async_localsgd.simulation.picture", raising=False)
    for name in ("matplotlib", "matplotlib.axes", "matplotlib.figure", "matplotlib.ticker"):
        monkeypatch.setitem(sys.modules, name, None)
    assert main([*simulate, "--max-steps", "12", "--evaluate-every", "0"]) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"result.json", "rounds.csv", "losses.csv"}
    assert not (tmp_path / "out" / "run.png").exists()
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1].endswith("pip install matplotlib") and "run.png" not in printed[-2]


def test_settings_that_do_nothing_useful_are_told_once(simulate: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*simulate, "--max-steps", "20", "--local-steps", "30", "--evaluate-every", "0"]) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if "warning" in line.lower()]
    assert len(told) == 1 and told[0].startswith("async-localsgd: warning: `local_steps=30` are more than the 20 steps")


ROOT = Path(__file__).parents[1]


def test_what_the_docs_install_is_there() -> None:
    """No package index has this package, and an extra that is mistyped is a warning of pip that nobody reads."""
    project = (ROOT / "pyproject.toml").read_text()
    installed = []
    for page in [
        ROOT / "README.md",
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "lightning_async_localsgd").rglob("*.py"),
    ]:
        installed += re.findall(r"pip install (?:-e )?(['\"]?[^\s`]*)", page.read_text())
    assert len(installed) > 5
    for what in installed:
        assert "lightning-async-localsgd" not in what
        _, bracket, extras = what.partition("[")
        if "/" in what or what.strip("'").startswith("."):
            assert all(f"\n{extra} = [" in project for extra in extras.rstrip("]'").split(",") if bracket)


# ---- how it ends early -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_whoever_interrupts_a_run_gets_what_there_was_until_then(
    number: signal.Signals, code: int, simulate: list[str], tmp_path: Path
) -> None:
    script = tmp_path / "script.py"
    script.write_text("import runpy\nrunpy.run_module('lightning_async_localsgd', run_name='__main__')\n")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = Started(script, environment, [*simulate, "--max-steps", "1000000"])
    try:
        while "version=" not in command.output:  # the bar has shown a round
            assert command.running, command.output
            time.sleep(0.05)
        command.send_signal(number)
        command.send_signal(number)  # somebody is impatient
    finally:
        returned, printed = command.end(120)
    assert returned == code and "Traceback" not in printed
    assert "unfinished" in printed
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["finished"] is False
    assert result["total_local_steps"] >= sum(round_["local_steps"] for round_ in result["rounds"]) > 0
    assert len(rows(tmp_path / "out" / "rounds.csv")) == len(result["rounds"]) > 0
    assert (tmp_path / "out" / "run.png").stat().st_size > 0
