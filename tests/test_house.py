"""The house checks itself: who may import whom, what no code here does, and how long a file may be. Each rule says why."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
SERVICES = ("coordinator", "ps_service", "worker_service")
SHIPPED = ("shardlane", *SERVICES, "benchmarks")

PURE, LIBRARY, CORE, WIRE, SHELL, SERVICER, TOP = range(7)
# shardlane's modules by floor; one that is not named here stands on LIBRARY. A floor imports itself and what lies below.
FLOORS = {
    **dict.fromkeys(("", "__version__", "ids", "errors", "config", "partition", "lanes", "samples", "rates", "plan"), PURE),
    **dict.fromkeys(("cadence", "tally", "turns", "ledger", "presets", "sections", "train_config", "uris", "join_token"), PURE),
    **dict.fromkeys(("pb", "wire", "rpc", "metrics", "member", "tls", "certificates", "kubernetes"), WIRE),
    **dict.fromkeys(("cli", "chaos"), TOP),
}
# Third-party packages that a floor may not import while it is below another.
FIRST_FLOOR_OF = {"torch": LIBRARY, "numpy": LIBRARY, "grpc": WIRE, "google": WIRE, "prometheus_client": WIRE}
# What makes a run impossible to replay from a seed, or a decision impossible to test without a machine.
IMPURE = {
    *("time", "datetime", "random", "secrets", "uuid", "os", "signal", "socket", "subprocess", "logging"),
    *("threading", "multiprocessing", "concurrent", "asyncio", "queue"),
}
# Validation, and nothing that computes.
THIRD_PARTY_OF_PURE = {
    "shardlane/config.py": {"pydantic", "yaml"},
    "shardlane/sections.py": {"pydantic"},
    "shardlane/train_config.py": {"pydantic"},
}

# Everything that turns bytes into code (invariant 9: nothing from the network is unpickled).
UNSAFE_MODULES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
LINES_MAX = 400
LINES_ALLOWANCE: dict[str, str] = {}  # path: why it is one thing all the same


def floor_of(module: str) -> int:
    """The floor of a module, or of a name in one, by its dotted name."""
    package, *rest = module.split(".")
    name = rest[0] if rest else ""
    if package == "shardlane":
        return FLOORS.get(name, LIBRARY)
    if package == "benchmarks":
        return TOP
    if name in ("", "core"):
        return CORE
    # service.py puts one together for __main__ and for tests that run it in their own process
    return {"servicer": SERVICER, "service": TOP, "__main__": TOP}.get(name, SHELL)


def module_of(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imports_of(path: str, tree: ast.AST) -> Iterator[str]:
    """Every module that the file imports, anywhere in it, as a dotted name; `from a import b` is a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            folder = path.split("/")[:-1]  # level 1 is the file's own folder, for an __init__ as well
            base = folder[: len(folder) - node.level + 1] if node.level else []
            yield from (".".join([*base, *([node.module] if node.module else []), alias.name]) for alias in node.names)


def import_faults(path: str, tree: ast.AST) -> list[str]:
    """What the file imports and may not, by its path alone."""
    package, floor = path.split("/")[0], floor_of(module_of(path))
    is_pure = floor in (PURE, CORE)
    faults = []
    for module in imports_of(path, tree):
        root, _, rest = module.partition(".")
        if root in SHIPPED:
            target = floor_of(module)
            if target > floor or (is_pure and target == LIBRARY):
                faults.append(f"{module} stands on floor {target}, out of reach from floor {floor}")
            if root in SERVICES and package not in (root, "benchmarks"):
                faults.append(f"{module}: services meet only in protos/, and shardlane stands below them")
            if rest.split(".")[0] == "__main__":
                faults.append(f"{module}: nobody imports a __main__")
        elif floor < FIRST_FLOOR_OF.get(root, PURE):
            faults.append(f"{module} is for floor {FIRST_FLOOR_OF[root]} and above, this file is on {floor}")
        elif is_pure and root in IMPURE:
            faults.append(f"{module} makes a pure module impure")
        elif is_pure and root not in sys.stdlib_module_names | THIRD_PARTY_OF_PURE.get(path, set()):
            faults.append(f"{module} is not of the standard library")
    return faults


