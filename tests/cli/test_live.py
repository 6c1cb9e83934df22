"""Rows as they are followed, written and shown."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from shardlane.cli.live import LiveView, Picture, PlainView, format_seconds, sparkline
from shardlane.cli.rows import RowsFile, RowsTail, format_row
from shardlane.pb import coordinator_pb2
from shardlane.pb.tensor_pb2 import Block, PlanNumber


def row(step: int, loss: float | None = 3.0, speed: float = 1000.0, **more: Any) -> dict[str, Any]:
    return {"step": step, "loss": loss, "grad_norm": 0.9, "lr": 3e-3, "tokens": 500, "tokens_per_second": speed, **more}


def write(file: Path, *rows: dict[str, Any]) -> None:
    with file.open("a") as lines:
        lines.writelines(json.dumps(each) + "\n" for each in rows)


def test_rows_are_shown_as_the_field_writes_them() -> None:
    assert format_row(row(10, 3.1, 12345.4)) == "step: 10  loss: 3.1000  grad_norm: 0.9000  lr: 3.00e-03  tps: 12,345"
    assert format_row({"step": 10, "val_loss": 3.25}) == "step: 10  val_loss: 3.2500"
    assert format_row(row(4, None, skipped=True)).endswith("skipped: gradients not finite")
    assert format_row(row(4, 3.0, refused=True)).endswith("refused: computed from too old a version")


def test_a_tail_gives_each_whole_line_once(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    tail = RowsTail(file)
    assert tail.read() == []
    write(file, row(0), row(1))
    assert [each["step"] for each in tail.read()] == [0, 1]
    with file.open("a") as half:
        half.write('{"step": 2, ')
    assert tail.read() == []
    with file.open("a") as rest:
        rest.write('"loss": 1.0}\n')
    assert [each["step"] for each in tail.read()] == [2]
    assert RowsTail(file).read() == []  # what is there when it begins is passed over


def test_a_tail_sees_only_what_is_new_in_a_file_that_was_rewritten(tmp_path: Path) -> None:
    """As after a roll-back: the coordinator drops rows, and steps are trained again at another speed."""
    file = tmp_path / "metrics.jsonl"
    write(file, row(0))
    tail = RowsTail(file)
    write(file, row(1), row(2), row(3))
    tail.read()
    fresh = tmp_path / "metrics.tmp"
    write(fresh, row(0), row(1))
    fresh.replace(file)
    assert tail.read() == []
    write(file, row(2, speed=900.0))
    assert tail.read() == [row(2, speed=900.0)]


def test_a_rows_file_drops_what_will_be_trained_again(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    write(file, row(0), row(1), {"step": 2, "val_loss": 3.0}, row(2), {"step": 3, "val_loss": 3.0})
    rows = RowsFile(file, version=2)
    rows.append(row(2, math.nan))
    read = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(each["step"], "val_loss" in each) for each in read] == [(0, False), (1, False), (2, True), (2, False)]
    assert read[-1]["loss"] is None


def test_plain_lines_honour_the_cadence_but_show_what_matters(capsys: pytest.CaptureFixture[str]) -> None:
    view = PlainView(every_steps=10, last_step=24)
    with view:
        view.show_rows([*(row(step) for step in range(24)), {"step": 24, "val_loss": 1.0}, row(5, None, skipped=True)])
        for waiting in ("1 more shard", "1 more shard", "", "1 more shard"):
            view.show_status(coordinator_pb2.GetStatusResponse(waiting_for=waiting))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == [
        "step: 0", "step: 10", "step: 20", "step: 23", "step: 24", "step: 5",
        "waiting for 1 more shard", "waiting for 1 more shard",
    ]  # fmt: skip


def status() -> coordinator_pb2.GetStatusResponse:
    """Two stages, one replica, one shard; the second worker has gone."""
    names = {
        "worker-a": coordinator_pb2.ROLE_WORKER,
        "worker-b": coordinator_pb2.ROLE_WORKER,
        "shard-c": coordinator_pb2.ROLE_SHARD,
    }
    members = [coordinator_pb2.Member(incarnation=name, role=role) for name, role in names.items()]
    plan = coordinator_pb2.Plan(
        number=PlanNumber(term=1, epoch=2),
        members=members,
        stages=[coordinator_pb2.StageLayers(first=0, end=2), coordinator_pb2.StageLayers(first=2, end=3)],
        replicas=[coordinator_pb2.Replica(workers=[0, 1], blocks=[Block(first=0, size=4)])],
    )
    alive = [coordinator_pb2.MemberStatus(member=members[0], activity="forward"), coordinator_pb2.MemberStatus(member=members[2])]
    state = coordinator_pb2.RUN_STATE_TRAINING
    return coordinator_pb2.GetStatusResponse(
        run_id="demo-1", state=state, version=3, last_step=10, plan=plan, members=alive, chunks_by_shard=[7]
    )


def test_the_picture_shows_who_does_what_and_how_it_goes() -> None:
    picture = Picture(last_step=10)
    picture.status = status()
    for step in range(4):
        picture.take(row(step, 4.0 - step / 2))
    picture.take({"step": 4, "val_loss": 3.5})
    console = Console(width=120, force_terminal=False)
    with console.capture() as captured:
        console.print(picture)
    shown = captured.get()
    for words in (
        "demo-1  training  plan 1.2", "stage 0: layers 0-1", "stage 1: layers 2", "replica 0, lanes 0-3", "forward", "gone",
        "shard 0, 7 chunks", "2.5000", "█▆▃▁", "val_loss", "3.5000", "1,000", "4/10 steps", "3 s to go",
    ):  # fmt: skip
        assert words in shown, f"{words}\n{shown}"


def test_a_live_view_keeps_notes_and_survives_having_nothing_to_show() -> None:
    console = Console(width=80, force_terminal=True, force_interactive=True)
    with console.capture() as captured, LiveView(10, console) as view:
        view.note("read 13 documents [0.2 MB]")
        view.show_rows([row(0, None), row(1, speed=0.0)])
        view.show_status(coordinator_pb2.GetStatusResponse(state=coordinator_pb2.RUN_STATE_GATHERING, waiting_for="1 more shard"))
    assert "read 13 documents [0.2 MB]" in captured.get() and "waiting for 1 more shard" in captured.get()


def test_a_sparkline_is_as_wide_as_it_may_be_and_no_wider() -> None:
    assert sparkline([], 8) == ""
    assert sparkline([1.0], 8) == "▁"
    assert sparkline([0.0, 7.0], 8) == "▁█"
    assert sparkline([float(value) for value in range(800)], 8) == "▁▂▃▄▅▆▇█"


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (59.6, "1 min 0 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")])
def test_durations_are_for_people(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text
