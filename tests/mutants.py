"""Breaks the algorithm on purpose, one expression at a time, and sees whether the tests notice.

    python -m tests.mutants                  # the chosen mutants of every module
    python -m tests.mutants --quick          # a handful
    python -m tests.mutants --all [WORDS...] # every mutant whose name holds all the words

Mutants come from the syntax tree: another operator, sign, bound, index or branch; a clamp, detach
or mask dropped. The tests named below run on a copy of the code with one mutant, in a process that
was forked with all but the project imported. A mutant that no test fails on is printed and makes
the exit code 1. `EQUIVALENT` names the mutants that no test can notice.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import hashlib
import io
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[1]
_LOSS = ("algorithm/test_loss.py",)
_LEARNER = (
    "parity/test_learner_losses.py",
    "parity/test_learner.py::test_old_logprobs_and_the_reference_follow_the_rules",
    "parity/test_learner.py::test_nan_is_skipped_within_a_budget",
    "parity/test_learner.py::test_skip_advances_only_the_counter",
    "parity/test_learner.py::test_a_minibatch_without_rows_counts_but_moves_nothing",
    "parity/test_learner.py::test_a_parameter_that_the_models_code_freezes_is_refused",
)
# The tests of each module, and how many of its mutants are chosen.
MODULES: dict[str, tuple[int, tuple[str, ...]]] = {
    "algorithm/surrogates": (24, _LOSS),
    "algorithm/corrections": (10, _LOSS),
    "algorithm/loss": (18, (*_LOSS, "parity/test_logprobs.py")),
    "algorithm/entropy": (6, ("algorithm/test_entropy.py",)),
    "algorithm/advantages": (14, ("algorithm/test_advantages.py",)),
    "algorithm/overlong": (3, ("algorithm/test_advantages.py",)),
    "algorithm/step_plan": (8, ("algorithm/test_advantages.py", "algorithm/test_packing.py")),
    "algorithm/packing": (16, ("algorithm/test_packing.py",)),
    "algorithm/logprobs": (16, ("parity/test_logprobs.py",)),
    "learner/first_pass": (5, _LEARNER),
    "learner/base": (6, _LEARNER),
}
QUICK = ("algorithm/surrogates", "algorithm/loss", "algorithm/advantages", "algorithm/packing")
# Functions without a result that a test could compare: messages, files, parts of other tests.
SKIPPED = {
    "__post_init__",
    "save",
    "load",
    "_start_watch",
    "persistent_buffers",
    "chunk_tokens_for",
}
# Tests that take long run after the others of their file.
LAST = ("test_value_and_gradient_equal_the_oracle", "test_split_order_and_layout_do_not_matter")
# Mutants that the tests above cannot notice, by name, with the reason.
EQUIVALENT = {
    "algorithm/surrogates stat: values.detach() -> values.clone() (dropped)": (
        "the result is floats; without detach there would only be a graph for nothing"
    ),
    "algorithm/surrogates sequence_stat: values.detach() -> values.clone() (dropped) #2": (
        "the same"
    ),
    "algorithm/loss gradient: logprobs.detach() -> logprobs.clone() (dropped) #2": (
        "the head calls it with tensors that have no graph"
    ),
    "algorithm/loss _loss_and_stats: _trained(inputs.ref_logprobs, mask) -> "
    "_trained(inputs.ref_logprobs, torch.ones_like(mask)) (mask dropped)": (
        "the loss and the policy's logprobs pass through where() with the mask, too"
    ),
    "algorithm/advantages _centre: scored.sum(1, keepdim=True).clamp(min=1) -> "
    "scored.sum(1, keepdim=True).clone() (dropped)": (
        "a group without scores has no usable advantage"
    ),
    "algorithm/advantages batch_normalised: values - mean -> values + mean (operator) #2": (
        "normalised sums have a mean of 0 in every group"
    ),
    "algorithm/packing _assign: (loads + weights[index]).max(1) -> "
    "(loads + weights[index]).min(1) (other)": "swaps mend any first assignment",
    "learner/first_pass first_pass: torch.zeros(0) -> torch.ones(0) (other)": "both are empty",
    "learner/base _finish: lr and self._watch is not None -> lr or self._watch is not None "
    "(operator)": "there is always a watch, and it counts no update at a rate of 0",
    "learner/base update: self.rank % self._sequence_ranks -> self.rank * self._sequence_ranks "
    "(operator)": "needs several ranks: parity/test_memory_modes.py",
    "learner/base data_share: self.config.learner.num_ranks // size -> "
    "self.config.learner.num_ranks * size (operator)": "the same",
    "learner/base data_share: self.rank // size -> self.rank * size (operator)": "the same",
    "algorithm/advantages _centre: (count - 1).clamp(min=1) -> (count - 1).clone() (dropped)": (
        "a group with one score has no usable advantage"
    ),
}
# Modules that tests import beside the project, so that they are imported once.
PRELOADED = (
    "pytest",
    "hypothesis",
    "torch",
    "pydantic",
    "transformers.models.auto.modeling_auto",
    "transformers.models.gemma3.modeling_gemma3",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen2.modeling_qwen2",
)
# Of a process; the tests of a module take at most half of it.
MAX_CPU_S = 30
# A counter-example is enough; to make it small would take longer than all the rest.
PROFILE = """
from hypothesis import Phase, settings
settings.register_profile(
    "mutants", phases=[Phase.explicit, Phase.generate], derandomize=True, deadline=None
)
settings.load_profile("mutants")
"""

_OTHER: dict[type[ast.AST], type[Any]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
    ast.And: ast.Or, ast.Or: ast.And, ast.Lt: ast.GtE, ast.GtE: ast.Lt, ast.Gt: ast.LtE,
    ast.LtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip
_SWAPPED = {"minimum": "maximum", "maximum": "minimum", "amax": "amin", "argmin": "argmax",
            "min": "max", "max": "min", "zeros": "ones", "ones": "zeros"}  # fmt: skip
_DROPPED = {"clamp", "detach", "float", "double", "square", "exp", "log", "abs"}
_MASKS = {"mask", "scored", "usable", "there", "counted"}


@dataclass(frozen=True)
class Mutant:
    """One expression of a module that becomes another; ``source`` is the whole module with it."""

    module: str
    function: str
    change: str
    source: str

    @property
    def name(self) -> str:
        """For people, and for `EQUIVALENT`."""
        return f"{self.module} {self.function}: {self.change}"


def mutants_of(module: str, source: str) -> list[Mutant]:
    """All mutants of a module, in the order of its expressions."""
    tree = ast.parse(source)
    found: list[Mutant] = []
    seen: dict[str, int] = {}
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef) or function.name in SKIPPED:
            continue
        for node in _expressions(function):
            for change, state in _changes(node):
                before = ast.unparse(node)
                saved = dict(node.__dict__)
                node.__dict__.update(state)
                text = f"{before} -> {ast.unparse(node)} ({change})"
                mutated = ast.unparse(tree)
                node.__dict__.clear()
                node.__dict__.update(saved)
                number = seen[text] = seen.get(text, 0) + 1
                text += f" #{number}" if number > 1 else ""
                found.append(Mutant(module, function.name, text, mutated))
    return found


def _expressions(function: ast.FunctionDef) -> Iterator[ast.AST]:
    """The nodes of a function's body, without annotations, errors and inner functions."""
    waiting: list[ast.AST] = list(reversed(function.body))
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Raise | ast.FunctionDef | ast.JoinedStr):
            continue
        yield node
        children = list(ast.iter_child_nodes(node))
        if isinstance(node, ast.AnnAssign):
            children = [node.value] if node.value else []
        waiting += reversed(children)


