"""The layout of the package: imports that run down, and the size of the module's interface."""

import ast
import importlib
import inspect
from itertools import chain
from pathlib import Path

from scsdpo.training import PolicyOptimizer

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "scsdpo"
FILES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def imports(path):
    """Modules of the package that a file imports at its top, for type checkers alone too."""
    body = ast.parse(path.read_text()).body
    inner = chain.from_iterable(block.body for block in body if isinstance(block, ast.If))
    for node in [*body, *inner]:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("scsdpo"):
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name in FILES else node.module


def circles(rooms):
    """Rooms that import themselves by way of others."""

    def reached(room, seen):
        for other in rooms.get(room, set()) - seen:
            seen.add(other)
            reached(other, seen)
        return seen

    return [room for room in rooms if room in reached(room, set())]


def test_few_files_stand_loose():
    assert len(list(PACKAGE.glob("*.py"))) <= 10


def test_no_import_runs_in_a_circle():
    """Also between rooms: what a room imports never imports the room."""
    rooms = {}
    for name, path in FILES.items():
        room = ".".join(name.split(".")[:2])
        others = {".".join(other.split(".")[:2]) for other in imports(path)} - {room, "scsdpo"}
        rooms.setdefault(room, set()).update(others)

    assert not circles(rooms)


def test_within_rollout_weights_know_no_engine_and_engines_no_server():
    """hf and vllm import weights, servers import vllm and weights; none the other way."""
    rooms = {}
    for name, path in FILES.items():
        if name.startswith("scsdpo.rollout.") and name.count(".") == 3:
            room = name.split(".")[2]
            others = {other.split(".")[2] for other in imports(path) if other.count(".") == 3}
            rooms.setdefault(room, set()).update(others & {"hf", "vllm", "servers", "weights"})
    rooms = {room: others - {room} for room, others in rooms.items()}
    assert rooms == {
        "hf": {"weights"},
        "servers": {"vllm", "weights"},
        "vllm": {"weights"},
        "weights": set(),
    }


def test_every_name_that_a_benchmark_imports_exists():
    for path in (ROOT / "benchmarks").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("scsdpo"):
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names), path


def test_the_module_takes_at_most_21_arguments_and_its_step_reads_in_14_lines():
    assert len(inspect.signature(PolicyOptimizer).parameters) <= 21
    body = inspect.getsource(PolicyOptimizer.training_step).splitlines()
    assert len(body) - 2 <= 14  # but for its first line and its docstring
