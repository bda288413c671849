"""Breaks the algorithm on purpose, one line at a time, and sees whether the tests notice.

    python -m tests.mutate_losses [WORDS...]      # only mutants whose name holds all the words
    python -m tests.mutate_losses --quick         # one of each kind

Each mutant is a copy of the package with one text replaced (a few need two); the tests named below
run on the copy, in a process that was forked with all but the project imported. A mutant that no
test fails on is printed and makes the exit code 1. A second or two of a core each.
"""

# A mutant is a line, however long.
# ruff: noqa: E501
from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[1]
# Which tests hold a module.
_LOSS = ("algorithm/test_loss.py",)
_LEARNER = (
    "parity/test_learner.py::test_old_logprobs_and_the_reference_follow_the_rules",
    "parity/test_learner_losses.py",
)
TESTS = {
    "algorithm/surrogates": _LOSS,
    "algorithm/corrections": _LOSS,
    "algorithm/loss": _LOSS,
    "algorithm/stats": _LOSS,
    "algorithm/entropy": ("algorithm/test_entropy.py", *_LOSS),
    "algorithm/advantages": ("algorithm/test_advantages.py",),
    "algorithm/overlong": ("algorithm/test_advantages.py",),
    "algorithm/step_plan": ("algorithm/test_advantages.py", "algorithm/test_packing.py"),
    "algorithm/packing": ("algorithm/test_packing.py",),
    "algorithm/logprobs": ("parity/test_logprobs.py",),
    "algorithm/token_gradient": ("parity/test_logprobs.py",),
    "learner/first_pass": _LEARNER,
    "learner/base": _LEARNER,
}
# Tests that take long run after the others of their file.
LAST = ("test_value_and_gradient_equal_the_oracle", "test_split_order_and_layout_do_not_matter")
# One of each kind, which `scripts/test` runs.
QUICK = (
    "algorithm/surrogates: clip: sign",
    "algorithm/surrogates: gspo: ratio by row, not by segment",
    "algorithm/corrections: attached",
    "algorithm/loss: mask shifted by one",
    "algorithm/loss: prompt weights: without P",
    "algorithm/packing: predictors shifted by one",
)
# What tests import beside the project, so that it is imported once.
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
# Finding a counter-example is enough; making it small takes longer than all the rest. Slow is no
# counter-example.
PROFILE = """
from hypothesis import Phase, settings
settings.register_profile(
    "mutants", phases=[Phase.explicit, Phase.generate], derandomize=True, deadline=None
)
settings.load_profile("mutants")
"""


@dataclass(frozen=True)
class Mutant:
    """``old``, which stands once in the module, becomes ``new``; ``more`` changes, if any, too."""

    module: str
    change: str
    old: str
    new: str
    more: tuple[Mutant, ...] = ()

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.module}: {self.change}"

    @property
    def edits(self) -> tuple[Mutant, ...]:
        """Itself, and what changes with it."""
        return (self, *self.more)

    @property
    def path(self) -> Path:
        """Of the module, from the repository."""
        return Path("raygrpo", f"{self.module}.py")


def _of(module: str, *changes: Any) -> list[Mutant]:
    return [Mutant(module, *change) for change in changes]


