"""`raygrpo plan`: a run's batch arithmetic, its processes, and the tensors that each will hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from raygrpo.actors.cluster.placement import address_of
from raygrpo.checks.arithmetic import batch_facts, fullest_step
from raygrpo.checks.memory import (
    Memory,
    Parts,
    generator_memory,
    learner_memory,
    model_size,
    store_memory,
)
from raygrpo.checks.resolved import resolve, this_machine
from raygrpo.config import RunConfig
from raygrpo.errors import ConfigError
from raygrpo.learner.deepspeed_config import check_learner

_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
_GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Actor:
    """The processes of one role, such as 2 of "learner rank"; ``memory`` are each one's tensors."""

    role: str
    count: int
    threads: int
    gpus: float
    memory: Memory

    @property
    def host_bytes(self) -> int:
        """The tensors of one process in the host's memory."""
        return sum(self.memory.host.values())

    @property
    def gpu_bytes(self) -> int:
        """The tensors of one process in the memory of each of its GPUs."""
        return sum(self.memory.gpu.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A run's plan; ``batch`` as `raygrpo.checks.arithmetic.batch_facts` gives it."""

    batch: Mapping[str, str]
    actors: tuple[Actor, ...]

    @property
    def host_bytes(self) -> int:
        """The tensors of all processes, each at its peak."""
        return sum(actor.count * actor.host_bytes for actor in self.actors)


def make_plan(config: RunConfig) -> Plan:
    """Plans a run from its configuration and the model's, at full lengths; loads no weights.

    Raises:
        ConfigError: there is no model configuration at ``model.path``, or ``learner.lora`` or
            ``learner.deepspeed`` cannot work.
    """
    check_learner(config)
    config = resolve(config, this_machine(config)).config
    threads = config.ray.threads
    try:
        size = model_size(config.model, lora=config.learner.lora)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"model.path {config.model.path!r} cannot be planned: {error}") from None
    prompt, gpus = config.data.max_prompt_length, config.ray.gpus
    update = fullest_step(config, prompt, hidden_size=size.hidden_size, layout=size.layout)
    batch = batch_facts(config, update, longest_prompt=prompt, num_prompts=None)
    learner = learner_memory(config, size, update)
    roles: list[tuple[str, int, int, float, Memory]] = [
        ("learner rank", config.learner.num_ranks, threads.learner, gpus.learner, learner),
        ("generator", config.generators.count, threads.generator, gpus.generator,
         generator_memory(config, size)),
        ("weight store", 1, 1, 0.0, store_memory(config, size)),
        ("scorer", config.scorers.count, 1, 0.0, Memory(host={})),
        ("driver and Ray", 1, 1, 0.0, Memory(host={})),
    ]  # fmt: skip
    actors = tuple(
        Actor(role=role, count=count, threads=threads, gpus=g, memory=memory)
        for role, count, threads, g, memory in roles
    )
    return Plan(batch=batch, actors=actors)


def check_fits(plan: Plan, *, host_bytes: int, gpu_bytes: int | None) -> None:
    """Compares the plan with the memory of one machine and of each GPU (None: there is no GPU).

    Raises:
        ConfigError: the tensors alone do not fit; names the largest role and what makes it smaller.
    """
    if plan.host_bytes > host_bytes:
        largest = max(plan.actors, key=lambda actor: actor.count * actor.host_bytes)
        raise ConfigError(
            f"the run's tensors alone need about {_size(plan.host_bytes)} of memory, "
            f"{largest.count} x {_size(largest.host_bytes)} of it for the {largest.role}; this "
            f"machine has {_size(host_bytes)}",
            _remedy(largest, largest.memory.host),
        )
    for actor in plan.actors:
        if actor.gpus:
            _check_gpu(actor, gpu_bytes)


