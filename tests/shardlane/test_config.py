"""Settings: where they come from, which beats which, and what a person is told when one is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from shardlane import config as configs
from shardlane.config import Config
from shardlane.errors import ConfigError
from shardlane.presets import MODEL_PRESETS
from shardlane.sections import DataConfig

RECIPES = sorted((Path(__file__).parents[2] / "configs").glob("*.toml"))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text('[model]\npreset = "tiny"\n[train]\nseed = 1\nlanes = 2\nglobal_batch_size = 16\n')
    return path


def test_the_command_line_beats_the_environment_which_beats_the_file(file: Path) -> None:
    environment = {"SHARDLANE_TRAIN__SEED": "2", "SHARDLANE_TRAIN__MAX_STEPS": "9", "PATH": "/bin"}
    config = configs.load(file, ["--train.seed", "3", "--optimizer.learning-rate=1e-3"], environment)
    assert (config.train.seed, config.train.max_steps, config.train.lanes) == (3, 9, 2)
    assert config.optimizer.learning_rate == 1e-3


def test_variables_of_services_are_not_settings(file: Path) -> None:
    assert configs.load(file, [], {"SHARDLANE_BIND": "0.0.0.0:1", "SHARDLANE_PARENT_PID": "3"}) == configs.load(file)


def test_yaml_says_the_same_as_toml(file: Path, tmp_path: Path) -> None:
    other = tmp_path / "run.yaml"
    other.write_text("model: {preset: tiny}\ntrain:\n  seed: 1\n  lanes: 2\n  global_batch_size: 16\nschedule:\n")
    assert configs.load(other) == configs.load(file)
    assert configs.load(other, ["--schedule.warmup_steps", "5"]).schedule.warmup_steps == 5  # into an empty section


def test_a_preset_fills_what_is_not_given(file: Path) -> None:
    config = configs.load(file, ["--model.num_hidden_layers", "8"])
    assert (config.model.hidden_size, config.model.num_hidden_layers) == (64, 8)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["--train.max_step", "3"], ["train.max_step", "did you mean 'max_steps'"]),
        (["--trian.seed", "3"], ["unknown key 'trian'", "did you mean 'train'"]),
        (["--train.zebra", "3"], ["train.zebra", "known here: seq_len"]),
        (["--train.seed", "x"], ["train.seed is 'x'", "integer"]),
        (["--train.seed"], ["--train.seed has no value"]),
        (["train.seed", "3"], ["'train.seed'", "--section.key value"]),
        (["--train.lanes", "3"], ["lanes is 3", "power of two"]),
        (["--train.global_batch_size", "20"], ["global_batch_size 20", "micro_batch_size x lanes"]),
        (["--train.stop_at_step", "900"], ["stop_at_step 900", "max_steps 200"]),
        (["--train.staleness_warmup_steps", "3"], ["staleness_warmup_steps is 3", "staleness 0"]),
        (["--cluster.stages", "5"], ["cluster.stages 5", "num_hidden_layers 4"]),
        (["--cluster.replicas", "4"], ["cluster.replicas 4", "train.lanes 2"]),
        (["--schedule.warmup_steps", "500"], ["warmup_steps", "max_steps 200"]),
        (["--optimizer.name", "lion"], ["optimizer.name is 'lion'", "'adamw'"]),
        (["--optimizer.learning_rate", "inf"], ["optimizer.learning_rate is 'inf'", "finite"]),
        (["--model.num_key_value_heads", "3"], ["num_key_value_heads 3"]),
        (["--train", "3"], ["train is '3'", "section"]),
        (["--run_name.x", "3"], ["run_name"]),
    ],
)
def test_a_wrong_setting_is_one_line_that_names_it(file: Path, overrides: list[str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        configs.load(file, overrides)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.toml", b"[train\n", "not valid TOML"),
        ("a.yaml", b"a: [\n", "not valid YAML"),
        ("a.yaml", b"- 1\n", "sections of keys, found a list"),
        ("a.toml", b"train = 5\n", "section of keys"),
        ("a.toml", b"\xff\xfe", "not UTF-8"),
    ],
)
def test_a_broken_file_is_one_line(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=words) as caught:
        configs.load(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_missing_file_says_where_ready_ones_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="configs/"):
        configs.load(tmp_path / "none.toml")


@pytest.mark.parametrize("path", ["", "/plain", 'quo"te\\slash', "/é/😀", "tab\tnewline\ndelete\x7f"])
def test_what_is_written_reads_back_equal(tmp_path: Path, path: str) -> None:
    config = Config(data=DataConfig(path=path)).with_changes({"optimizer.eps": 1e-12, "model.tie_word_embeddings": True})
    (tmp_path / "config.resolved.toml").write_text(configs.to_toml(config), encoding="utf-8")
    assert configs.load(tmp_path / "config.resolved.toml") == config


def test_mathematics_leaves_out_what_may_change_on_resume(file: Path) -> None:
    config = configs.load(file)
    same = {
        "train.stop_at_step": 5,
        "cluster.stages": 2,
        "cluster.shards": 3,
        "log.level": "debug",
        "data.path": "/elsewhere",
        "checkpoint.every_steps": 7,
        "pipeline.schedule": "gpipe",
        "validation.every_steps": 3,
        "numerics.determinism": "strict",
        "run_name": "other",
    }
    assert config.with_changes(same).mathematics_hash() == config.mathematics_hash()
    for change in ({"train.seed": 2}, {"optimizer.beta2": 0.9}, {"numerics.threads": 2}, {"schedule.min_ratio": 0.2}):
        assert config.with_changes(change).mathematics_hash() != config.mathematics_hash(), change


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_valid_and_warm_up_briefly(recipe: Path) -> None:
    config = configs.load(recipe)
    assert config.run_name == recipe.stem and config.model.preset in MODEL_PRESETS
    assert config.schedule.warmup_steps <= 0.05 * config.train.max_steps


def test_there_is_a_recipe_for_every_preset() -> None:
    assert {path.stem for path in RECIPES} >= MODEL_PRESETS.keys()