MUTANTS = [
    *_of(
        "algorithm/surrogates",
        ("clip: sign", "return -objective,", "return objective,"),
        ("clip: maximum for minimum", "torch.minimum(free", "torch.maximum(free"),
        ("clip: low bound from high", "1 - config.clip_low, 1 +", "1 - config.clip_high, 1 +"),
        ("clip: high bound from low", "1 + config.clip_high)\n    free", "1 + config.clip_low)\n    free"),
        ("clip: delta in both terms", "bounded = ratio.clamp(", "ratio = ratio.clamp(max=config.delta or 1e9)\n    bounded = ratio.clamp("),
        ("clip: delta ignored", "ratio if config.delta is None", "ratio if True"),
        ("clip: dual clip for all signs", "torch.where(advantages < 0, torch.maximum(objective, floor), objective)", "torch.maximum(objective, floor)"),
        ("clip: dual clip ignored", "if config.dual_clip is not None", "if False"),
        ("clip: ratio detached", "losses, more = _clip(log_ratio.exp()", "losses, more = _clip(log_ratio.exp().detach()"),
        ("gspo: ratio by token", 'if config.loss == "gspo":\n            #', 'if config.loss == "none":\n            #'),
        ("gspo: ratio by row, not by segment", "sequence_means(log_ratio, tokens.mask, tokens.sequences)\n            log_ratio = means[tokens.sequences]", "sequence_means(log_ratio, tokens.mask, torch.arange(len(log_ratio))[:, None].expand_as(log_ratio))\n            log_ratio = means[:, None].expand_as(log_ratio)"),
        ("gspo: mask ignored in the mean", "sequence_means(log_ratio, tokens.mask,", "sequence_means(log_ratio, torch.ones_like(tokens.mask),"),
        ("cispo: ratio attached", "weight = ratio.detach().clamp", "weight = ratio.clamp"),
        ("cispo: cap is 1 + cap", "clamp(max=config.cispo_cap)", "clamp(max=1 + config.cispo_cap)"),
        ("cispo: no cap", "ratio.detach().clamp(max=config.cispo_cap)", "ratio.detach()"),
        ("cispo: logprobs detached", "weight * tokens.advantages * tokens.logprobs", "weight * tokens.advantages * tokens.logprobs.detach()"),
        ("sapo: one temperature", "masked_fill(positive, config.sapo_tau_pos)", "masked_fill(positive, config.sapo_tau_neg)"),
        ("sapo: temperatures swapped", "positive = tokens.advantages > 0\n    tau", "positive = tokens.advantages <= 0\n    tau"),
        ("sapo: without 4 / tau", "* 4 / tau", "* 1.0"),
        ("cispo: sign", "losses = -weight *", "losses = weight *"),
        ("sapo: sign", "return -tokens.advantages * torch.sigmoid", "return tokens.advantages * torch.sigmoid"),
        ("dppo: sign", "losses = -kept *", "losses = kept *"),
        ("dppo: both signs keep", "high | low, 0.0", "high & low, 0.0"),
        ("dppo: drops against the advantage", "positive & (moved > config.dppo_tv)", "~positive & (moved > config.dppo_tv)"),
        ("dppo: ratios for probabilities", "tokens.logprobs.detach().exp() - tokens.anchor.exp()", "tokens.logprobs.detach() - tokens.anchor"),
        ("dppo: no pull", "+ DPPO_PULL * log_ratio.square()", "+ 0.0"),
        ("dppo: pull only where kept", "DPPO_PULL * log_ratio.square()", "DPPO_PULL * log_ratio.square() * (kept != 0)"),
        ("reinforce: sign", "return -tokens.advantages * tokens.logprobs, stats", "return tokens.advantages * tokens.logprobs, stats"),
        ("statistics: gspo by token", 'by_sequence=config.loss == "gspo"', "by_sequence=False"),
    ),
    *_of(
        "algorithm/corrections",
        ("attached", "@torch.no_grad()\ndef correction(", "def correction(", (
            Mutant("algorithm/corrections", "", "token_gap = old.detach() - sampler", "token_gap = old - sampler"),
            Mutant("algorithm/loss", "", "_factor(inputs, tokens, old, sampler, config)", "_factor(inputs, tokens, logprobs if inputs.old_logprobs is None else old, sampler, config)"),
        )),
        ("of the policy, not of the old one", "token_gap = old.detach() - sampler", "token_gap = old - sampler", (
            Mutant("algorithm/loss", "", "correction(old, sampler, mask, sequences, config)", "correction(tokens.logprobs.detach(), sampler, mask, sequences, config)"),
        )),
        ("tis: no cap", "applied = rho.clamp(max=config.correction_max)", "applied = rho"),
        ("tis: cap from correction_min", "rho.clamp(max=config.correction_max)", "rho.clamp(max=config.correction_min)"),
        ("icepop: 1 inside", "torch.where(inside, rho, 0.0)", "inside.to(rho.dtype)"),
        ("icepop: 1 outside", "torch.where(inside, rho, 0.0)", "torch.where(inside, rho, 1.0)"),
        ("icepop: no lower end", "(rho >= config.correction_min) &", ""),
        ("gap's sign", "token_gap = old.detach() - sampler", "token_gap = sampler - old.detach()"),
        ("sequence level: sum, a product of ratios", "sequence_means(token_gap, mask, sequences)[0][sequences]", "(lambda m, c: (m * c)[sequences])(*sequence_means(token_gap, mask, sequences))"),
        ("sequence level: by row", "sequence_means(token_gap, mask, sequences)[0][sequences]", "sequence_means(token_gap, mask, torch.arange(len(mask))[:, None].expand_as(mask))[0][:, None].expand_as(mask)"),
        ("ess of the corrected ratio", '"sampling/token_ratio": partial(stat, token_rho', '"sampling/token_ratio": partial(stat, applied'),
        ("kl to the sampler: sign", "token_rho - 1 - token_gap", "token_rho - 1 + token_gap"),
        ("off-policy: positive advantages too", "(advantages < 0) & (means", "(means"),
        ("off-policy: sign of the gap", "sequence_means(sampler - logprobs,", "sequence_means(logprobs - sampler,"),
        ("off-policy: by row", "sequence_means(sampler - logprobs, mask, sequences)\n    dropped = (advantages < 0) & (means[sequences]", "sequence_means(sampler - logprobs, mask, torch.arange(len(mask))[:, None].expand_as(mask))\n    dropped = (advantages < 0) & (means[:, None].expand_as(mask)"),
    ),
    *_of(
        "algorithm/loss",
        ("mask shifted by one", "mask = inputs.loss_mask.bool()", "mask = inputs.loss_mask.bool().roll(1, dims=1)"),
        ("mask ignored in the sum", "torch.where(mask, losses * weights, 0.0).sum()", "(losses * weights).sum()"),
        ("untrained positions not cleared", "logprobs = torch.where(mask, inputs.logprobs, 0.0)", "logprobs = inputs.logprobs"),
        ("old attached", "old = logprobs.detach() if old is None", "old = logprobs if old is None"),
        ("anchor always old", "if config.anchored_at_sampler\n        else old", "if False\n        else old"),
        ("correction after KL", "losses, stats = losses * factor, stats | more\n    if config.beta:", "losses, stats = losses, stats | more\n    if config.beta:"),
        ("KL's sign", "losses = losses + config.beta * kl", "losses = losses - config.beta * kl"),
        ("KL: ref and policy swapped", "kl = _kl(ref - logprobs, config)", "kl = _kl(logprobs - ref, config)"),
        ("k3 without - 1", "torch.exp(difference) - difference - 1", "torch.exp(difference) - difference"),
        ("k2 without / 2", "difference.square() / 2", "difference.square()"),
        ("k3 for k2", 'if config.kl_estimator == "k2"', "if False"),
        ("unbiased KL: ratio detached", "kl * torch.exp(logprobs - tokens.anchor) if", "kl * torch.exp(logprobs - tokens.anchor).detach() if"),
        ("unbiased KL: never", "if config.kl_unbiased else kl", "if False else kl"),
        ("KL detached", "losses = losses + config.beta * kl", "losses = losses + config.beta * kl.detach()"),
        ("bonus: sign", "losses = losses - config.entropy_coef", "losses = losses + config.entropy_coef"),
        ("bonus: detached", "torch.where(mask, bonus, 0.0)", "torch.where(mask, bonus.detach(), 0.0)"),
        ("bonus: only where the policy loss is", "config.entropy_coef * torch.where(mask, bonus, 0.0)", "config.entropy_coef * torch.where(mask & (factor != 0), bonus, 0.0)"),
        ("off-policy mask ignored", "factor, stats = factor * kept, stats | more", "stats = stats | more"),
        ("top entropies ignored", "factor = factor * _policy_mask(inputs, mask, config)", "factor = factor * 1"),
        ("global mask ignored", "if inputs.policy_mask is not None:", "if False:"),
        ("token weights: sequences", 'weights = torch.ones_like(tokens) / tokens.sum().clamp(min=1)', 'weights = torch.ones_like(tokens) / count'),
        ("sequence weights: without S", "1 / (count * tokens.clamp(min=1))", "1 / tokens.clamp(min=1)"),
        ("constant weights: without S", "/ (count * max_completion_length)", "/ max_completion_length"),
        ("prompt weights: without P", "1 / (num_groups * per_group[index].clamp(min=1))", "1 / per_group[index].clamp(min=1)"),
        ("prompt weights: by sequence", "per_group[index].clamp", "tokens.clamp"),
        ("sequences without tokens do not count", "count = max(len(tokens), 1)", "count = max(int((tokens > 0).sum()), 1)"),
    ),
    *_of(
        "algorithm/stats",
        ("means by row, not by segment", "sequences.flatten()\n    sums", "sequences.amax(1, keepdim=True).expand_as(sequences).flatten()\n    sums"),
        ("means over all positions", "ones = mask.to(values.dtype).flatten()", "ones = torch.ones_like(values).flatten()"),
        ("means detached", "flat, index = (values * mask).flatten()", "flat, index = (values.detach() * mask).flatten()"),
        ("largest for smallest", "min=least, max=most", "min=most, max=least"),
    ),
    *_of(
        "algorithm/entropy",
        ("smallest entropies", "entropies.detach().float().clamp(min=0) >= threshold", "entropies.detach().float().clamp(min=0) <= threshold"),
        ("one token fewer", "int(round(frac * (count - 1), 6)) + 1", "max(int(round(frac * (count - 1), 6)), 1)"),
        ("this rank's tokens only", "count = total(float(values.numel()))", "count = float(values.numel())"),
        ("ties dropped", "clamp(min=0) >= threshold", "clamp(min=0) > threshold"),
        ("coefficient moves the wrong way", "COEF_STEP if entropy <= self.target else -COEF_STEP", "-COEF_STEP if entropy <= self.target else COEF_STEP"),
        ("bonus acts above its target", "acts = self.entropy is not None and self.entropy <= self.target", "acts = True"),
    ),
    *_of(
        "algorithm/advantages",
        ("mean of all groups", "mean = (values * scored).sum(1, keepdim=True) / count\n    if", "mean = (values * scored).mean() + torch.zeros_like(count)\n    if"),
        ("leave one out is the mean", "(values - mean) * count / (count - 1).clamp(min=1)", "values - mean"),
        ("group: population deviation", "_deviation(values, scored, dim=1, ddof=1) + _EPSILON\n    if scale", "_deviation(values, scored, dim=1, ddof=0) + _EPSILON\n    if scale"),
        ("population: sample deviation", "dim=1, ddof=0) + _POPULATION_EPSILON", "dim=1, ddof=1) + _POPULATION_EPSILON"),
        ("batch: of centred rewards", "_deviation(values, scored, dim=None, ddof=1) + _EPSILON", "_deviation(centred, usable, dim=None, ddof=1) + _EPSILON"),
        ("batch_centred: of rewards", "_deviation(centred, usable, dim=None, ddof=1) + _EPSILON", "_deviation(values, scored, dim=None, ddof=1) + _EPSILON"),
        ("max_rl: negative means divide", "torch.where(mean > 0,", "torch.where(mean != 0,"),
        ("None counts as 0", "scored = ~torch.isnan(rewards)\n    usable", "scored = torch.ones_like(rewards, dtype=torch.bool)\n    usable"),
        ("one score has an advantage", "usable = scored & (scored.sum(1, keepdim=True) >= 2)\n    values = rewards", "usable = scored\n    values = rewards"),
        ("signal without trained tokens", "reward is not None and is_trained and", "reward is not None and"),
        ("max_rl: signal without success", 'if baseline == "max_rl" and mean <= 0:', "if False:"),
        ("gdpo: no second normalisation", "(values - mean) / (deviation + _EPSILON), 0.0).float()", "values, 0.0).float()"),
    ),
    *_of(
        "algorithm/overlong",
        ("starts at the maximum", "over = length - (max_length - buffer)", "over = length - max_length"),
        ("rewards length", "-over / buffer", "over / buffer"),
    ),
    *_of(
        "algorithm/step_plan",
        ("overlong filter ignored", 'if section.mask_truncated and', "if False and"),
        ("filtered completions leave the denominator", "if summary.scores[index].value is not None\n    ]", "if summary.scores[index].value is not None and num_trained_tokens(summary, index, config.advantage)\n    ]"),
        ("truncated ones stay in the baseline", 'section.mask_truncated == "exclude"', "False"),
        ("overlong penalty ignored", "if not section.overlong_buffer:", "if True:"),
    ),
    *_of(
        "algorithm/packing",
        ("predictors shifted by one", "np.maximum(column + np.arange(start, start + count) - 1, 0)", "column + np.arange(start, start + count)"),
        ("predictors without their column", "np.maximum(column + np.arange(start, start + count) - 1, 0)", "np.maximum(np.arange(start, start + count) - 1, 0)"),
        ("a branch begins after its prompt's end", '["predictors"][completion.start] = column + prompt_length - 1', '["predictors"][completion.start] = column + prompt_length'),
        ("a branch follows the one before it", "if completion.start < completion.stop:", "if False:"),
        ("loss mask shifted by one", '["loss_mask"][here] = sample.loss_mask[tokens]', '["loss_mask"][here] = np.roll(sample.loss_mask[tokens], 1)'),
        ("sampler's logprobs shifted by one", '["sampler_logprobs"][here] = sample.sampler_logprobs[tokens]', '["sampler_logprobs"][here] = np.roll(sample.sampler_logprobs[tokens], 1)'),
        ("positions go on", '["positions"][here] = np.arange(tokens.start, tokens.stop)', '["positions"][here] = np.arange(start, start + count)'),
        ("sequences by tree", '["sequence_ids"][completion] = sequence + offset', '["sequence_ids"][completion] = sequence'),
        ("sequences by row", "_fill_tree(here, samples, len(planned), segment, column)", "_fill_tree(here, samples, index, segment, column)"),
        ("branches see each other", '["segment_ids"][completion] = segment + offset + 1', '["segment_ids"][completion] = segment + 1'),
        ("branches do not see their prompt", '["parent_ids"][completion] = segment', '["parent_ids"][completion] = -1'),
        ("fillers weigh", "0.0 if sample.filler else sample.loss_weight", "sample.loss_weight"),
        ("fillers train", "completion.loss_mask & (not plan.filler)", "completion.loss_mask"),
    ),
    *_of(
        "algorithm/logprobs",
        ("target of the token before", "chosen = settings.logits(raw[targets,", "chosen = settings.logits(raw[targets.roll(1),"),
        ("target of the token before, any head", "table.gather(-1, targets.long()[:, None])", "table.gather(-1, targets.long().roll(1)[:, None])"),
        ("gradient at another target", "self.raw[self.targets, tokens] = at_target", "self.raw[self.targets.roll(1), tokens] = at_target"),
        ("no temperature", "logits = logits / self.temperature", "logits = logits / 1.0"),
        ("slope without temperature", "outer = self.transform.scale / self.temperature", "outer = self.transform.scale"),
        ("slope of the cap without temperature", "(logits * (self.temperature / self.transform.cap))", "(logits * (1.0 / self.transform.cap))"),
        ("slope without scale", "outer = self.transform.scale / self.temperature", "outer = 1.0 / self.temperature"),
        ("entropy's gradient: sign", "outer = table * by_entropy + (by_logprob + self.entropies * by_entropy)", "outer = (by_logprob - self.entropies * by_entropy) - table * by_entropy"),
        ("entropy's gradient: without the entropy", "(by_logprob + self.entropies * by_entropy)", "by_logprob"),
        ("entropy: sign", "(log_total - moment / total)", "(log_total + moment / total)"),
        ("blocks: moment not moved to the new peak", "(moment + lowered * total) * shrunk", "moment * shrunk"),
        ("weight's gradient of the first chunk alone", "self._weight_sum.addmm_(raw, hidden)", "self._weight_sum.addmm(raw, hidden)"),
        ("foretold gradient not compared", "return float(factor.float()) if close else None", "return float(factor.float())"),
        ("factor not applied", "if factor != 1.0:", "if False:"),
        ("all logits at once", "width = min(settings.chunk_tokens, num_tokens)", "width = num_tokens"),
        ("all logits at once, token by token", "found = hidden.new_empty(4,", "everything = hidden @ weight.T\n        found = hidden.new_empty(4,"),
        ("all logits kept", "ctx.settings, ctx.fused = settings, token_gradient is not None", "ctx.settings, ctx.fused = settings, token_gradient is not None\n        targets = targets[:, None].expand(-1, weight.shape[0]).clone()[:, 0]"),
    ),
    *_of(
        "algorithm/token_gradient",
        ("gspo is separable", 'config.loss != "gspo"', 'config.loss != "none"'),
        ("a correction by sequence is separable", 'config.correction_level == "token"', "True"),
        ("the off-policy mask is separable", "config.off_policy_threshold is None", "True"),
        ("a mask that is not given is separable", "or inputs.policy_mask is not None", "or True"),
        ("the first chunk's values for all", "v[None, which] for k", "v[None, : len(logprobs)] for k"),
        ("entropy bonus left out", "leaves = (leaf, bonus) if config.entropy_coef else (leaf,)", "leaves = (leaf,)"),
        ("other tokens' sequences", 'grids |= {"sequence_ids": inputs.sequence_ids,', 'grids |= {"sequence_ids": inputs.sequence_ids.flip(1),'),
        ("sign", "return by_logprob[0], by_entropy", "return -by_logprob[0], by_entropy"),
    ),
    *_of(
        "learner/first_pass",
        ("old logprobs after the updates before", "needs_old = len(batches) > 1 and", "needs_old = False and"),
        ("old logprobs though the ratio is to the sampler", "and not config.anchored_at_sampler", ""),
        ("a threshold for each microbatch", "= top_entropy_mask(entropies, mask, threshold)", "= top_entropy_mask(entropies, mask, entropy_threshold(entropies[mask].float(), config.top_entropy_frac, sum_over_ranks))"),
        ("no mask of top entropies", "item.policy_mask = top_entropy_mask(entropies, mask, threshold)", "pass"),
    ),
    *_of(
        "learner/base",
        ("old logprobs of each iteration", "if kept.old_logprobs is None:", "if True:"),
        ("no old logprobs", "old_logprobs=held.old_logprobs,", "old_logprobs=None,"),
        ("no mask of top entropies", "policy_mask=held.policy_mask,", "policy_mask=None,"),
        ("the reference is the policy", "ref_logprobs, _ = self._reference(inputs)", "ref_logprobs, _ = self._policy(inputs)"),
        ("the reference moves each step", 'and step % int(sync["steps"]) == 0', ""),
        ("the reference's steps are updates", "self.num_updates // self._updates_per_step", "self.num_updates"),
        ("the reference moves by 1 - alpha", 'sync["alpha"])', '1 - sync["alpha"])'),
        ("the reference moves before the step", "        self._sync_reference()\n", "", (
            Mutant("learner/base", "", "        held = first_pass(", "        self._sync_reference()\n        held = first_pass("),
        )),
        ("the coefficient stays", "self._entropy = self._entropy.after(", "self._entropy.after("),
    ),
]  # fmt: skip