def _changes(node: ast.AST) -> Iterator[tuple[str, dict[str, Any]]]:
    """The ways to break a node: a name, and the attributes that it gets."""
    if isinstance(node, ast.BinOp | ast.BoolOp | ast.AugAssign) and type(node.op) in _OTHER:
        yield "operator", {"op": _OTHER[type(node.op)]()}
        # An index or a count that is off by one.
        right = getattr(node, "right", None)
        if isinstance(right, ast.Constant) and right.value == 1:
            yield "off by one", {"right": ast.Constant(0)}
    elif isinstance(node, ast.UnaryOp) and not isinstance(node.operand, ast.Constant):
        if isinstance(node.op, ast.USub):
            yield "sign", {"op": ast.UAdd()}
        else:
            yield "sign", {"operand": ast.UnaryOp(node.op, node.operand)}
    elif isinstance(node, ast.Compare) and type(node.ops[0]) in _OTHER:
        yield "bound", {"ops": [_OTHER[type(node.ops[0])](), *node.ops[1:]]}
    elif isinstance(node, ast.IfExp):
        yield "branch", {"body": node.orelse, "orelse": node.body}
    elif isinstance(node, ast.Call):
        yield from _call_changes(node)


def _call_changes(node: ast.Call) -> Iterator[tuple[str, dict[str, Any]]]:
    for index, argument in enumerate(node.args):
        if isinstance(argument, ast.Name) and argument.id in _MASKS:
            everything = ast.parse(f"torch.ones_like({argument.id})", mode="eval").body
            args = [*node.args[:index], everything, *node.args[index + 1 :]]
            yield "mask dropped", {"args": args}
    for keyword in node.keywords:
        if keyword.arg == "ddof" and isinstance(keyword.value, ast.Constant):
            other = copy.copy(keyword)
            other.value = ast.Constant(1 - keyword.value.value)
            yield "off by one", {"keywords": [other if k is keyword else k for k in node.keywords]}
    if not isinstance(node.func, ast.Attribute):
        return
    name, receiver = node.func.attr, node.func.value
    if name == "where" and len(node.args) == 3:
        yield "branch", {"args": [node.args[0], node.args[2], node.args[1]]}
    elif name in _SWAPPED:
        yield "other", {"func": ast.Attribute(receiver, _SWAPPED[name], ast.Load())}
    elif name in _DROPPED and not (isinstance(receiver, ast.Name) and receiver.id == "torch"):
        # x.clone() has x's values and a gradient.
        yield (
            "dropped",
            {"func": ast.Attribute(receiver, "clone", ast.Load()), "args": [], "keywords": []},
        )


