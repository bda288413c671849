"""The learner on DeepSpeed: ZeRO 0 to 3, fp32, or bf16 with fp32 master weights."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from raygrpo.config import RunConfig
from raygrpo.errors import ConfigError
from raygrpo.learner.attention.ulysses import SequenceShard
from raygrpo.learner.base import Learner
from raygrpo.learner.deepspeed_config import clips_itself, deepspeed_config
from raygrpo.learner.inputs import PolicyInputs
from raygrpo.learner.loading import load_policy
from raygrpo.learner.lora import add_adapter
from raygrpo.learner.policy import PolicyModel
from raygrpo.learner.shards import Layout
from raygrpo.models import DTYPES
from raygrpo.weights.buckets import BUCKET_BYTES

if TYPE_CHECKING:
    from jaxtyping import Float, Float32


class DeepSpeedLearner(Learner):
    """One rank of a ZeRO-sharded learner; all ranks construct it together.

    Limits: each rank loads the whole model on its CPU before DeepSpeed shards it, so that the
    initial weights are exactly those of a plain load. The frozen reference of the KL stays whole on
    each rank's device, in the model's dtype. ZeRO-0 in bf16 accumulates gradients over microbatches
    in bf16; the other stages accumulate in fp32.

    Args:
        rank: of ``config.learner.num_ranks``.
        local_rank: among the ranks of this host.
        device: ``cpu`` (gloo) or ``cuda``, ``cuda:0``, ... (NCCL).

    Raises:
        ConfigError: the model or ``learner.deepspeed`` cannot be used.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        rank: int = 0,
        local_rank: int = 0,
        master_addr: str = "127.0.0.1",
        master_port: int,
        device: str = "cpu",
    ) -> None:
        settings = deepspeed_config(config)
        place = torch.device(device)
        if place.type == "cuda" and place.index is None:
            place = torch.device("cuda", 0)
        _set_environment(config, rank, local_rank, master_addr, master_port, place)
        _fix_kernels(config)
        policy = load_policy(
            config.model,
            seed=config.seed,
            dtype=DTYPES[config.model.dtype],
            temperature=config.sampling.temperature,
            entropy_gradient=config.loss.has_entropy_bonus,
            gradient_checkpointing=config.learner.gradient_checkpointing,
        )
        frozen = None
        if config.learner.lora:
            add_adapter(policy.model, config)
        elif config.loss.beta:
            frozen = copy.deepcopy(policy).requires_grad_(False).to(place)
        super().__init__(
            config,
            policy=policy,
            reference=frozen,
            device=place,
            rank=rank,
            layout=Layout(
                num_ranks=config.learner.num_ranks,
                zero_stage=config.learner.zero_stage,
                dtype=config.model.dtype,
            ),
        )
        self._stage = config.learner.zero_stage
        section = config.optimizer
        self._optimizer = torch.optim.AdamW(
            [parameter for parameter in policy.parameters() if parameter.requires_grad],
            lr=section.lr,
            # One pass over weights, moments and gradient, on a CPU too.
            fused=True,
            **section.adamw.model_dump(),
        )
        _init_distributed(config, place)
        if (size := config.learner.sequence_parallel) > 1:
            shard = SequenceShard(
                policy.model, rank=rank, num_ranks=config.learner.num_ranks, size=size
            )
            policy.share_rows(shard)
            if frozen is not None:
                frozen.share_rows(shard)
        self._engine = _make_engine(policy, self._optimizer, settings)

    def _copies(
        self, parameters: Iterable[tuple[str, nn.Parameter]]
    ) -> Iterator[tuple[str, Float[Tensor, "..."]]]:
        for group in _groups(parameters, BUCKET_BYTES):
            yield from self._gather(group)

    def close(self) -> None:
        import torch.distributed as dist

        self._engine.destroy()
        if dist.is_initialized():
            dist.destroy_process_group()

    def _gather(
        self, group: list[tuple[str, nn.Parameter]]
    ) -> list[tuple[str, Float[Tensor, "..."]]]:
        """CPU copies of whole parameters; under ZeRO-3 gathered for the copy alone."""
        if self._stage < 3:
            return [(name, parameter.detach().cpu().clone()) for name, parameter in group]
        from deepspeed.runtime.zero.partition_parameters import GatheredParameters

        with GatheredParameters([parameter for _, parameter in group]):
            return [(name, parameter.detach().cpu().clone()) for name, parameter in group]

    def _forward(self, inputs: PolicyInputs) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
        output: tuple[Tensor, Tensor] = self._engine(inputs)
        return output

    def _backward(self, loss: Float[Tensor, ""], *, last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(last)
        # DeepSpeed averages gradients over ranks; the loss is normalised globally already.
        self._engine.backward(loss * self.config.learner.num_ranks)

    def _apply(self, lr: float) -> float:
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        if clips_itself(self.config):
            return self._clip_and_step()
        self._engine.step()
        # ZeRO 1 to 3 and bf16 skip a step whose gradient is not finite.
        if not self._engine.was_step_applied():
            return float("nan")
        return float(self._engine.get_global_grad_norm())

    def _clip_and_step(self) -> float:
        max_norm = self.config.optimizer.max_grad_norm or float("inf")
        norm = float(torch.nn.utils.clip_grad_norm_(self._policy.parameters(), max_norm))
        if norm < float("inf"):
            self._engine.step()
        else:
            self._engine.zero_grad()
        return norm

    def _master_weights(self) -> Iterator[tuple[str, Float32[Tensor, "..."]]]:
        from deepspeed.utils import safe_get_full_fp32_param

        named = self._policy.model.named_parameters()
        trained = [(name, parameter) for name, parameter in named if parameter.requires_grad]
        if self._stage == 0:
            masters = iter(self._masters())
            yield from ((name, next(masters)) for name, _ in trained)
            return
        for name, parameter in trained:
            yield name, safe_get_full_fp32_param(parameter)

    def _sum_over_ranks(self, value: float) -> float:
        import torch.distributed as dist

        total = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return float(total)

    def _masters(self) -> list[Float32[Tensor, "..."]]:
        """This rank's fp32 weights, whole or flat parts; AdamW's state belongs to these tensors."""
        if self._stage == 3:
            return list(self._engine.optimizer.fp32_partitioned_groups_flat)
        return [item for group in self._optimizer.param_groups for item in group["params"]]

    def _state(self) -> dict[str, Any]:
        masters = self._masters()
        return {
            "masters": [master.detach().cpu() for master in masters],
            "optimizer": [dict(self._optimizer.state.get(master, {})) for master in masters],
        }

    def _check_state(self, state: dict[str, Any]) -> None:
        if [m.shape for m in state["masters"]] != [m.shape for m in self._masters()]:
            raise ConfigError("the checkpoint is of another model", "set model.path to that model")

    def _load_state(self, state: dict[str, Any]) -> None:
        for master, saved, moments in zip(
            self._masters(), state["masters"], state["optimizer"], strict=True
        ):
            master.data.copy_(saved)
            held = self._optimizer.state[master]
            for name, value in moments.items():
                if name in held:
                    held[name].copy_(value)
                else:
                    held[name] = value.to(master.device)
        self._publish_masters()

    def _publish_masters(self) -> None:
        """Copies the fp32 weights into the model, as an optimizer step does at its end."""
        optimizer = self._engine.optimizer
        if self._stage == 3:
            # Small weights stay whole between steps, and whole weights would not be gathered anew.
            optimizer._partition_all_parameters()
            for index in range(len(optimizer.fp32_partitioned_groups_flat)):
                optimizer._reassign_or_swap_out_partitioned_parameters(index)
            if optimizer.persistent_parameters:
                optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
        elif self._stage:
            optimizer.update_lp_params()
        elif not clips_itself(self.config):
            for masters, weights in zip(optimizer.fp32_groups, optimizer.fp16_groups, strict=True):
                for master, weight in zip(masters, weights, strict=True):
                    weight.data.copy_(master.data)


def _set_environment(
    config: RunConfig,
    rank: int,
    local_rank: int,
    master_addr: str,
    master_port: int,
    device: torch.device,
) -> None:
    """Sets the variables that DeepSpeed reads at its import and at the process group's start."""
    # A process that sees only its own GPU calls it 0, whatever its rank on the host.
    local = (device.index or 0) if device.type == "cuda" else local_rank
    os.environ.update(
        DS_ACCELERATOR=device.type,
        RANK=str(rank),
        WORLD_SIZE=str(config.learner.num_ranks),
        LOCAL_RANK=str(local),
        MASTER_ADDR=master_addr,
        MASTER_PORT=str(master_port),
    )
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))
    if master_addr in ("127.0.0.1", "localhost"):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