class _Failures:
    """A pytest plugin: quick tests first, and what failed."""

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
        ValueError: the text to replace is not in the module exactly once (the code has changed), or
            the tests do not run at all.
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
        for edit in mutant.edits if mutant else ():
            text = (root / edit.path).read_text()
            if text.count(edit.old) != 1:
                raise ValueError(f"{edit.name}: {text.count(edit.old)} places with {edit.old!r}")
            (root / edit.path).write_text(text.replace(edit.old, edit.new))
        os.chdir(root)
        sys.path[:] = [directory, *(p for p in sys.path if p not in ("", str(REPOSITORY)))]
        options = ["-x", "-q", "-p", "no:cacheprovider", "--assert=plain"]
        with contextlib.redirect_stdout(output):
            code = pytest.main([*options, *(f"tests/{test}" for test in tests)], [failures])
        os.chdir("/")
    if code not in (0, 1):
        name = mutant.name if mutant else "the code as it is"
        raise ValueError(f"{name}: pytest ended with {code}\n{output.getvalue()[-2000:]}")
    return next(iter(failures.found), ""), time.perf_counter() - start


def copy_of_the_code(root: Path) -> None:
    """The package and the tests, with a hypothesis profile that does not shrink."""
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(REPOSITORY / "raygrpo", root / "raygrpo", ignore=ignored)
    shutil.copytree(REPOSITORY / "tests", root / "tests", ignore=ignored)
    shutil.copy(REPOSITORY / "pyproject.toml", root)
    conftest = root / "tests" / "conftest.py"
    conftest.write_text(conftest.read_text() + PROFILE)