def unsafe_faults(tree: ast.AST) -> list[str]:
    faults = [f"imports {module}" for module in imports_of("x/y.py", tree) if module.split(".")[0] in UNSAFE_MODULES]
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        keywords = {keyword.arg: keyword.value for keyword in node.keywords}

        def is_true(name: str, keywords: dict[str | None, ast.expr] = keywords) -> bool:
            return isinstance(value := keywords.get(name), ast.Constant) and value.value is True

        called = ast.unparse(node.func)
        if called == "torch.load" and not is_true("weights_only"):
            faults.append(f"line {node.lineno}: torch.load without weights_only=True unpickles")
        if "allow_pickle" in keywords and not (isinstance(v := keywords["allow_pickle"], ast.Constant) and v.value is False):
            faults.append(f"line {node.lineno}: allow_pickle")
        if called in ("yaml.load", "yaml.unsafe_load", "yaml.full_load", "eval", "exec"):
            faults.append(f"line {node.lineno}: {called}")
        if is_true("shell"):
            faults.append(f"line {node.lineno}: shell=True")
    return faults


def sources(*folders: str) -> dict[str, str]:
    """Python files by path, without what protoc wrote."""
    return {
        str(file.relative_to(REPOSITORY)): file.read_text(encoding="utf-8")
        for folder in folders
        for file in sorted((REPOSITORY / folder).rglob("*.py"))
        if "_pb2" not in file.name
    }


def test_imports_keep_to_the_floors() -> None:
    found = {path: faults for path, text in sources(*SHIPPED).items() if (faults := import_faults(path, ast.parse(text)))}
    assert found == {}


def test_nothing_is_unpickled_or_run_from_text() -> None:
    found = {path: faults for path, text in sources(*SHIPPED).items() if (faults := unsafe_faults(ast.parse(text)))}
    assert found == {}


def test_files_are_short() -> None:
    lengths = {path: text.count("\n") for path, text in sources(*SHIPPED, "deploy", "tests").items()}
    too_long = {path for path, length in lengths.items() if length > LINES_MAX}
    assert too_long - LINES_ALLOWANCE.keys() == set(), f"over {LINES_MAX} lines: what are the two things in it?"
    assert LINES_ALLOWANCE.keys() - too_long == set(), "no longer needs its allowance"


@pytest.mark.parametrize("package", ["coordinator", "ps_service/core", "worker_service/core"])
def test_never_loads_torch(package: str, run_python: Callable[[str], str]) -> None:
    """Not even through others: the coordinator runs on a small machine, and cores run by the thousand in the simulator."""
    modules = [module_of(path) for path in sources(package)]
    assert modules
    run_python(f"import {', '.join(modules)}, sys; assert 'torch' not in sys.modules")


def test_pure_modules_load_neither_torch_nor_numpy(run_python: Callable[[str], str]) -> None:
    modules = [f"shardlane.{name}" for name, floor in FLOORS.items() if floor == PURE and name.isalpha()]
    run_python(f"import {', '.join(modules)}, sys; assert not {{'torch', 'numpy'}} & sys.modules.keys()")


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("ps_service/core/commit.py", "import torch"),
        ("ps_service/core/commit.py", "import time"),
        ("ps_service/core/commit.py", "def f():\n    from os import environ"),
        ("ps_service/core/commit.py", "from ..servicer import Servicer"),
        ("ps_service/core/commit.py", "from shardlane import model"),
        ("ps_service/core/commit.py", "from shardlane.wire import push"),
        ("ps_service/core/commit.py", "import pydantic"),
        ("ps_service/shell.py", "from coordinator.core import membership"),
        ("shardlane/config.py", "import os"),
        ("shardlane/config.py", "import numpy as np"),
        ("shardlane/data.py", "import grpc"),
        ("shardlane/rpc.py", "import ps_service"),
        ("shardlane/cli/local.py", "from coordinator.__main__ import main"),
    ],
)
def test_a_forbidden_import_is_found(path: str, code: str) -> None:
    assert import_faults(path, ast.parse(code))


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("ps_service/core/commit.py", "import math\nfrom shardlane.ids import Step\nfrom shardlane import lanes"),
        ("ps_service/core/commit.py", "from ps_service.core import barrier\nfrom . import barrier\nfrom .barrier import Barrier"),
        ("ps_service/shell.py", "import torch\nimport time\nfrom ps_service.core import commit\nfrom shardlane import rpc"),
        ("ps_service/__main__.py", "import os\nfrom ps_service import servicer"),
        ("shardlane/config.py", "import yaml"),
    ],
)
def test_an_allowed_import_is_not(path: str, code: str) -> None:
    assert import_faults(path, ast.parse(code)) == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from pickle import loads",
        "torch.load(file)",
        "torch.load(file, weights_only=False)",
        "numpy.load(file, allow_pickle=True)",
        "yaml.load(text, Loader=L)",
        "eval(text)",
        "subprocess.run(text, shell=True)",
    ],
)
def test_unsafe_code_is_found(code: str) -> None:
    assert unsafe_faults(ast.parse(code))
