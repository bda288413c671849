"""The rules that keep the code simple, checked on its syntax trees."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "raygrpo"
MODULES = sorted(PACKAGE.rglob("*.py"))
NAMES = {
    path: ".".join(("raygrpo", *path.relative_to(PACKAGE).with_suffix("").parts))
    for path in MODULES
}

# Folders, and loose modules, by floor: imports fall or stay on their floor, those in functions too.
FLOORS = {
    "raygrpo.types": 0,
    "raygrpo.errors": 0,
    "raygrpo.config": 0,
    "raygrpo.models": 1,
    "raygrpo.algorithm": 1,
    "raygrpo.data": 1,
    "raygrpo.rewards": 1,
    "raygrpo.storage": 2,
    "raygrpo.weights": 2,
    "raygrpo.engines": 3,
    "raygrpo.learner": 3,
    "raygrpo.checks": 4,
    "raygrpo.actors": 4,
    "raygrpo.tracking": 5,
    "raygrpo.training": 6,
    "raygrpo.commands": 7,
    "raygrpo.cli": 8,
    "raygrpo.__main__": 8,
    "raygrpo.__init__": 8,
}
# Where a library may be imported: prefixes of module names.
CONFINED = {
    "ray": ("raygrpo.actors.",),
    "deepspeed": ("raygrpo.learner.",),
    "vllm": ("raygrpo.engines.vllm.",),
    "wandb": ("raygrpo.tracking.",),
}
# What pure code never imports, at any depth of a function.
IMPURE = {"ray", "deepspeed", "transformers", "vllm", "datasets", "os", "time", "subprocess"}


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            # `from package import module` names a module too.
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def floor_of(module: str) -> int | None:
    parts = module.split(".")
    for length in range(len(parts), 1, -1):
        if (floor := FLOORS.get(".".join(parts[:length]))) is not None:
            return floor
    return None


@pytest.mark.parametrize("path", MODULES, ids=lambda p: NAMES[p])
def test_imports_go_down_or_stay(path: Path) -> None:
    module = NAMES[path]
    floor = floor_of(module)
    assert floor is not None, f"{module} has no floor"
    for name in imports(path):
        if name.startswith("raygrpo."):
            target = floor_of(name)
            assert target is None or target <= floor, f"{module} (floor {floor}) imports {name}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: NAMES[p])
def test_libraries_stay_where_they_belong(path: Path) -> None:
    module = NAMES[path]
    for name in imports(path):
        library = name.partition(".")[0]
        if library in CONFINED:
            assert module.startswith(CONFINED[library]), f"{module} imports {library}"
        if module.startswith("raygrpo.algorithm."):
            assert library not in IMPURE, f"{module} imports {library}"


def test_no_import_cycles() -> None:
    known = {module.removesuffix(".__init__") for module in NAMES.values()}
    top_level = {
        NAMES[path]: {
            name
            for node in ast.parse(path.read_text()).body
            if isinstance(node, ast.ImportFrom) and node.module in known
            for name in [node.module]
        }
        for path in MODULES
    }
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail, module))
        if module not in done:
            for name in top_level.get(module, ()):
                visit(name, (*trail, module))
            done.add(module)

    for module in top_level:
        visit(module, ())


@pytest.mark.parametrize("path", MODULES, ids=lambda p: NAMES[p])
def test_sizes(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 400, f"{path.name} has over 400 lines"
    assert path.stem != "utils"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            length = node.end_lineno - node.lineno + 1
            assert length <= 60, f"{NAMES[path]}.{node.name} has {length} lines"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: NAMES[p])
def test_public_things_are_documented(path: Path) -> None:
    tree = ast.parse(path.read_text())
    if path.stem != "__init__":
        assert ast.get_docstring(tree), f"{path.name} has no docstring"
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{NAMES[path]}.{node.name} has no docstring"


def code_lines(path: Path) -> int:
    """Lines of code: blank lines, comments and docstrings left out."""
    tree = ast.parse(path.read_text())
    prose: set[int] = set()
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        first = body[0] if isinstance(body, list) and body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
            prose |= set(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    lines = enumerate(path.read_text().splitlines(), start=1)
    return sum(
        1
        for number, line in lines
        if number not in prose and line.strip() and not line.strip().startswith("#")
    )


# What each part may grow to, in lines of code. What is not named is the core: what decides the
# weights, from a configuration and prompts to a checkpoint.
LIMITS = {
    "recording": (
        1750,
        (
            "raygrpo.tracking.",
            "raygrpo.commands.model_card",
            "raygrpo.storage.rollouts",
            "raygrpo.actors.rollout_writer",
            "raygrpo.actors.profiling",
        ),
    ),
    "rewards": (1800, ("raygrpo.rewards.", "raygrpo.actors.reward_model")),
    "data": (850, ("raygrpo.data.",)),
    "commands": (2300, ()),
    "fast rollouts": (
        3750,
        (
            "raygrpo.engines.",
            "raygrpo.weights.",
            "raygrpo.actors.generator",
            "raygrpo.weights.publisher",
            "raygrpo.actors.weight_store",
            "raygrpo.actors.cluster.colocation",
            "raygrpo.actors.cluster.engine_probe",
        ),
    ),
    "learner": (3650, ("raygrpo.learner.", "raygrpo.algorithm.", "raygrpo.checks.memory")),
    "core": (4500, ()),
}


def part_of(path: Path) -> str:
    name = NAMES[path]
    named = (part for part, (_, prefixes) in LIMITS.items() if name.startswith(prefixes or ("-",)))
    return next(named, "commands" if (floor_of(name) or 0) >= 5 else "core")


@pytest.mark.parametrize("part", LIMITS)
def test_every_part_stays_small(part: str) -> None:
    size = sum(code_lines(path) for path in MODULES if part_of(path) == part)
    assert 0 < size <= LIMITS[part][0], f"{part} has {size} lines"


def test_configuration_stays_small() -> None:
    from raygrpo.config.file import describe_keys

    rows = describe_keys()
    assert len(rows) <= 100
    assert all(meaning for _, _, _, meaning in rows)


@pytest.mark.parametrize(
    "path", sorted((PACKAGE.parent / "examples").rglob("config*.yaml")), ids=lambda p: p.parent.name
)
def test_examples_load_and_are_short(path: Path) -> None:
    import yaml

    from raygrpo.config.file import load_config

    load_config(path)

    def leaves(tree: object) -> int:
        if isinstance(tree, dict):
            return sum(leaves(value) for value in tree.values())
        if isinstance(tree, list) and tree and isinstance(tree[0], dict):
            return sum(leaves(value) for value in tree)
        return 1

    assert leaves(yaml.safe_load(path.read_text())) <= 30


def test_the_suite_stands_alone() -> None:
    root = PACKAGE.parent
    files = [
        *MODULES,
        *root.glob("tests/**/*.py"),
        *root.glob("examples/**/*"),
        *root.glob("scripts/*"),
    ]
    for path in files:
        if path.is_file() and path != Path(__file__):
            text = path.read_text(errors="ignore")
            assert "../" + "shared" not in text, path
            assert "TODO" not in text or path.parent.name == "tests", path
