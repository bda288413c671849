"""One training step, written once for every backend.

A step prepares all microbatches (`_prepare`, reference logprobs included), makes a first pass where
the loss needs one, then one optimizer update per minibatch and iteration (`_update_once`). Backends
add forward, backward, the optimizer and their state. All ranks must call the methods in step.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from raygrpo.algorithm.entropy import EntropyControl
from raygrpo.algorithm.loss import LossInputs, expected_grad, policy_loss
from raygrpo.algorithm.packing import RowLayout
from raygrpo.algorithm.step_plan import loss_config
from raygrpo.config import RunConfig
from raygrpo.errors import ConfigError, NumericError, RayGrpoError, StorageError
from raygrpo.learner.first_pass import StepCache, first_pass
from raygrpo.learner.inputs import PolicyInputs, policy_inputs
from raygrpo.learner.lora import adapter_off, adapter_parameters, base_parameters
from raygrpo.learner.moving_reference import MovingReference
from raygrpo.learner.policy import PolicyModel
from raygrpo.learner.schedule import learning_rate
from raygrpo.learner.shards import (
    Layout,
    random_state,
    read_shard,
    set_random_state,
    write_shard,
)
from raygrpo.learner.watch import MovementWatch, check_trainable
from raygrpo.types import FloatArray, Microbatch, Stat, merge_stats
from raygrpo.weights.adapter import merged_weights

if TYPE_CHECKING:
    from jaxtyping import Float, Float32, Shaped

    from raygrpo.algorithm.shapes import FloatBT, FloatS, IntBT, Scalar

# Optimizer updates in a row that may be skipped because a loss or gradient was not finite.
MAX_SKIPPED_UPDATES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prepared:
    """A microbatch on the device; ``ref_logprobs`` is None when beta is 0."""

    inputs: PolicyInputs
    sampler_logprobs: FloatBT
    sequence_ids: IntBT
    advantages: FloatS
    loss_weights: FloatS
    ref_logprobs: FloatBT | None


class Learner(ABC):
    """One rank of the learner; all methods are collective over the ranks.

    A step is ``num_iterations`` passes over its minibatches, one optimizer update each. An update
    whose loss or gradient is not finite is skipped, on all ranks and at every ZeRO stage.

    Attributes:
        num_updates: optimizer updates done or skipped; it determines the learning rate.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        policy: PolicyModel,
        reference: PolicyModel | None,
        device: torch.device,
        rank: int,
        layout: Layout,
    ) -> None:
        self.config = config
        self.device = device
        self.rank = rank
        self.num_updates = 0
        self._num_skipped = 0
        self._watch: MovementWatch | None = None
        self._policy = policy
        self._reference = reference
        self._moving: MovingReference | None = None
        if reference is not None and config.learner.reference.sync_steps:
            self._moving = MovingReference(reference.model)
        self._layout = layout
        self._sequence_ranks = config.learner.sequence_parallel
        if not config.learner.lora:
            check_trainable(policy.model)
        self._loss_config = loss_config(config)
        loss = config.loss
        self._entropy = EntropyControl(coef=loss.entropy_coef, target=loss.entropy_target)
        train = config.train
        self._updates_per_step = train.num_iterations * train.num_minibatches
        self._total_updates = train.steps * self._updates_per_step

    @property
    def hf_model(self) -> Any:
        """The Hugging Face model; its weights may be sharded."""
        return self._policy.model

    @property
    def data_share(self) -> tuple[int, int]:
        """(share, number of shares): the part of a step that this rank computes, alone or not."""
        size = self._sequence_ranks
        return self.rank // size, self.config.learner.num_ranks // size

    @property
    def layout(self) -> RowLayout:
        """The rows of microbatches that the model computes rightly."""
        return self._policy.layout

    def update(
        self, minibatches: Sequence[Sequence[Microbatch]], *, skip: bool = False
    ) -> dict[str, Stat]:
        """Trains one step on this rank's microbatches; returns this rank's statistics.

        All ranks pass equal numbers of minibatches and of microbatches. Statistics of ranks are
        merged by addition; the global ones (``loss``, ``grad_norm``, ``learning_rate``) come from
        rank 0 alone, with one count per update. A minibatch without microbatches makes no optimizer
        update, but counts as one.

        Args:
            skip: train nothing and only count the step's updates (``minibatches`` is not read).

        Raises:
            NumericError: on every rank, after more than `MAX_SKIPPED_UPDATES` skipped updates in a
                row, or when a trainable tensor has no gradient or does not move.
        """
        if skip:
            self.num_updates += self._updates_per_step
            return {}
        if self._watch is None:
            self._watch = self._start_watch()
        batches = [[self._prepare(item) for item in minibatch] for minibatch in minibatches]
        inputs = [[item.inputs for item in batch] for batch in batches]
        caches = first_pass(inputs, self._forward, self._sum_over_rows, self._loss_config)
        stats: list[dict[str, Stat]] = []
        for _ in range(self.config.train.num_iterations):
            for index, batch in enumerate(batches):
                found, caches[index] = self._update_once(batch, caches[index])
                stats.append(found)
        self._sync_reference()
        # Ranks that share their rows have the same statistics.
        return {} if self.rank % self._sequence_ranks else merge_stats(list(stats))

    def score(self, microbatch: Microbatch) -> Float32[FloatArray, "B T"]:
        """Logprobs of the trained tokens under the policy, in nats; 0 elsewhere."""
        with torch.no_grad():
            logprobs, _ = self._forward(policy_inputs(microbatch, self.device))
        scores: FloatArray = logprobs.cpu().numpy()
        return scores

    def save(self, directory: Path | str) -> None:
        """Writes this rank's weights, optimizer, counter and random states into ``directory``.

        Raises:
            StorageError: the rank's file cannot be written.
        """
        state = {
            "num_updates": self.num_updates,
            "random": random_state(self.device),
            "entropy": (self._entropy.coef, self._entropy.entropy),
            **self._state(),
        }
        if self._moving is not None:
            state["reference"] = self._moving.state()
        write_shard(Path(directory), self.rank, self._layout, state)

    def load(self, directory: Path | str) -> None:
        """Restores the state that `save` wrote, bit for bit.

        Raises:
            ConfigError: the state is of another number of ranks, ZeRO stage, dtype or model; the
                learner is unchanged then.
            StorageError: the file of this rank, or of another, is missing or unreadable.
        """
        failure: RayGrpoError | None = None
        state: dict[str, Any] = {}
        try:
            state = read_shard(Path(directory), self.rank, self._layout)
            self._check_state(state)
        except (ConfigError, StorageError) as error:
            failure = error
        failed = self._sum_over_ranks(0.0 if failure is None else 1.0)
        if failure is not None:
            raise failure
        if failed:
            raise StorageError(f"{failed:.0f} other ranks cannot load from {directory}")
        self._load_state(state)
        if self._entropy.target is not None and "entropy" in state:
            coef, entropy = state["entropy"]
            self._entropy = replace(self._entropy, coef=coef, entropy=entropy)
        if self._moving is not None and "reference" in state:
            self._moving.load(state["reference"])
        set_random_state(state["random"], self.device)
        self.num_updates = int(state["num_updates"])

    def named_weights(self) -> Iterator[tuple[str, Shaped[Tensor, "..."]]]:
        """Weights and persistent buffers by their Hugging Face names, as CPU copies.

        The iterator is lazy; every rank must iterate to the end, in step. Tied weights come once,
        floating-point weights in the model's dtype. With LoRA the adapter is merged in.
        """
        model, lora = self._policy.model, self.config.learner.lora
        base = self._copies(base_parameters(model))
        yield from merged_weights(base, dict(self.adapter_weights()), lora)
        yield from persistent_buffers(model)

    def adapter_weights(self) -> Iterator[tuple[str, Float[Tensor, "..."]]]:
        """The adapter's weights by peft's names, as CPU copies; none without LoRA."""
        yield from self._copies(adapter_parameters(self._policy.model))

    @abstractmethod
    def close(self) -> None:
        """Frees engine and process group; the learner cannot be used afterwards."""

    @abstractmethod
    def _copies(
        self, parameters: Iterable[tuple[str, torch.nn.Parameter]]
    ) -> Iterator[tuple[str, Float[Tensor, "..."]]]:
        """CPU copies of whole parameters, lazily; every rank must iterate to the end, in step."""

    @abstractmethod
    def _forward(self, inputs: PolicyInputs) -> tuple[FloatBT, FloatBT]:
        """Logprobs and entropies under the policy."""

    @abstractmethod
    def _backward(self, loss: Scalar, *, last: bool) -> None:
        """Adds the gradient of this rank's part of the loss; ``last`` ends the minibatch."""

    @abstractmethod
    def _apply(self, lr: float) -> float:
        """Clips and applies the gradient; returns its norm before clipping.

        Under a norm that is not finite the weights stay as they are.
        """

    @abstractmethod
    def _master_weights(self) -> Iterator[tuple[str, Float32[Tensor, "..."]]]:
        """The trained fp32 weights by name, whole; every rank must iterate to the end."""

    @abstractmethod
    def _sum_over_ranks(self, value: float) -> float: ...

    @abstractmethod
    def _state(self) -> dict[str, Any]:
        """This rank's weights and optimizer state."""

    @abstractmethod
    def _check_state(self, state: dict[str, Any]) -> None:
        """Raises ConfigError when the state is of another model; the learner stays unchanged."""

    @abstractmethod
    def _load_state(self, state: dict[str, Any]) -> None: ...

    def _prepare(self, microbatch: Microbatch) -> _Prepared:
        inputs = policy_inputs(microbatch, self.device)
        ref_logprobs = None
        if self._reference is not None:
            with torch.no_grad():
                ref_logprobs, _ = self._reference(inputs)
        elif self.config.loss.beta:
            with torch.no_grad(), adapter_off(self._policy.model):
                ref_logprobs, _ = self._forward(inputs)
        return _Prepared(
            inputs=inputs,
            sampler_logprobs=torch.tensor(microbatch.sampler_logprobs, device=self.device),
            sequence_ids=torch.tensor(microbatch.sequence_ids, device=self.device),
            advantages=torch.tensor(microbatch.advantages, device=self.device),
            loss_weights=torch.tensor(microbatch.loss_weights, device=self.device),
            ref_logprobs=ref_logprobs,
        )

    def _update_once(
        self, batch: Sequence[_Prepared], caches: Sequence[StepCache]
    ) -> tuple[dict[str, Stat], list[StepCache]]:
        """One optimizer update: its statistics, and the caches with old logprobs from now on."""
        lr = learning_rate(self.num_updates, self._total_updates, self.config.optimizer)
        config = self._loss_config.model_copy(update={"entropy_coef": self._entropy.applied})
        stats: list[dict[str, Stat]] = []
        filled: list[StepCache] = []
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for index, (item, cache) in enumerate(zip(batch, caches, strict=True)):
            given = _loss_inputs(item, cache)
            expected = expected_grad(given, item.inputs.rows, item.inputs.columns, config)
            logprobs, entropies = self._forward(replace(item.inputs, expected_grad=expected))
            found = replace(given, logprobs=logprobs, entropies=entropies)
            loss, part = policy_loss(found, config)
            total += loss.detach()
            if last := index == len(batch) - 1:
                # A part that is not finite on one rank makes the sum so on all: the ranks agree.
                total.fill_(self._sum_over_ranks(float(total)) / self._sequence_ranks)
                # Every ZeRO stage discards a whole gradient that is not finite at the end.
                loss = loss if total.isfinite() else loss * math.nan
            self._backward(loss, last=last)
            known = cache.old_logprobs is not None
            filled.append(cache if known else replace(cache, old_logprobs=logprobs.detach()))
            stats.append(part)
        self.num_updates += 1
        if not batch:
            return {}, filled
        if not self._finish(float(total), lr, stats):
            return ({"skipped_updates_frac": Stat.of(1.0)} if self.rank == 0 else {}), filled
        self._adapt_entropy(merge_stats(list(stats))["entropy"])
        return merge_stats(list(stats)), filled

    def _sum_over_rows(self, value: float) -> float:
        """A sum over the ranks; rows that several ranks share count once."""
        return self._sum_over_ranks(value) / self._sequence_ranks

    def _adapt_entropy(self, entropy: Stat) -> None:
        if self._entropy.target is not None and (count := self._sum_over_ranks(entropy.count)):
            self._entropy = self._entropy.after(self._sum_over_ranks(entropy.sum) / count)

    def _sync_reference(self) -> None:
        """Moves the reference towards the policy, every so many steps."""
        section, step = self.config.learner.reference, self.num_updates // self._updates_per_step
        if self._moving is not None and step % section.sync_steps == 0:
            self._moving.move(self.named_weights(), section.sync_alpha)

    def _finish(self, loss: float, lr: float, stats: list[dict[str, Stat]]) -> bool:
        """Applies the gradient and adds the update's global statistics; False: it was skipped."""
        norm = self._apply(lr)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self._num_skipped += 1
            if self._num_skipped > MAX_SKIPPED_UPDATES:
                raise NumericError(
                    f"{self._num_skipped} optimizer updates in a row were skipped: in the last, "
                    f"number {self.num_updates}, the loss is {loss} and the gradient norm {norm}; "
                    "the weights are those before them",
                    "lower optimizer.lr, or resume from an earlier checkpoint",
                )
            return False
        self._num_skipped = 0
        if lr and self._watch is not None:
            self._watch.after_update(norm, lr)
        if self.rank == 0:
            values = {"loss": loss, "grad_norm": norm, "learning_rate": lr}
            values["skipped_updates_frac"] = 0.0
            if self.config.loss.has_entropy_bonus:
                values["entropy_coef"] = self._entropy.applied
            stats.append({name: Stat.of(value) for name, value in values.items()})
        return True

    def _start_watch(self) -> MovementWatch:
        named = self._policy.model.named_parameters()
        trained = {name: parameter for name, parameter in named if parameter.requires_grad}
        return MovementWatch(trained, self._master_weights, self._sum_over_ranks)


def _loss_inputs(item: _Prepared, cache: StepCache) -> LossInputs:
    """The inputs known before the forward pass; ``logprobs`` is a placeholder."""
    return LossInputs(
        logprobs=item.sampler_logprobs,
        old_logprobs=cache.old_logprobs,
        policy_mask=cache.policy_mask,
        sampler_logprobs=item.sampler_logprobs,
        ref_logprobs=item.ref_logprobs,
        entropies=None,
        loss_mask=item.inputs.loss_mask,
        advantages=item.advantages,
        sequence_ids=item.sequence_ids,
        loss_weights=item.loss_weights,
    )


def persistent_buffers(
    model: torch.nn.Module,
) -> Iterator[tuple[str, Shaped[Tensor, "..."]]]:
    """The buffers in the state dict of ``model``, by name, as CPU copies."""
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name}" if prefix else name, buffer.detach().cpu().clone()
