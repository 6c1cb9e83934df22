"""What the documents name is there: commands with their flags, settings, files, headings."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import io
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main

from shardlane.cli.__main__ import app
from shardlane.cli.arguments import ConfigCommand
from shardlane.config import Config
from shardlane.sections import Section

REPOSITORY = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted(
    file.relative_to(REPOSITORY).as_posix() for file in [*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/**/*.md")]
)
SERVICES = ("coordinator", "ps_service", "worker_service")
BETWEEN_COMMANDS = {";", "&&", "||", "|", "&"}
NAMES = r"[a-z][a-z0-9_]*"
SUFFIXES = {"json", "jsonl", "md", "py", "toml", "yaml", "yml"}  # `pipeline.json` is a file


# ---- reading -------------------------------------------------------------------------------------------------------------


def code_in(text: str) -> Iterator[str]:
    """Of blocks each line, continued ones joined; and what stands between backticks, `\\|` of a table as `|`."""
    text = re.sub(r"\\\n\s*", " ", text)
    for block in re.findall(r"^```[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        yield from block.splitlines()
    rest = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    yield from (line.strip() for line in rest.splitlines() if line.startswith("    "))
    prose = "\n".join(line for line in rest.splitlines() if not line.startswith("    "))
    yield from (" ".join(each.split()).replace(r"\|", "|") for each in re.findall(r"`([^`]+)`", prose))


def commands_in(code: str) -> Iterator[list[str]]:
    """The words of each command of a line."""
    try:
        words = shlex.split(code.replace(";", " ; "), comments=True)
    except ValueError:  # half a quotation
        words = code.split()
    command: list[str] = []
    for word in [*words, ";"]:
        if word not in BETWEEN_COMMANDS:
            command.append(word)
        elif command:
            yield command
            command = []


def arguments_in(command: list[str]) -> tuple[str, list[str]] | None:
    """Of `shardlane …`, `python -m MODULE …` and a container's `shardlane.cli …`: (what runs, its arguments)."""
    words = [word.strip("[]") for word in command]
    if words[0] in ("shardlane", ".venv/bin/shardlane"):
        return "shardlane", words[1:]
    if "shardlane.cli" in words:
        return "shardlane", words[words.index("shardlane.cli") + 1 :]
    if words[:2] == ["python", "-m"] and len(words) > 2:
        return words[2], words[3:]
    return None


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


# ---- what there is -------------------------------------------------------------------------------------------------------


@functools.cache
def options() -> dict[str, set[str]]:
    """Of each command of `shardlane`."""
    group = typer.main.get_command(app)
    return {
        name: {"--help", *(flag for each in command.params for flag in (*each.opts, *each.secondary_opts))}
        for name, command in group.commands.items()  # type: ignore[attr-defined]  # of click's groups
    }


@functools.cache
def takes_settings(command: str) -> bool:
    return isinstance(typer.main.get_command(app).commands[command], ConfigCommand)  # type: ignore[attr-defined]


@functools.cache
def flags_of(service: str) -> set[str]:
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.suppress(SystemExit):
        importlib.import_module(f"{service}.__main__").parser({}).parse(["--help"], required=())
    return set(re.findall(r"--[a-z-]+", said.getvalue()))


def settings() -> dict[str, set[str]]:
    """Keys by section."""
    sections = {name: field.annotation for name, field in Config.model_fields.items()}
    return {
        name: set(each.model_fields) for name, each in sections.items() if isinstance(each, type) and issubclass(each, Section)
    }


# ---- faults --------------------------------------------------------------------------------------------------------------


def command_faults(text: str) -> Iterator[str]:
    for code in code_in(text):
        for command in commands_in(code):
            if found := arguments_in(command):
                yield from (f"{code!r}: {fault}" for fault in _faults_of(*found))


def _faults_of(program: str, arguments: list[str]) -> Iterator[str]:
    flags = [word.partition("=")[0] for word in arguments if word.startswith("--")]
    if program in SERVICES:
        known = flags_of(program)
        yield from (f"{program} has no {flag}" for flag in flags if flag not in known and not _is_setting(flag, program))
    elif program != "shardlane":
        if importlib.util.find_spec(program) is None:
            yield f"there is no module {program}"
    elif arguments and not arguments[0].startswith("-") and not arguments[0].isupper():
        for name in arguments[0].split("|"):
            if name not in options():
                yield f"there is no command {name}"
                continue
            known = options()[name]
            yield from (f"{name} has no {flag}" for flag in flags if flag not in known and not _is_setting(flag, name))


