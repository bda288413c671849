"""What a run would do, checked and counted without starting it: ``raygrpo train --dry-run``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import AutoConfig

from raygrpo.actors.cluster.placement import address_of, check_local_labels, demand_of
from raygrpo.algorithm.window import train_request
from raygrpo.checks.arithmetic import Lines, batch_facts, fullest_step
from raygrpo.checks.checked import Checked, check
from raygrpo.checks.resolved import resolve, this_machine
from raygrpo.checks.warnings import dtype_problem, eval_problem
from raygrpo.config import RewardSection, RunConfig
from raygrpo.config.sections import reward_name
from raygrpo.errors import ConfigError, RewardError
from raygrpo.learner.attention.ulysses import check_attention
from raygrpo.learner.loading import expected_layout
from raygrpo.models import attention_masks
from raygrpo.rewards.contract import TrainerState
from raygrpo.rewards.host import RewardHost
from raygrpo.rewards.loading import REWARD_MODEL
from raygrpo.storage.run_dir import RunDir
from raygrpo.types import Completion, Group, Prompt, Version

MAX_ROWS = 1000
_SHOWN_CHARACTERS = 600
# Columns whose text may be the right answer, so that the fake completion has a chance of reward.
_ANSWERS = ("answer", "solution", "target", "label")
_FALLBACK = "42"


def print_plan(config: RunConfig) -> None:
    """Prints what `dry_run` finds; it raises the same."""
    console = Console()
    (console if console.is_terminal else Console(width=140)).print(_table(dry_run(config)))


def dry_run(config: RunConfig) -> dict[str, Lines]:
    """Checks a run as far as this is possible without its actors; the plan, by section.

    The model's weights are not loaded, and the run directory is not touched.

    Raises:
        ConfigError: the configuration, or what it points to, cannot work.
        DataError: a row cannot be used.
        RewardError: a reward cannot be loaded, or fails on the fake completion.
        InfraError: no cluster answers at the address.
    """
    checked = check(config)
    prompts = checked.prompts.take(MAX_ROWS)
    lengths = np.array([prompt.token_ids.size for prompt in prompts])
    longest = int(lengths.max())
    # Nobody knows where a stream ends.
    num_prompts = len(checked.prompts) if isinstance(checked.prompts, Sized) else None
    architecture = check_model(checked.config, longest)
    update = fullest_step(
        checked.config,
        longest,
        hidden_size=architecture.hidden_size,
        layout=expected_layout(architecture),
    )
    return {
        "run": _run_facts(checked, architecture),
        "data": _data_facts(checked, num_prompts, prompts, lengths),
        "batch": batch_facts(
            checked.config, update, longest_prompt=longest, num_prompts=num_prompts
        ),
        "placement": _placement_facts(checked.config),
        "rewards": score_fake(checked.config.rewards, fake_group(checked, prompts[0])),
    }


def check_model(config: RunConfig, longest_prompt: int) -> Any:
    """The model's text configuration, checked as far as this is possible without its weights.

    Raises:
        ConfigError: an attention that is not supported, here or by ranks that share their rows, or
            prompts and completions that together are longer than the model's positions.
    """
    model, sampling = config.model, config.sampling
    architecture = AutoConfig.from_pretrained(
        model.path, revision=model.revision, trust_remote_code=model.trust_remote_code
    )
    nowhere = torch.zeros(1, 1, dtype=torch.long)
    everything = torch.ones(1, 1, 1, dtype=torch.bool)
    attention_masks(architecture, everything, nowhere, nowhere, torch.float32)
    check_attention(architecture, config.learner.sequence_parallel)
    text = architecture.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    if limit is not None and longest_prompt + sampling.max_tokens > limit:
        raise ConfigError(
            f"a prompt of {longest_prompt} tokens and a completion of {sampling.max_tokens} are "
            f"longer than the model's {limit} positions",
            f"lower sampling.max_tokens to {max(1, limit - longest_prompt)}, or "
            "data.max_prompt_length (with data.overlong: drop)",
        )
    return text


def _run_facts(checked: Checked, architecture: Any) -> Lines:
    config, run_dir = checked.given, RunDir.at(checked.given)
    steps = [path.name for path in run_dir.checkpoints.glob("step-*")]
    origin = "random weights" if config.model.random_init else "its weights"
    slow, same_rows = dtype_problem(checked.config), eval_problem(checked.config)
    return {
        "recipe": config.recipe,
        "directory": f"{config.run_dir} ({f'resumes {max(steps)}' if steps else 'new'})",
        "model": f"{config.model.path}, {architecture.model_type}, {origin}, {config.model.dtype}",
        "positions": f"{getattr(architecture, 'max_position_embeddings', 'no limit')} tokens",
        **({"slow dtype": slow} if slow else {}),
        **({"evaluation": same_rows} if same_rows else {}),
        **{f"revision of {role}": what for role, what in checked.revisions.items()},
    }


def _data_facts(
    checked: Checked, num_prompts: int | None, prompts: Sequence[Prompt], lengths: Any
) -> Lines:
    section, source = checked.config.data, checked.prompts
    shown = checked.tokenizer.decode(prompts[0].token_ids.tolist())
    cut = "..." if len(shown) > _SHOWN_CHARACTERS else ""
    return {
        "source": checked.given.data.source,
        "prompts": f"{num_prompts or 'streamed'} ({source.num_dropped} dropped, "
        f"{source.num_truncated} truncated)",
        f"prompt tokens of {len(prompts)}": f"mean {lengths.mean():.1f}, "
        f"p95 {np.percentile(lengths, 95):.0f}, max {lengths.max()} "
        f"of max_prompt_length {section.max_prompt_length}",
        "first prompt": repr(shown[:_SHOWN_CHARACTERS]) + cut,
        "evaluation": f"{len(checked.eval_prompts)} prompts every {checked.config.eval.eval_steps} "
        "steps"
        if checked.eval_prompts
        else "none",
    }


def _placement_facts(config: RunConfig) -> Lines:
    address = address_of(config)
    facts = this_machine(config)
    if address == "local":
        where = _check_machine(config, facts.cores)
    else:
        # Ray is imported only where a cluster must be asked.
        from raygrpo.actors.cluster.connect import connect, disconnect, living_nodes

        connection = connect(config)
        facts = replace(facts, local=False, nodes=living_nodes())
        disconnect(connection)
        where = f"the cluster at {address}, where it fits"
    config, demand = resolve(config, facts).config, demand_of(config)
    return {
        "processes": f"{demand.num_processes}: {config.learner.num_ranks} learner ranks, "
        f"{config.generators.count} generators, {config.scorers.count} scorers, the rest of them "
        "weight store and reward models",
        "threads": f"{config.ray.threads.learner} a learner rank, {config.ray.threads.generator} "
        "a generator",
        "GPUs": f"{demand.num_gpus:g} ({demand.gpu_text})",
        "engine": f"{facts.engine.engine} ({facts.engine.reason})",
        "ZeRO stage": str(config.learner.zero_stage),
        "where": where,
    }


def _check_machine(config: RunConfig, cores: int) -> str:
    demand, present = demand_of(config), torch.cuda.device_count()
    if demand.num_gpus > present:
        raise ConfigError(
            f"the run asks for {demand.num_gpus:g} GPUs ({demand.gpu_text}); this machine has "
            f"{present}",
            "lower learner.num_ranks, generators.count or ray.gpus, or set ray.address to a "
            "cluster",
        )
    check_local_labels(config)
    return f"this machine: {cores} cores, {present} GPUs"


def fake_group(checked: Checked, prompt: Prompt) -> Group:
    """A group of one completion that nobody sampled: the row's answer where it has one."""
    found = (prompt.columns.get(name) for name in _ANSWERS)
    text = next((value for value in found if isinstance(value, str) and value), _FALLBACK)
    request = train_request(checked.config, 0, prompt, Version(0, 0))
    request = replace(request, sampling=replace(request.sampling, num_completions=1))
    ids = checked.tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = np.array(ids or [checked.tokenizer.eos_token_id], np.int32)
    completion = Completion(
        token_ids=ids,
        logprobs=np.zeros(ids.size, np.float32),
        loss_mask=np.zeros(ids.size, np.bool_),
        text=text,
        finish="stop",
        version_runs=((Version(0, 0), ids.size),),
    )
    return Group(request=request, completions=(completion,))