def _check_gpu(actor: Actor, gpu_bytes: int | None) -> None:
    if gpu_bytes is None:
        raise ConfigError(
            f"a {actor.role} is to have {actor.gpus:g} GPUs; this machine has none",
            "set ray.gpus to 0, or ray.address to a cluster",
        )
    room, share = min(1.0, actor.gpus), actor.memory.gpu_share
    if share > room:
        raise ConfigError(
            f"vLLM takes {share:.0%} of a GPU, of which a {actor.role} has {room:.0%}",
            f"set generators.options: {{gpu_memory_utilization: {room:g}}} or lower",
        )
    has = int(gpu_bytes * (share or room))
    if actor.gpu_bytes > has:
        raise ConfigError(
            f"the tensors of a {actor.role} need about {_size(actor.gpu_bytes)} of GPU memory; it "
            f"would have {_size(has)}",
            _remedy(actor, actor.memory.gpu),
        )


def _remedy(actor: Actor, parts: Parts) -> str:
    if actor.role != "learner rank":
        return "lower generators.count, generators.max_rows or sampling.max_tokens"
    largest = max(parts, key=parts.__getitem__)
    if largest in ("activations", "language head"):
        return "lower train.tokens_per_microbatch, or set learner.gradient_checkpointing: true"
    if parts is actor.memory.gpu:
        return (
            "set model.dtype: bfloat16, learner.lora, more ranks with learner.zero_stage: 3, or "
            "DeepSpeed's offload in learner.deepspeed"
        )
    return "set model.dtype: bfloat16, learner.lora, or more ranks with learner.zero_stage: 3"


def print_plan(config: RunConfig) -> None:
    """Prints the plan, and compares it with this machine if the run would use no other.

    Raises:
        ConfigError: `make_plan` or `check_fits` refuses the run.
    """
    plan = make_plan(config)
    console = Console()
    console = console if console.is_terminal else Console(width=140)
    table = Table("what", "value", box=None, show_header=False)
    for name, value in plan.batch.items():
        table.add_row(escape(name), escape(value))
    console.print(table, _actor_table(plan))
    total = f"tensors of all actors at their peaks: {_size(plan.host_bytes)}"
    address = address_of(config)
    if address != "local":
        console.print(f"{total}, on {address}")
        return
    memory = machine_memory()
    console.print(f"{total}, of {_size(memory)} here")
    console.print("tensors alone are counted: leave room for Python, libraries and allocators")
    gpu = torch.cuda.mem_get_info(0)[1] if torch.cuda.is_available() else None
    check_fits(plan, host_bytes=memory, gpu_bytes=gpu)


def machine_memory() -> int:
    """The bytes of memory of this machine, or of the container around this process."""
    limit = _CGROUP_LIMIT.read_text().strip() if _CGROUP_LIMIT.is_file() else "max"
    total = int(psutil.virtual_memory().total)
    return min(total, int(limit)) if limit.isdecimal() else total


def _actor_table(plan: Plan) -> Table:
    table = Table("actor", "processes", "threads", "GPUs", "tensors of each", "of what", box=None)
    for actor in plan.actors:
        on_host = [f"{_size(actor.host_bytes)} (host)", _named(actor.memory.host)]
        counts = [actor.role, str(actor.count), str(actor.threads), f"{actor.gpus:g}"]
        if actor.memory.gpu:
            share = actor.memory.gpu_share
            of_gpu = f"{share:.0%} of each" if share else _size(actor.gpu_bytes)
            table.add_row(*counts, f"{of_gpu} (GPU)", _named(actor.memory.gpu))
            counts = [""] * 4
        table.add_row(*counts, *on_host)
    return table


def _named(parts: Parts) -> str:
    largest = sorted(parts.items(), key=lambda part: -part[1])
    return ", ".join(f"{name} {_size(value)}" for name, value in largest if value >= 2**20)


def _size(num_bytes: int) -> str:
    return f"{num_bytes / _GIB:.2f} GiB" if num_bytes >= _GIB else f"{num_bytes / 2**20:.0f} MiB"
