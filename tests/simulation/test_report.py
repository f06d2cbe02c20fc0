"""The files and figures of a simulated run show its result."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from matplotlib.colors import to_rgba
from matplotlib.patches import Rectangle
from PIL import Image

from lightning_async_localsgd.simulation.picture import _WAITING, draw, make_figure
from lightning_async_localsgd.simulation.report import (
    LiveTables,
    format_duration,
    format_table,
    write_csv,
    write_json,
)
from lightning_async_localsgd.simulation.result import Evaluation, SimulatedWait, SimulationResult
from tests.simulation.results import make_result


def nothing_yet(workers: int = 2) -> SimulationResult:
    """A result before the end of the first round."""
    return replace(
        make_result((1.0,) * workers),
        seconds=0.0,
        local_steps=(0,) * workers,
        version=0,
        updates=[],
        losses=[],
        evaluations=[],
        rounds=[],
        busy_seconds=(0.0,) * workers,
        mean_staleness=0.0,
        max_staleness=0,
    )


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_utilization_is_busy_time_over_available_time() -> None:
    result = make_result((2.0, 1.0), rounds=4, wait=2.5)
    assert result.utilization == pytest.approx((4 * 5 + 4 * 10) / (2 * 4 * 12.5))
    assert nothing_yet().utilization == 0


# ---- files -----------------------------------------------------------------------------------------------------------


def test_json_holds_everything_but_the_parameters(tmp_path: Path) -> None:
    result = make_result()
    write_json(result, tmp_path / "new" / "result.json", finished=True)
    read = json.loads((tmp_path / "new" / "result.json").read_text())
    assert read.pop("finished") is True
    settings = read.pop("settings")
    assert settings == {"local_steps": result.settings["local_steps"], "bandwidth": None}
    expected = result.to_json()
    assert expected.keys() >= {"digest", "version", "utilization", "total_local_steps"}
    assert "state_dict" not in expected
    assert read == {name: value for name, value in expected.items() if name != "settings"}
    assert read["updates"] == [asdict(update) for update in result.updates]


def test_json_has_no_number_that_json_does_not_know(tmp_path: Path) -> None:
    diverged = replace(make_result(), evaluations=[Evaluation(1.0, 1, 10, {"val_loss": float("nan")})])
    write_json(diverged, tmp_path / "result.json")

    def refuse(name: str) -> None:
        raise AssertionError(name)

    read = json.loads((tmp_path / "result.json").read_text(), parse_constant=refuse)
    assert read["evaluations"][0]["metrics"] == {"val_loss": None}


def test_csv_files_hold_the_entries_of_the_result(tmp_path: Path) -> None:
    result = make_result()
    write_csv(result, tmp_path)
    for name in ("rounds", "losses", "updates"):
        expected = [{key: str(value) for key, value in asdict(entry).items()} for entry in getattr(result, name)]
        assert rows(tmp_path / f"{name}.csv") == expected
    read = [
        (float(r["time"]), int(r["version"]), r["metric"], float(r["value"]))
        for r in rows(tmp_path / "evaluations.csv")
    ]
    assert read == [(e.time, e.version, name, value) for e in result.evaluations for name, value in e.metrics.items()]


def test_rows_are_in_the_files_while_the_run_goes_on(tmp_path: Path) -> None:
    result = make_result()
    tables = LiveTables(tmp_path)
    tables.add([result.rounds[0], result.losses[0]])
    assert [len(rows(tmp_path / f"{name}.csv")) for name in ("rounds", "losses", "updates")] == [1, 1, 0]
    tables.add(result.evaluations[:1])
    assert len(rows(tmp_path / "evaluations.csv")) == len(result.evaluations[0].metrics)
    tables.close()


# ---- the table -------------------------------------------------------------------------------------------------------


def test_the_table_has_a_row_per_worker_and_the_totals() -> None:
    result = make_result((2.0, 1.0), rounds=3)
    table, totals = format_table(result).split("\n\n")
    header, *workers = table.splitlines()
    assert [line.split()[:4] for line in workers] == [["0", "2", "30", "3"], ["1", "1", "30", "3"]]
    assert len({len(line) for line in (header, *workers)}) == 1
    lines = dict(line.split("  ", 1) for line in totals.splitlines())
    assert lines["virtual time"].split()[0] == format_duration(result.seconds)
    assert lines["val_loss"].split() == ["4.5", "->", f"{result.evaluations[-1].metrics['val_loss']:.4g}"]
    assert "60 together" in lines["local steps"] and lines["outer updates"].startswith("6, ")
    assert "training loss" in lines


def test_durations_are_hours_minutes_and_seconds() -> None:
    assert [format_duration(s) for s in (0, 59.6, 3_599, 100_000)] == ["0:00:00", "0:01:00", "0:59:59", "27:46:40"]


def test_there_is_a_table_before_the_first_round_has_ended() -> None:
    assert "0 together" in format_table(nothing_yet())


# ---- the picture -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("workers", "rounds"), [(1, 40), (4, 40), (64, 10)])
def test_the_picture_opens_and_has_four_axes(workers: int, rounds: int, tmp_path: Path) -> None:
    result = make_result(tuple(1 + worker % 5 / 2 for worker in range(workers)), rounds=rounds)
    draw(result, tmp_path / "new" / "run.png")
    with Image.open(tmp_path / "new" / "run.png") as picture:
        assert picture.format == "PNG" and min(picture.size) > 500
    axes = make_figure(result).axes
    assert len(axes) == 4
    assert all(each.get_xlabel() and each.get_title(loc="left") for each in axes)


def test_the_picture_shows_waiting_as_waiting() -> None:
    result = make_result((2.0, 1.0), rounds=2, wait=4.0)
    within = SimulatedWait(1, 2.0, 5.0)  # in its first round
    bars = make_figure(replace(result, waits=[*result.waits, within])).axes[2].patches
    topmost = [
        [
            bar.get_facecolor()
            for bar in bars
            if bar.get_y() < worker < bar.get_y() + bar.get_height() and covers(bar, t)
        ]
        for worker, t in ((0, 6.0), (1, 3.0), (1, 12.0), (0, 2.0), (1, 1.0))
    ]
    assert [colors[-1] == to_rgba(_WAITING) for colors in topmost] == [True, True, True, False, False]


def covers(bar: Rectangle, moment: float) -> bool:
    return bar.get_x() < moment < bar.get_x() + bar.get_width()


def test_the_picture_says_which_rounds_it_shows() -> None:
    few = make_figure(make_result((2.0, 1.0))).axes[2]
    many = make_figure(make_result((2.0, 1.0) * 10, rounds=50)).axes[2]
    assert few.get_title(loc="left").startswith("rounds, with")
    assert many.get_title(loc="left").startswith("rounds of workers 0 to 15, up to 0:01:")
    assert len(many.get_yticklabels()) == 16


def test_there_is_a_picture_before_the_first_round_has_ended(tmp_path: Path) -> None:
    draw(nothing_yet(), tmp_path / "run.png")
    assert (tmp_path / "run.png").stat().st_size > 0