def run(chosen: Sequence[Mutant], *, sound: bool) -> list[str]:
    """Runs these mutants; the names of what goes wrong.

    Args:
        sound: whether to run their tests on the code as it is, too.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    wrong = []
    suites = dict.fromkeys(TESTS[mutant.module] for mutant in chosen if sound)
    with ProcessPoolExecutor(os.cpu_count(), mp_context=context, max_tasks_per_child=1) as pool:
        mutants = [
            (mutant, pool.submit(first_failure, mutant, TESTS[mutant.module])) for mutant in chosen
        ]
        unbroken = [pool.submit(first_failure, None, tests) for tests in suites]
        for mutant, result in mutants:
            failed, duration_s = result.result()
            print(
                f"{'noticed ' if failed else 'SURVIVED'} {duration_s:5.1f} s  {mutant.name}  {failed}",
                flush=True,
            )
            wrong += [] if failed else [mutant.name]
        for tests, result in zip(suites, unbroken, strict=True):
            failed, duration_s = result.result()
            print(
                f"{'FAILED' if failed else 'passed'} {duration_s:5.1f} s  {', '.join(tests)}  {failed}",
                flush=True,
            )
            wrong += [f"{failed} fails on the code as it is"] if failed else []
    return wrong


def main(words: list[str]) -> int:
    """Runs the mutants that are asked for; returns the exit code."""
    quick = words == ["--quick"]
    if quick:
        chosen = [mutant for mutant in MUTANTS if mutant.name in QUICK]
    else:
        chosen = [mutant for mutant in MUTANTS if all(word in mutant.name for word in words)]
    start = time.perf_counter()
    # The suite that runs the quick ones runs their tests on the code as it is.
    wrong = run(chosen, sound=not quick)
    survived = sum(mutant.name in wrong for mutant in chosen)
    print(
        f"{len(chosen) - survived} of {len(chosen)} noticed, in {time.perf_counter() - start:.0f} s"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