def _fix_kernels(config: RunConfig) -> None:
    if config.ray.threads.learner:
        torch.set_num_threads(config.ray.threads.learner)
    torch.manual_seed(config.seed)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        # Filling DeepSpeed's large buffers at each update takes time and makes nothing exact.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def _init_distributed(config: RunConfig, device: torch.device) -> None:
    import deepspeed
    import torch.distributed as dist
    from deepspeed.utils import logger

    logger.setLevel("WARNING")
    # DeepSpeed calls collectives by names that torch warns of, at every call.
    warnings.filterwarnings(
        "ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning
    )
    # Otherwise DeepSpeed compiles a shared-memory op: a minute, and a compiler needed.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        deepspeed.init_distributed(
            dist_backend="nccl" if device.type == "cuda" else "gloo",
            auto_mpi_discovery=False,
            timeout=timedelta(seconds=config.ray.timeouts_s.update),
        )


def _make_engine(
    policy: PolicyModel, optimizer: torch.optim.Optimizer, settings: dict[str, Any]
) -> Any:
    import deepspeed
    from deepspeed.runtime.zero import register_external_parameter

    # `LogprobHead` uses the head's weight without the head's own forward. As a leaf module, whose
    # gradients are reduced at its backward, the head would lose a tied embedding's part of them.
    for parameter in policy.logprob_head.head.parameters():
        register_external_parameter(policy.logprob_head, parameter)
    engine, *_ = deepspeed.initialize(
        model=policy, optimizer=optimizer, config=settings, dist_init_required=False
    )
    return engine


def _groups(
    parameters: Iterable[tuple[str, nn.Parameter]], max_bytes: int
) -> Iterator[list[tuple[str, nn.Parameter]]]:
    """Parameters in order, in runs of at most ``max_bytes`` (or one parameter)."""
    run: list[tuple[str, nn.Parameter]] = []
    size = 0
    for name, parameter in parameters:
        # Under ZeRO-3 numel() is 0 and ds_numel the real number.
        count = getattr(parameter, "ds_numel", parameter.numel())
        num_bytes = count * parameter.element_size()
        if run and size + num_bytes > max_bytes:
            yield run
            run, size = [], 0
        run.append((name, parameter))
        size += num_bytes
    if run:
        yield run