def all_mutants() -> list[Mutant]:
    """Those of every module."""
    return [
        mutant
        for module in MODULES
        for mutant in mutants_of(module, (REPOSITORY / "raygrpo" / f"{module}.py").read_text())
    ]


def chosen_mutants(*, quick: bool = False) -> list[Mutant]:
    """As many of each module as `MODULES` says, drawn by a hash of their names.

    Args:
        quick: one of each module in `QUICK`.
    """
    found = [mutant for mutant in all_mutants() if mutant.name not in EQUIVALENT]
    found.sort(key=lambda mutant: hashlib.sha256(mutant.name.encode()).digest())
    chosen = []
    for module, (count, _) in MODULES.items():
        mine = [mutant for mutant in found if mutant.module == module]
        chosen += mine[: int(module in QUICK) if quick else count]
    return chosen


class _Failures:
    """A pytest plugin: quick tests first, and the names of the failures."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items.sort(
            key=lambda item: LAST.index(item.originalname) if item.originalname in LAST else -1
        )

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.found.append(report.nodeid)


def first_failure(mutant: Mutant | None, tests: Sequence[str]) -> tuple[str, float]:
    """The first of the tests to fail on a copy with this mutant, or "", and the seconds it took.

    For a process of its own, which imports the project from the copy.

    Raises:
        ValueError: the tests do not run at all.
    """
    import pytest

    start = time.perf_counter()
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    sys.dont_write_bytecode = True
    for name in [name for name in sys.modules if name.partition(".")[0] in ("raygrpo", "tests")]:
        del sys.modules[name]
    output, failures = io.StringIO(), _Failures()
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        copy_of_the_code(root)
        if mutant is not None:
            (root / "raygrpo" / f"{mutant.module}.py").write_text(mutant.source)
        os.chdir(root)
        sys.path[:] = [directory, *(p for p in sys.path if p not in ("", str(REPOSITORY)))]
        options = ["-x", "-q", "-p", "no:cacheprovider", "--assert=plain"]
        # A mutant may loop for ever; hypothesis would repeat a test that merely timed out.
        signal.signal(signal.SIGVTALRM, signal.default_int_handler)
        signal.setitimer(signal.ITIMER_VIRTUAL, MAX_CPU_S)
        with contextlib.redirect_stdout(output):
            code = pytest.main([*options, *(f"tests/{test}" for test in tests)], [failures])
        os.chdir("/")
    if code not in (0, 1, 2):
        name = mutant.name if mutant else "the code as it is"
        raise ValueError(f"{name}: pytest ended with {code}\n{output.getvalue()[-2000:]}")
    # Neither an error at import nor an endless loop is a test's failure.
    return next(iter(failures.found), "no test ends" * (code == 2)), time.perf_counter() - start


def copy_of_the_code(root: Path) -> None:
    """The package and the tests, with a hypothesis profile that does not shrink."""
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(REPOSITORY / "raygrpo", root / "raygrpo", ignore=ignored)
    shutil.copytree(REPOSITORY / "tests", root / "tests", ignore=ignored)
    shutil.copy(REPOSITORY / "pyproject.toml", root)
    conftest = root / "tests" / "conftest.py"
    conftest.write_text(conftest.read_text() + PROFILE)


def run(chosen: Sequence[Mutant], *, sound: bool) -> list[str]:
    """Runs these mutants; the names of the survivors, and of tests that fail anyway.

    Args:
        sound: whether to run their tests on the code as it is, too.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    wrong = []
    tests = {mutant: MODULES[mutant.module][1] for mutant in chosen}
    with ProcessPoolExecutor(os.cpu_count(), mp_context=context, max_tasks_per_child=1) as pool:
        mutants = [(m, pool.submit(first_failure, m, tests[m])) for m in chosen]
        unbroken = [
            (suite, pool.submit(first_failure, None, suite))
            for suite in dict.fromkeys(tests.values() if sound else ())
        ]
        for mutant, result in mutants:
            failed, seconds = result.result()
            verdict = "noticed " if failed else "SURVIVED"
            print(f"{verdict} {seconds:5.1f} s  {mutant.name}  {failed}", flush=True)
            wrong += [] if failed else [mutant.name]
        for suite, result in unbroken:
            failed, seconds = result.result()
            verdict = "FAILED" if failed else "passed"
            print(f"{verdict} {seconds:5.1f} s  {', '.join(suite)}  {failed}", flush=True)
            wrong += [f"{failed} fails on the code as it is"] if failed else []
    return wrong


def main(words: list[str]) -> int:
    """Runs the mutants that are asked for; returns the exit code."""
    quick = words == ["--quick"]
    if words[:1] == ["--all"]:
        chosen = [m for m in all_mutants() if all(word in m.name for word in words[1:])]
        chosen = [m for m in chosen if m.name not in EQUIVALENT]
    else:
        chosen = chosen_mutants(quick=quick)
    start = time.perf_counter()
    # The suite that runs the quick ones runs their tests on the code as it is.
    wrong = run(chosen, sound=not quick)
    noticed = len(chosen) - sum(mutant.name in wrong for mutant in chosen)
    print(f"{noticed} of {len(chosen)} noticed, in {time.perf_counter() - start:.0f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
