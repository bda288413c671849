"""Recipes say what their papers say, and `auto` what the run needs."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from raygrpo.algorithm.step_plan import loss_config
from raygrpo.cli import app
from raygrpo.commands.model_card import papers_of
from raygrpo.config.file import merged_sections
from raygrpo.config.recipes import RECIPES
from tests import builders
from tests.builders import SMALLEST

# docs/algorithms.md's table: advantage, loss, clip range, aggregation, beta, refill.
TABLE = {
    "default": ("mean/none", "clip", (0.2, 0.28), "token", 0.0, True),
    "deepseekmath": ("mean/group", "clip", (0.2, 0.2), "sequence", 0.04, False),
    "trl024": ("mean/group", "clip", (0.2, 0.2), "token", 0.0, False),
    "dapo": ("mean/group", "clip", (0.2, 0.28), "token", 0.0, True),
    "dr_grpo": ("mean/none", "clip", (0.2, 0.2), "constant", 0.0, False),
    "gspo": ("mean/group", "gspo", (3e-4, 4e-4), "sequence", 0.0, False),
    "scalerl": ("mean/batch_centred", "cispo", None, "prompt", 0.0, True),
    "dppo": ("mean/none", "dppo_tv", None, "token", 0.0, False),
    "rloo": ("leave_one_out/none", "clip", (0.2, 0.2), "sequence", 0.0, False),
}


def test_every_recipe_is_in_the_table() -> None:
    assert set(TABLE) == set(RECIPES)


@pytest.mark.parametrize("recipe", TABLE)
def test_recipes_are_those_of_the_table(recipe: str) -> None:
    config = builders.config(recipe=recipe)
    advantage, loss, clip, aggregation, beta, refill = TABLE[recipe]
    assert f"{config.advantage.baseline}/{config.advantage.scale}" == advantage
    assert (config.loss.loss, config.loss.aggregation) == (loss, aggregation)
    if clip:
        assert (config.loss.clip_low, config.loss.clip_high) == clip
    assert config.loss.beta == beta
    assert config.train.dynamic_sampling is refill


def test_what_else_recipes_set() -> None:
    scalerl, dppo, dapo = (builders.config(recipe=name) for name in ("scalerl", "dppo", "dapo"))
    assert (scalerl.loss.cispo_cap, scalerl.loss.ratio_anchor) == (5.0, "sampler")
    assert scalerl.model.fp32_head
    assert (scalerl.data.max_pass_rate, scalerl.train.max_staleness) == (0.9, 8)
    assert (dppo.loss.dppo_tv, dppo.loss.anchored_at_sampler) == (0.2, True)
    assert dapo.advantage.overlong_buffer == 4096 / 20480
    trl = builders.config(recipe="trl024")
    assert (trl.optimizer.lr, trl.optimizer.max_grad_norm) == (1e-6, 1.0)
    assert (trl.data.max_prompt_length, trl.sampling.max_tokens) == (512, 256)
    assert (trl.data.overlong, trl.optimizer.schedule) == ("truncate_left", "linear")
    deepseekmath = builders.config(recipe="deepseekmath")
    assert deepseekmath.loss.kl_estimator == "k3"
    assert deepseekmath.train.num_iterations * deepseekmath.train.num_minibatches == 1
    assert {name for name in RECIPES if len(papers_of(name)) > 1} == set(RECIPES) - {
        "deepseekmath",
        "trl024",
    }


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_are_printed_as_they_are_written(recipe: str) -> None:
    result = CliRunner().invoke(app, ["config", "--recipe", recipe])
    assert result.exit_code == 0
    printed = yaml.safe_load(result.output)
    assert printed == {"recipe": recipe, **RECIPES[recipe]}
    # A few overrides of one configuration.
    leaves = [leaf for section in RECIPES[recipe].values() for leaf in section]
    assert len(leaves) <= 16
    assert merged_sections(SMALLEST, printed) == merged_sections(
        RECIPES[recipe], {**SMALLEST, "recipe": recipe}
    )


def test_an_unknown_recipe_is_bad_input() -> None:
    result = CliRunner().invoke(app, ["config", "--recipe", "dap"])
    assert result.exit_code == 2
    assert "did you mean 'dapo'" in result.output


def test_correction_auto_is_tis_where_generation_may_be_stale() -> None:
    stale = {"train": {"max_staleness": 2}}
    assert loss_config(builders.config()).correction == "none"
    config = builders.config(**stale)
    resolved = loss_config(config)
    assert (resolved.correction, resolved.correction_level) == ("tis", "token")
    assert config.loss.correction == "auto"
    for loss in ({"loss": "dppo_tv"}, {"ratio_anchor": "sampler"}, {"correction": "none"}):
        assert loss_config(builders.config(**stale, loss=loss)).correction == "none"
    filtered = builders.config(**stale, sampling={"filters": {"top_p": 0.9}})
    assert loss_config(filtered).correction == "none", "the ratio would be biased"
    assert loss_config(builders.config(loss={"correction": "icepop"})).correction == "icepop"


@pytest.mark.parametrize(
    ("loss", "acts"),
    [
        ({}, False),
        ({"beta": 0.1}, True),
        ({"entropy_coef": 0.1}, True),
        ({"entropy_target": 0.1}, True),
        ({"loss": "dppo_tv"}, True),
        ({"loss": "cispo", "ratio_anchor": "sampler"}, False),
    ],
    ids=str,
)
def test_what_acts_in_a_step_without_signal(loss: dict[str, Any], acts: bool) -> None:
    assert builders.config(loss=loss).loss.acts_without_signal is acts
