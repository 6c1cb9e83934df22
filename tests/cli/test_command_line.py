"""What a person types and reads: help that teaches, settings anywhere, mistakes in one line, and the commands on a small run."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shardlane.cli.__main__ import main
from shardlane.cli.arguments import split_overrides
from shardlane.cli.run_folder import RunFolder
from shardlane.ledger import Entry, Expected, TimelineStart, to_line
from shardlane.tally import LaneRun, Tally

TINY = Path(__file__).parents[2] / "configs" / "tiny.toml"
COMMANDS = [
    *("local", "chaos", "reference", "prepare", "status", "pause", "resume", "checkpoint", "stop", "digest", "ledger"),
    *("export", "generate", "top", "join-token", "size"),
]


def shardlane(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "shardlane.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)


def test_help_comes_without_torch_and_at_once() -> None:
    code = "import sys; from shardlane.cli.__main__ import main; main(['--help']); print({'torch', 'grpc'} & sys.modules.keys())"
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
        seconds.append(time.perf_counter() - started)
    assert done.stdout.endswith("set()\n")
    assert all(command in done.stdout for command in (*COMMANDS, "version"))
    assert min(seconds) < 1.5  # 0.25 on an idle machine


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    shown = capsys.readouterr().out
    assert "Example" in shown and f"shardlane {command} " in shown


def test_no_arguments_show_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) in (0, 2)
    assert "Commands" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["lcal"], "No such command 'lcal'"),
        (["local"], "Missing argument 'CONFIG'"),
        (["local", str(TINY)], "Missing option '--run-dir'"),
        (["local", str(TINY), "--run-dir", "{tmp}", "--stags", "2"], "No such option: --stags"),
        (["local", "none.toml", "--run-dir", "{tmp}"], "cannot read the config none.toml"),
        (["local", str(TINY), "--run-dir", "{tmp}", "--train.max_step", "3"], "did you mean 'max_steps'"),
        (["local", str(TINY), "--run-dir", "{tmp}", "--stages", "9"], "cluster.stages 9 is more than"),
        (["local", str(TINY), "--run-dir", "{tmp}", "--data.source", "/none"], "'/none' is no file or folder"),
        (["chaos", "--run-dir", "{tmp}", "--kinds", "kill,flood"], "--kinds 'flood' is none of kill, stop, half-open"),
        (["chaos", "--run-dir", "{tmp}", "--kinds", ","], "give --kinds"),
        (["chaos", "--run-dir", "{tmp}", "--pairs", "worker+worker"], "is none of worker+shard"),
        (["chaos", "--run-dir", "{tmp}", "--shards", "1", "--pairs", "shard+backup"], "needs a backup"),
        (["chaos", "--run-dir", "{tmp}", "--faults", "0"], "Input should be greater than or equal to 1"),
        (["chaos", "none.toml", "--run-dir", "{tmp}"], "cannot read the config none.toml"),
        (["chaos", str(TINY), "--run-dir", "{tmp}", "--replicas", "8"], "8 is more than"),
        (["reference", str(TINY), "--run-dir", "{tmp}", "--train.lanes=3"], "power of two"),
        (["prepare", str(TINY)], "give --run-dir, or --out"),
        (["digest", "{tmp}"], "is no run's folder"),
        (["ledger", "{tmp}"], "is no run's folder"),
        (["export", "{tmp}", "--out", "{tmp}/out"], "is no run's folder"),
        (["generate", "{tmp}", "--prompt", "a"], "is no run's folder"),
        (["status", "nowhere"], "neither a run's folder nor host:port"),
        (["status", "127.0.0.1:1"], "does not answer"),
        (["top", "127.0.0.1:1", "--once"], "does not answer"),
        (["top", "{tmp}"], "no coordinator serves"),
        (["pause", "{tmp}"], "the run is not running"),
        (["join-token", "--secret", "{tmp}/none"], "cannot read the secret"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(arguments: list[str], words: str, tmp_path: Path) -> None:
    done = shardlane(*(each.replace("{tmp}", str(tmp_path)) for each in arguments))
    assert done.returncode == 2, done
    assert done.stderr.startswith("shardlane: ") and done.stderr.count("\n") == 1 and words in done.stderr, done.stderr


def test_settings_may_stand_anywhere() -> None:
    arguments = ["--train.seed", "3", "a.toml", "--run-dir", "runs/a", "--model.preset=tiny", "--run_name", "x", "--stages", "2"]
    own, overrides = split_overrides(arguments)
    assert own == ["a.toml", "--run-dir", "runs/a", "--stages", "2"]
    assert overrides == ["--train.seed", "3", "--model.preset=tiny", "--run_name", "x"]
    assert split_overrides(["--train.seed"]) == ([], ["--train.seed"])  # the config says that its value is missing
    assert split_overrides(["--optimizer.learning_rate", "-1"])[1] == ["--optimizer.learning_rate", "-1"]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reference run of four steps."""
    folder = tmp_path_factory.mktemp("runs") / "one"
    done = shardlane("reference", str(TINY), "--run-dir", str(folder), "--train.max_steps", "4", "--checkpoint.every_steps", "2")
    assert done.returncode == 0, done.stderr
    assert "step: 3  loss: " in done.stdout and "step: 4  val_loss: " in done.stdout
    assert f"checkpoint  {folder}/checkpoints/step-00000004" in done.stdout
    return folder


def test_reference_leaves_a_whole_run_folder(run_dir: Path) -> None:
    assert {"config.resolved.toml", "metrics.jsonl", "checkpoints", "logs", "data"} <= {path.name for path in run_dir.iterdir()}
    config = RunFolder(run_dir).config()
    assert Path(config.data.path) == run_dir / "data" and config.train.max_steps == 4


