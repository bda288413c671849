"""Breaks the algorithm on purpose, one line at a time, and sees whether the unit tests notice.

    python -m tests.mutate_losses [WORDS...]      # only mutants whose name holds all the words

Each mutant is a copy of the package with one text replaced; the tests named below run on the copy.
A mutant that no test fails on is printed and makes the exit code 1. A few seconds a mutant.
"""

# A mutant is a line, however long.
# ruff: noqa: E501
from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
# Which tests hold a module of raygrpo/algorithm.
TESTS = {
    "surrogates": ("test_loss",),
    "corrections": ("test_loss",),
    "loss": ("test_loss",),
    "stats": ("test_loss",),
    "entropy": ("test_entropy", "test_loss"),
    "advantages": ("test_advantages",),
    "overlong": ("test_advantages",),
    "plan": ("test_advantages", "test_packing"),
}
# Finding a counter-example is enough; making it small takes longer than all the rest.
PROFILE = """
from hypothesis import Phase, settings
settings.register_profile("mutants", phases=[Phase.explicit, Phase.generate], derandomize=True)
settings.load_profile("mutants")
"""


@dataclass(frozen=True)
class Mutant:
    """``old``, which stands once in the module, becomes ``new``."""

    module: str
    change: str
    old: str
    new: str

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.module}: {self.change}"

    @property
    def path(self) -> Path:
        """Of the module, from the repository."""
        return Path("raygrpo", "algorithm", f"{self.module}.py")


def _of(module: str, *changes: tuple[str, str, str]) -> list[Mutant]:
    return [Mutant(module, *change) for change in changes]


MUTANTS = [
    *_of(
        "surrogates",
        ("clip: sign", "return -objective,", "return objective,"),
        ("clip: maximum for minimum", "torch.minimum(free", "torch.maximum(free"),
        ("clip: low bound from high", "1 - config.clip_low, 1 +", "1 - config.clip_high, 1 +"),
        ("clip: high bound from low", "1 + config.clip_high)\n    free", "1 + config.clip_low)\n    free"),
        ("clip: delta in both terms", "bounded = ratio.clamp(", "ratio = ratio.clamp(max=config.delta)\n    bounded = ratio.clamp("),
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
        ("dppo: both signs keep", "high | low, 0.0", "high & low, 0.0"),
        ("dppo: drops against the advantage", "positive & (moved > config.dppo_tv)", "~positive & (moved > config.dppo_tv)"),
        ("dppo: ratios for probabilities", "tokens.logprobs.detach().exp() - tokens.anchor.exp()", "tokens.logprobs.detach() - tokens.anchor"),
        ("dppo: no pull", "+ DPPO_PULL * log_ratio.square()", "+ 0.0"),
        ("dppo: pull only where kept", "DPPO_PULL * log_ratio.square()", "DPPO_PULL * log_ratio.square() * (kept != 0)"),
        ("reinforce: sign", "return -tokens.advantages * tokens.logprobs, stats", "return tokens.advantages * tokens.logprobs, stats"),
        ("statistics: gspo by token", 'by_sequence=config.loss == "gspo"', "by_sequence=False"),
    ),
    *_of(
        "corrections",
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
        "loss",
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
        "stats",
        ("means over all positions", "ones = mask.to(values.dtype).flatten()", "ones = torch.ones_like(values).flatten()"),
        ("means detached", "flat, index = (values * mask).flatten()", "flat, index = (values.detach() * mask).flatten()"),
        ("largest for smallest", "min=least, max=most", "min=most, max=least"),
    ),
    *_of(
        "entropy",
        ("smallest entropies", "entropies.detach().float().clamp(min=0) >= threshold", "entropies.detach().float().clamp(min=0) <= threshold"),
        ("one token fewer", "int(round(frac * (count - 1), 6)) + 1", "max(int(round(frac * (count - 1), 6)), 1)"),
        ("this rank's tokens only", "count = total(float(values.numel()))", "count = float(values.numel())"),
        ("ties dropped", "clamp(min=0) >= threshold", "clamp(min=0) > threshold"),
        ("coefficient moves the wrong way", "COEF_STEP if entropy <= self.target else -COEF_STEP", "-COEF_STEP if entropy <= self.target else COEF_STEP"),
        ("bonus acts above its target", "acts = self.entropy is not None and self.entropy <= self.target", "acts = True"),
    ),
    *_of(
        "advantages",
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
        "overlong",
        ("starts at the maximum", "over = length - (max_length - buffer)", "over = length - max_length"),
        ("rewards length", "-over / buffer", "over / buffer"),
    ),
    *_of(
        "plan",
        ("overlong filter ignored", 'if section.mask_truncated and', "if False and"),
        ("filtered completions leave the denominator", "if summary.scores[index].value is not None\n    ]", "if summary.scores[index].value is not None and num_trained_tokens(summary, index, config.advantage)\n    ]"),
        ("truncated ones stay in the baseline", 'section.mask_truncated == "exclude"', "False"),
        ("overlong penalty ignored", "if not section.overlong_buffer:", "if True:"),
    ),
]  # fmt: skip


def survives(mutant: Mutant, root: Path) -> bool:
    """Whether the tests pass on a copy with this mutant.

    Raises:
        ValueError: the text to replace is not in the module exactly once: the code has changed.
    """
    path = root / mutant.path
    text = (REPOSITORY / mutant.path).read_text()
    if text.count(mutant.old) != 1:
        raise ValueError(f"{mutant.name}: {text.count(mutant.old)} places with {mutant.old!r}")
    path.write_text(text.replace(mutant.old, mutant.new))
    tests = [f"tests/unit/{name}.py" for name in TESTS[mutant.module]]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    path.write_text(text)
    if done.returncode not in (0, 1):
        raise ValueError(
            f"{mutant.name}: pytest ended with {done.returncode}\n{done.stdout[-2000:]}"
        )
    return done.returncode == 0


def copy_of_the_code(root: Path) -> None:
    """The package and the unit tests, with a hypothesis profile that does not shrink."""
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(REPOSITORY / "raygrpo", root / "raygrpo", ignore=ignored)
    shutil.copytree(REPOSITORY / "tests", root / "tests", ignore=ignored)
    shutil.copy(REPOSITORY / "pyproject.toml", root)
    conftest = root / "tests" / "conftest.py"
    conftest.write_text(conftest.read_text() + PROFILE)


def main(words: list[str]) -> int:
    """Runs the mutants that are asked for; returns the exit code."""
    chosen = [m for m in MUTANTS if all(word in m.name for word in words)]
    lost = []
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory) / "code"
        root.mkdir()
        copy_of_the_code(root)
        for module in TESTS:
            first = (REPOSITORY / "raygrpo" / "algorithm" / f"{module}.py").read_text()
            if not survives(Mutant(module, "nothing", first, first), root):
                print(f"the tests of {module} fail on the code as it is")
                return 1
        for mutant in chosen:
            alive = survives(mutant, root)
            print(f"{'SURVIVED' if alive else 'noticed '}  {mutant.name}", flush=True)
            lost += [mutant.name] if alive else []
    print(f"{len(chosen) - len(lost)} of {len(chosen)} noticed")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