def score_fake(rewards: Sequence[RewardSection], group: Group) -> Lines:
    """Scores a group of one by the real rewards in their child processes.

    Raises:
        RewardError: one cannot be loaded, or fails; with its traceback.
    """
    local = [reward for reward in rewards if reward.func != REWARD_MODEL]
    facts = {"fake completion": repr(group.completions[0].text[:_SHOWN_CHARACTERS])}
    if local:
        with RewardHost(local, {}) as host:
            scored = host.score(group, TrainerState(global_step=0, max_steps=1))
        score = scored.scores[0]
        if score.error is not None:
            raise RewardError(f"{score.error}\n{scored.traceback or ''}".rstrip())
        weights = {reward_name(reward): reward.weight for reward in local}
        facts |= {
            f"{name} (weight {weights[name]:g})": f"{_shown(part)} in {scored.reward_s[name]:.2f} s"
            for name, part in score.parts.items()
        }
        facts["sum"] = _shown(score.value)
    in_actors = [reward_name(reward) for reward in rewards if reward.func == REWARD_MODEL]
    return facts | dict.fromkeys(in_actors, "skipped: it runs in actors")


def _shown(value: float | None) -> str:
    return "none" if value is None else f"{value:g}"


def _table(sections: Mapping[str, Lines]) -> Table:
    table = Table("", "what", "value", box=None, show_header=False)
    for title, facts in sections.items():
        for index, (name, value) in enumerate(facts.items()):
            table.add_row("" if index else f"[bold]{title}[/bold]", escape(name), escape(value))
        table.add_row()
    return table
