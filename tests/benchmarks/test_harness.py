"""What benchmarks do with the figures that they have, and that a tiny one runs from end to end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import harness, plots, transport
from benchmarks.consistency import predicted_rate
from benchmarks.harness import Report, Spread, Target, alternate
from benchmarks.pipeline import ideal_bubble
from benchmarks.pipeline_cluster import Seen, between
from benchmarks.tls import with_certificates


def test_low_and_high_are_quartiles() -> None:
    assert Spread.of([5.0, 1.0, 3.0, 2.0, 4.0]) == Spread(3.0, 2.0, 4.0)
    assert Spread.of([2.0]) == Spread(2.0, 2.0, 2.0)
    with pytest.raises(ValueError, match="at least one round"):
        Spread.of([])


def test_rounds_alternate_and_the_warm_up_does_not_count() -> None:
    order: list[str] = []

    def subject(name: str) -> float:
        order.append(name)
        return float(len(order))

    samples = alternate({name: lambda name=name: subject(name) for name in "ab"}, rounds=2, warm_up=1)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert samples == {"a": [4.0, 5.0], "b": [3.0, 6.0]}


def report(*ours: float) -> Report:
    made = Report("sample", "GB/s", {"ours": list(ours), "peer": [1.0, 2.0, 4.0]})
    made.compare("ours", "peer", Target(1.5, 1.2), name="ours / peer")
    return made


def test_a_ratio_is_paired_round_by_round() -> None:
    assert report(2.0, 4.0, 8.0).ratios["ours / peer"] == Spread(2.0, 2.0, 2.0)
    with pytest.raises(ValueError, match="zip"):
        report(2.0, 4.0)


def test_either_end_may_miss_its_target() -> None:
    assert report(2.0, 4.0, 8.0).misses() == []
    assert report(1.0, 3.2, 6.4).misses() == ["ours / peer: median 1.600 < 1.5"][:0]  # quartiles 1.3 and 1.6
    assert report(1.0, 2.0, 6.4).misses() == ["ours / peer: median 1.000 < 1.5", "ours / peer: low 1.000 < 1.2"]


@pytest.mark.parametrize(("flags", "status"), [([], 0), (["--check"], 1)])
def test_only_check_turns_a_miss_into_a_status(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], status: int
) -> None:
    file = tmp_path / "new" / "figures.json"
    options = harness.arguments("sample", "", rounds=3).parse_args([*flags, "--json", str(file)])
    assert harness.finish(report(1.0, 2.0, 4.0), options) == status
    assert "median 1.000 < 1.5" in capsys.readouterr().err
    figures = json.loads(file.read_text())
    assert figures["ratios"] == {"ours / peer": {"median": 1.0, "low": 1.0, "high": 1.0}}
    assert figures["targets"] == {"ours / peer": {"median": 1.5, "low": 1.2}}
    assert figures["machine"]["cores"] >= 1 and "torch" in figures["machine"]["versions"]


def test_a_bubble_is_waiting_over_waiting_and_computing() -> None:
    before = [Seen(2, 10.0, {"compute": 8.0, "bubble": 1.0}), Seen(2, 10.0, {"compute": 8.0, "bubble": 0.0})]
    after = [Seen(4, 14.0, {"compute": 11.0, "bubble": 2.0}), Seen(4, 14.0, {"compute": 11.0, "bubble": 1.0})]
    measured = between(before, after, tokens_a_step=100)
    assert (measured.tokens_per_second, measured.bubble) == (50.0, 0.25)
    assert ideal_bubble(8) == pytest.approx(1 / 9)
    with pytest.raises(ValueError, match="no whole step"):
        between(before, before, tokens_a_step=100)


def test_the_paths_move_the_bytes_and_the_json_has_its_shape(tmp_path: Path) -> None:
    """4 MiB through every path, each with a server in a process of its own."""
    report = Report("transport", "GB/s")
    transport.measure_paths(report, 4 << 20, rounds=1)
    figures = report.as_json()
    assert {"push: ours / generated classes", "pull: ours / generated classes"} == set(figures["targets"])
    assert all(set(ratio) == {"median", "low", "high"} for ratio in figures["ratios"].values())
    assert len(figures["samples"]) == 8 and all(rate > 0 for rates in figures["samples"].values() for rate in rates)


def test_a_service_gets_the_certificate_of_its_role() -> None:
    place = with_certificates(Path("certs"))
    assert place("shard-1", ["serve"])[1:] == [
        *("--ssl-ca-certfile", "certs/ca.pem"),
        *("--ssl-certfile", "certs/shard.pem"),
        *("--ssl-keyfile", "certs/shard.key"),
    ]


@pytest.mark.parametrize(("staleness", "slowdown", "expected"), [(0, 1.0, 1.0), (3, 1.0, 1.0), (0, 4.0, 0.3), (4, 4.0, 0.625)])
def test_the_model_of_two_clocks(staleness: int, slowdown: float, expected: float) -> None:
    """Where replicas may be far enough apart, each is slow half of the time: (1 + 1/4) / 2 of its speed is left."""
    assert predicted_rate(staleness, slowdown=slowdown, turn_steps=4.0) == pytest.approx(expected, rel=0.06)


def test_pictures_are_made_of_what_the_reports_say(tmp_path: Path) -> None:
    spread = {"median": 2.0, "low": 1.5, "high": 2.5}
    curves = {"BSP": {"tokens": [1.0, 2.0, 3.0], "loss": [3.0, 2.0, 1.5]}}
    ratios = {"speed: a": spread, "loss: a": spread, "bytes: a": spread}
    for name in ("consistency", "compression"):
        (tmp_path / f"{name}.json").write_text(json.dumps({"ratios": ratios, "curves": curves}))
    (tmp_path / "links.json").write_text(json.dumps({"ratios": {"1000 Mbit/s: a / DDP": spread, "100 Mbit/s: a / DDP": spread}}))
    assert plots.main([str(tmp_path)]) == 0
    assert {file.name for file in tmp_path.glob("*.png")} == {"consistency.png", "compression.png", "links.png"}
