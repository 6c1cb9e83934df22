"""`shardlane top` and `status`: what a terminal shows."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shardlane.cli.__main__ import main
from shardlane.cli.screen import Paint, lines_of
from shardlane.pb import coordinator_pb2
from tests.cli.test_live import status as small_status
from tests.coordinator.test_service import NAMES, cluster

COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def status() -> coordinator_pb2.GetStatusResponse:
    """The second worker has gone; the shard is silent; a spare says something that is no text."""
    made = small_status()
    made.newest.loss, made.newest.tokens, made.tokens_per_second = 2.5, 500, 1000.0
    made.goodput, made.consistency, made.staleness, made.clock_spread_steps = 0.915, "ssp", 2, 1
    made.under_replicated_chunks, made.newest_checkpoint, made.validation_loss = 7, 2, 3.5
    made.holdings.add(primary=7, backup=3, learner=2)
    made.members[1].lease_age_seconds = 7.4
    spare = made.members.add(activity="\x1b[2Jgone\nwild" + "x" * 100)
    spare.member.incarnation, spare.member.role = "worker-spare", coordinator_pb2.ROLE_WORKER
    for step in range(200):
        made.losses.add(step=step, loss=8.0 - step / 40)
    made.events.add(unix_seconds=0.0, text="worker-b is dead: nobody listens at 10.0.0.1:7070, " + "long " * 30, is_warning=True)
    return made


@pytest.mark.parametrize("width", [40, 80, 133])
@pytest.mark.parametrize("is_coloured", [False, True])
def test_no_line_is_wider_than_the_terminal(width: int, is_coloured: bool) -> None:
    lines = lines_of(status(), width=width, paint=Paint(is_coloured))
    bare = [COLOURS.sub("", line) for line in lines]
    assert [line for line in bare if len(line) > width] == []
    assert [line for line in bare if not line.isprintable()] == [], "what members say moves no cursor"
    assert is_coloured == ("\x1b[" in "".join(lines))


def test_eighty_columns_show_who_does_what() -> None:
    shown = "\n".join(lines_of(status(), width=80, paint=Paint(False)))
    for words in (
        "demo-1  training  plan 1.2", "] 3/10 steps  4 s to go", "loss 2.5000  █", "goodput 91.5 %", "val_loss 3.5000",
        "clocks within 1 steps (ssp, staleness 2)", "7 chunks lack a copy", "replica 0, lanes 0-3", "stage 0, layers 0-1",
        "forward  worker-a", "gone", "spare", "shard 0, 7 primary 3 backup +2 filling", "silent for 7 s", "worker-b is dead",
    ):  # fmt: skip
        assert words in shown, f"{words}\n{shown}"


def test_before_anything_is_known_there_is_something_to_show() -> None:
    empty = coordinator_pb2.GetStatusResponse(state=coordinator_pb2.RUN_STATE_GATHERING, waiting_for="1 more shard")
    shown = "\n".join(lines_of(empty, width=80, paint=Paint(False)))
    assert "gathering" in shown and "waiting for 1 more shard" in shown and "loss" not in shown


def test_once_prints_plain_text_and_ends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with cluster(tmp_path) as run:
        run.register(*NAMES)
        run.beat("shard 1", 0, 1)
        for command in (["top", "--once"], ["top"], ["status"]):
            assert main([command[0], run.service.address, *command[1:]]) == 0
            shown = capsys.readouterr().out
            assert "2/4 steps" in shown and "\x1b" not in shown and "joined from worker2.local" in shown
    assert main(["top", run.service.address, "--once"]) == 2
    assert "does not answer" in capsys.readouterr().err


def test_on_a_terminal_it_goes_on_also_while_nobody_answers(tmp_path: Path) -> None:
    """A real one: figures move, a lost coordinator is said, and Ctrl-C gives the screen back."""
    ours, theirs = pty.openpty()
    seen = ""

    def see(words: str) -> None:
        nonlocal seen
        end = time.monotonic() + 60
        while words not in seen:
            assert time.monotonic() < end, seen[-3000:]
            seen += os.read(ours, 1 << 16).decode(errors="replace")
        seen = seen[seen.index(words) + len(words) :]

    with cluster(tmp_path) as run:
        run.register(*NAMES)
        run.beat("shard 1", 0)
        command = [sys.executable, "-m", "shardlane.cli", "top", run.service.address, "--interval", "0.2"]
        process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
        os.close(theirs)
        try:
            see("\x1b[?1049h")
            see("1/4 steps")
            run.beat("shard 1", 1)
            see("2/4 steps")
            run.stop()
            see("the coordinator does not answer")
            see("2/4 steps")
            process.send_signal(2)
            see("\x1b[?1049l")
            assert process.wait(30) == 0
        finally:
            process.kill()
            process.wait()
            os.close(ours)
