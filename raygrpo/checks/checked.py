"""The first step of a configuration: everything that can be found wrong without a cluster.

`check` reads files and asks the hub. It writes nothing and starts nothing, so it serves training,
evaluation and the dry run alike. `raygrpo.checks.resolved` is the second step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import datasets

from raygrpo.actors.cluster.placement import check_run_dir, check_transfer
from raygrpo.checks.revisions import pin
from raygrpo.config import RunConfig
from raygrpo.data.loading import make_prompts
from raygrpo.data.prompts import PromptStream
from raygrpo.data.sources import anchored_source, eval_section
from raygrpo.engines.select import check_engine
from raygrpo.errors import ConfigError
from raygrpo.learner.deepspeed_config import check_learner
from raygrpo.models import anchored_model, check_model_path, load_tokenizer
from raygrpo.rewards.loading import anchor_reward, check_reward
from raygrpo.storage.run_dir import RunDir
from raygrpo.tracking.tensorboard import check_tensorboard
from raygrpo.training.evaluation import check_best_metric
from raygrpo.types import Prompt

Rows: TypeAlias = datasets.Dataset | datasets.IterableDataset | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """What a run is made of.

    Example: ``given.model.path`` is ``models/tiny``, ``config.model.path`` is
    ``/home/me/models/tiny``.

    Attributes:
        given: the configuration as the user wrote it; a resumed run is compared with it.
        config: the same with absolute paths and with the revisions of hub models and data sets.
        functions: pickled reward functions that were passed in Python, by name.
        revisions: the revision of each model and data set, by role.
        revision_changes: what differs from the revisions that the run recorded, as text.
        tokenizer: the model's.
        sources: the prompts by stream: ``train``, and ``eval`` where the run evaluates.
        eval_prompts: the prompts of an evaluation.
    """

    given: RunConfig
    config: RunConfig
    functions: Mapping[str, bytes]
    revisions: Mapping[str, str]
    revision_changes: Sequence[str]
    tokenizer: Any
    sources: Mapping[str, PromptStream]
    eval_prompts: Sequence[Prompt]

    @property
    def prompts(self) -> PromptStream:
        """The training prompts, from their start or where a restored run left them."""
        return self.sources["train"]


def check(
    given: RunConfig,
    functions: Mapping[str, bytes] | None = None,
    dataset: Rows = None,
    eval_dataset: Rows = None,
) -> Checked:
    """Checks a configuration and loads the tokenizer and the prompts.

    Args:
        given: the configuration as the user wrote it.
        functions: pickled reward functions that were passed in Python, by name.
        dataset: a `datasets.Dataset` in place of ``data.source``.
        eval_dataset: the same for the evaluation.

    Raises:
        ConfigError: the configuration, or something that it names, cannot work.
        DataError: a row cannot be used.
    """
    functions = functions or {}
    checks = (check_learner, check_run_dir, check_transfer, check_engine, check_tensorboard)
    for check_part in checks:
        check_part(given)
    if not given.rewards:
        raise ConfigError("no rewards", "set rewards, or pass reward_funcs")
    for reward in given.rewards:
        check_reward(reward, passed=functions)
    check_best_metric(given)
    passed = {"data": dataset, "eval": eval_dataset}
    pinned = pin(
        anchored(given),
        RunDir.at(given).revisions,
        [role for role, rows in passed.items() if rows is not None],
    )
    config = pinned.config
    tokenizer = load_tokenizer(config.model)
    sources = {"train": make_prompts(config.data, tokenizer, seed=config.seed, dataset=dataset)}
    if config.eval.eval_steps:
        section = eval_section(config.data, config.eval, seed=config.seed)
        sources["eval"] = make_prompts(
            section, tokenizer, seed=config.seed, stream="eval", dataset=eval_dataset
        )
    return Checked(
        given=given,
        config=config,
        functions=functions,
        revisions=pinned.revisions,
        revision_changes=pinned.changed,
        tokenizer=tokenizer,
        sources=sources,
        eval_prompts=sources["eval"].take(config.eval.num_prompts) if "eval" in sources else (),
    )


def anchored(config: RunConfig) -> RunConfig:
    """The configuration with absolute paths of model, rewards and data, for processes elsewhere.

    Raises:
        ConfigError: the model's path holds no model.
    """
    check_model_path(config.model)
    own_data = {"data": anchored_source(config.eval.data)}
    sections = {
        "model": anchored_model(config.model),
        "data": anchored_source(config.data),
        "rewards": [anchor_reward(reward) for reward in config.rewards],
        "eval": config.eval.model_copy(update=own_data),
    }
    return config.model_copy(update=sections)