def test_digest_prints_the_hash_then_the_step(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed = {}
    for arguments in ([], ["--step", "2"], ["--step", "4"]):
        assert main(["digest", str(run_dir), *arguments]) == 0
        digest, step = capsys.readouterr().out.split()
        assert len(digest) == 64
        printed[(*arguments,)] = (digest, step)
    assert printed[()] == printed[("--step", "4")] != printed[("--step", "2")]
    assert main(["digest", str(run_dir), "--step", "3"]) == 2
    assert "no checkpoint of step 3; there are 2, 4" in capsys.readouterr().err


def test_ledger_proves_a_run_or_says_what_is_wrong(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ledger", str(run_dir)]) == 2
    assert "cannot read" in (said := capsys.readouterr().err) and "a cluster keeps a ledger" in said and said.count("\n") == 1
    folder = RunFolder(tmp_path)
    config = RunFolder(run_dir).config().with_changes({"checkpoint.path": str(run_dir / "checkpoints")})
    folder.write_config(config)
    expects = Expected.of(config)
    once = Tally(expects.tables, (LaneRun(0, 4, 1, 1),))

    def begin(timeline: int, version: int) -> bytes:
        return to_line(TimelineStart(timeline, version, 0, "why", expects))

    def entries(timeline: int, *steps: int, tally: Tally = once) -> bytes:
        return b"".join(to_line(Entry(step, timeline, expects.tokens, tally)) for step in steps)

    def judged(*lines: bytes) -> tuple[int, str]:
        folder.ledger_file.write_bytes(b"".join(lines))
        return main(["ledger", str(tmp_path)]), capsys.readouterr().out

    assert judged(begin(0, 4)) == (2, ""), "no step yet"
    status, said = judged(begin(0, 0), entries(0, 0, 1, 2), begin(1, 2), entries(1, 2, 3))
    assert status == 0 and said.startswith(
        "4 steps, 32 micro-batches of 4 lanes: each counted exactly once in all 77 tables; "
        "1 entry superseded by 1 roll-back (timeline 1 began at version 2); "
    )
    assert main(["ledger", str(tmp_path), "--json"]) == 0
    account = json.loads(capsys.readouterr().out)
    assert (account["num_steps"], account["faults"]) == (4, [])
    assert account["roll_backs"] == [{"timeline": 1, "version": 2, "num_superseded": 1, "reason": "why"}]
    twice = Tally(expects.tables, (LaneRun(0, 2, 1, 1), LaneRun(2, 1, 1, 2), LaneRun(3, 1, 1, 1)))
    status, said = judged(begin(0, 0), entries(0, 0, 1), entries(0, 2, tally=twice))
    wrong = "step 2, lane 2 (micro-batches 4..5): counted 2 times in a table; 1 more, see --json\n"
    assert (status, said) == (1, wrong), "and the checkpoint of step 4 is further than the ledger"


def test_generate_goes_on_from_the_prompt_and_a_seed_repeats_it(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for seed in ("1", "1", "2"):
        assert main(["generate", str(run_dir), "--prompt", "def ", "--num-tokens", "8", "--seed", seed]) == 0
        texts.append(capsys.readouterr().out)
    assert all(text.startswith("def ") for text in texts)
    assert texts[0] == texts[1] != texts[2]


def test_export_writes_what_hugging_face_loads_and_never_over_it(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "export"
    assert main(["export", str(run_dir), "--out", str(out)]) == 0
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in out.iterdir()}
    assert main(["export", str(run_dir), "--out", str(out)]) == 2
    assert "already exists" in capsys.readouterr().err


def test_a_finished_run_says_so(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("local", "reference"):
        resolved = str(run_dir / "config.resolved.toml")
        assert main([command, resolved, "--run-dir", str(run_dir)]) == 0
        assert f"{run_dir} is finished" in capsys.readouterr().out
    assert main(["status", str(run_dir)]) == 0
    assert "is not running" in (shown := capsys.readouterr().out) and "4 of 4" in shown


def test_a_run_is_taken_up_where_it_stopped_and_has_each_row_once(run_dir: Path, tmp_path: Path) -> None:
    shared = [str(run_dir / "config.resolved.toml"), "--run-dir", str(tmp_path), "--checkpoint.every_steps", "0"]
    for stop in ("3", "0"):
        done = shardlane("reference", *shared, "--train.stop_at_step", stop)
        assert done.returncode == 0, done.stderr
    assert "goes on from" in done.stdout
    assert shardlane("digest", str(tmp_path)).stdout == shardlane("digest", str(run_dir)).stdout
    timeless = [
        [line.split(', "tokens_per_second"')[0] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (tmp_path, run_dir)
    ]
    assert timeless[0] == timeless[1]


def test_changed_mathematics_are_refused_and_nothing_is_harmed(run_dir: Path) -> None:
    before = (run_dir / "config.resolved.toml").read_text(), (run_dir / "metrics.jsonl").read_text()
    for command in ("local", "reference"):
        done = shardlane(command, str(run_dir / "config.resolved.toml"), "--run-dir", str(run_dir), "--train.seed", "7")
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1 and "train.seed was 1234 and is now 7" in done.stderr, done.stderr
    assert before == ((run_dir / "config.resolved.toml").read_text(), (run_dir / "metrics.jsonl").read_text())
    assert not list(run_dir.glob("*proposed*"))


def test_two_trainers_do_not_share_a_folder(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunFolder(run_dir).lock():
        assert main(["reference", str(TINY), "--run-dir", str(run_dir)]) == 2
    assert "another shardlane trains in" in capsys.readouterr().err
