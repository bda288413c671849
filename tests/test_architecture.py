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
    "raygrpo.actors": 4,
    "raygrpo.tracking": 5,
    "raygrpo.training": 6,
    "raygrpo.checks": 6,
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


def test_no_import_circles() -> None:
    """Imports inside functions count: a circle that is hidden there is still one."""
    known = {module.removesuffix(".__init__"): module for module in NAMES.values()}
    graph = {
        NAMES[path]: {known[name] for name in imports(path) if name in known} - {NAMES[path]}
        for path in MODULES
        if path.parent != PACKAGE or path.stem != "__init__"  # it hands `train` on, when asked
    }
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail, module))
        if module not in done:
            for name in sorted(graph.get(module, ())):
                visit(name, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())


# Tensors and arrays by name, and jaxtyping's wrappers that give them a shape.
TENSORS = {"Tensor", "ndarray", "IntArray", "FloatArray", "BoolArray", "Array"}
SHAPED = {"Float", "Float32", "Int", "Int32", "Bool", "Shaped"}


def bare_tensors(annotation: ast.expr) -> Iterator[str]:
    """Tensors in an annotation without a shape, as in Float[Tensor, "B T"]."""
    if isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value) in SHAPED:
        return
    name = ast.unparse(annotation).rpartition(".")[2]
    if isinstance(annotation, ast.Name | ast.Attribute) and name in TENSORS:
        yield name
    for child in ast.iter_child_nodes(annotation):
        if isinstance(child, ast.expr):
            yield from bare_tensors(child)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: NAMES[p])
def test_tensors_carry_their_shapes(path: Path) -> None:
    """Parameters, results and fields in the rooms of the mathematics."""
    if not NAMES[path].startswith(("raygrpo.algorithm.", "raygrpo.learner.", "raygrpo.models")):
        return
    for node in ast.walk(ast.parse(path.read_text())):
        found: list[ast.expr | None] = []
        if isinstance(node, ast.FunctionDef):
            every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            found = [node.returns, *(argument.annotation for argument in every)]
        elif isinstance(node, ast.ClassDef):
            found = [item.annotation for item in node.body if isinstance(item, ast.AnnAssign)]
        elif isinstance(node, ast.Module) and path.stem == "shapes":
            # Aliases for signatures, as FloatBT = Float[Tensor, "B T"].
            found = [item.value for item in node.body if isinstance(item, ast.Assign)]
        for annotation in filter(None, found):
            bare = list(bare_tensors(annotation))
            assert not bare, f"{NAMES[path]}:{annotation.lineno}: {ast.unparse(annotation)}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: NAMES[p])
def test_functions_fit_on_a_screen(path: Path) -> None:
    assert path.stem != "utils"
    for node in ast.walk(ast.parse(path.read_text())):
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


def test_every_key_is_documented() -> None:
    from raygrpo.config.describe import describe_keys

    assert all(row.meaning for row in describe_keys())


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