def _is_setting(flag: str, program: str) -> bool:
    """Those of sections are judged by `setting_faults`."""
    takes = program == "coordinator" or (program in options() and takes_settings(program))
    return takes and re.fullmatch(rf"--{NAMES}\.{NAMES}", flag) is not None


def setting_faults(text: str) -> Iterator[str]:
    """`section.key`, `--section.key`, `SHARDLANE_SECTION__KEY`."""
    known = settings()
    for code in code_in(text):
        for section, key in re.findall(rf"(?<![\w./:@-])(?:--)?({NAMES})\.({NAMES})(?![\w/(-]|\.\w)", code):
            if key not in known.get(section, {key}) | SUFFIXES:
                yield f"{code!r}: [{section}] has no {key}"
        for section, key in re.findall(r"SHARDLANE_([A-Z]+)__([A-Z_]+)", code):
            if key.lower() not in known.get(section.lower(), ()):
                yield f"{code!r}: there is no setting {section.lower()}.{key.lower()}"
        for flag in re.findall(rf"--({NAMES})\.{NAMES}", code):
            if flag not in known:
                yield f"{code!r}: there is no section {flag}"


def link_faults(document: Path, text: str) -> Iterator[str]:
    prose = re.sub(r"`[^`]*`", "", text)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        file = (document.parent / path).resolve() if path else document
        if not file.exists() or not file.is_relative_to(REPOSITORY):
            yield f"{target}: there is no such file"
        elif anchor and anchor not in {slug(each) for each in re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.M)}:
            yield f"{target}: there is no such heading"


# ---- the tests -----------------------------------------------------------------------------------------------------------


@pytest.fixture(params=DOCUMENTS)
def document(request: pytest.FixtureRequest) -> Path:
    return REPOSITORY / str(request.param)


def test_every_command_flag_setting_and_link_is_there(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    assert [*command_faults(text), *setting_faults(text), *link_faults(document, text)] == []


def test_every_command_is_in_a_document_and_so_is_every_document() -> None:
    texts = {name: (REPOSITORY / name).read_text(encoding="utf-8") for name in DOCUMENTS}
    found = [arguments_in(command) for text in texts.values() for code in code_in(text) for command in commands_in(code)]
    named = {name for each in found if each and each[0] == "shardlane" and each[1] for name in each[1][0].split("|")}
    assert options().keys() <= named
    linked = {
        (REPOSITORY / name).parent.joinpath(target).resolve()
        for name, text in texts.items()
        for target in re.findall(r"\]\(([^)#\s]+)", text)
    }
    assert {REPOSITORY / name for name in DOCUMENTS} - {REPOSITORY / "README.md"} <= linked


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("Say `shardlane lokal configs/tiny.toml`.", "there is no command lokal"),
        ("| `shardlane status\\|topp RUN` |", "there is no command topp"),
        ("Now:\n\n    shardlane digest runs/a; shardlane digest runs/b --steps 3\n", "digest has no --steps"),
        ("Now:\n\n    shardlane local a.toml \\\n      --run-dirs runs/a\n", "local has no --run-dirs"),
        ("```\nshardlane chaos [CONFIG] [--fault N] # --seconds\n```\n", "chaos has no --fault"),
        ("`docker compose run --rm prepare shardlane.cli status coordinator:7070 --cert x`", "status has no --cert"),
        ("`python -m ps_service --coordinator A:1 --port 3`", "ps_service has no --port"),
        ("`python -m ps_service --coordinator A:1 --train.max_steps 3`", "ps_service has no --train.max_steps"),
        ("`python -m benchmarks.link`", "there is no module benchmarks.link"),
        ("`shardlane digest runs/a --train.max_steps 3`", "digest has no --train.max_steps"),
        ("`train.stalenes` or `train.staleness`", "[train] has no stalenes"),
        ("`shardlane local a.toml --run-dir b --cluster.stage 3`", "[cluster] has no stage"),
        ("`--clusters.stages 3`", "there is no section clusters"),
        ("`SHARDLANE_CLUSTER__STAGE=3`", "there is no setting cluster.stage"),
        ("[it](nowhere.md)", "nowhere.md: there is no such file"),
        ("[it](runbook.md#nothing)", "runbook.md#nothing: there is no such heading"),
    ],
)
def test_what_is_not_there_is_found(text: str, fault: str) -> None:
    [found] = [*command_faults(text), *setting_faults(text), *link_faults(REPOSITORY / "docs/operations.md", text)]
    assert found.endswith(fault)
