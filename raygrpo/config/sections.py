"""The configuration: pydantic models in which every key has one meaning, unit and default.

Unknown keys are refused. A configuration is frozen: a changed one is a copy.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from raygrpo.config.algorithm import AdvantageSection, LossSection
from raygrpo.config.base import Section, key
from raygrpo.types import Sampling

_SOURCE = "Hub id, .jsonl/.json/.parquet/.csv file, or reasoning_gym:<task>."
Transport = Literal["store", "nccl", "ipc"]


class ModelSection(Section):
    """The policy's model."""

    path: str = key(..., "Hub id or directory of the causal language model.")
    revision: str | None = key(None, "Hub revision of path; null: the default branch.")
    dtype: Literal["float32", "bfloat16"] = key(
        "float32",
        "Dtype of computing and of published weights; bfloat16 trains float32 master weights.",
    )
    random_init: bool = key(
        False, "Draw random weights by the run's seed for path's config.json; none are read."
    )
    fp32_head: bool = key(
        False,
        "With dtype bfloat16, compute the language head in float32, in training and in the "
        "transformers engine (vLLM cannot).",
    )
    trust_remote_code: bool = key(False, "Run the modelling code that comes with the model.")


class DataKeys(Section):
    """The keys that describe one source of prompts."""

    source: str = key("", _SOURCE)
    params: dict[str, Any] = key(
        {},
        "Arguments of the source: of a reasoning_gym task (size, seed, ...), or of "
        "datasets.load_dataset (name, split, revision, streaming, ...); a hub's split is train.",
    )
    columns: dict[str, str] = key(
        {}, "New names of columns, new: old. The column prompt holds text or chat messages."
    )
    template: str | None = key(None, "Text with {column} fields that replaces the column prompt.")
    system: str | None = key(None, "System message of prompts that have none.")
    chat: bool | None = key(
        None,
        "Apply the chat template. null: to message lists. true: to text too, as a user turn. "
        "false: never.",
    )
    chat_params: dict[str, Any] = key({}, "Arguments of the chat template (enable_thinking, ...).")
    max_prompt_length: int = key(512, "Longest prompt.", "tokens", ge=1)
    overlong: Literal["error", "drop", "truncate_left"] = key(
        "error", "What happens to a longer prompt; dropped prompts are counted."
    )
    shuffle: bool = key(True, "Shuffle each epoch, by the run's seed.")
    max_pass_rate: float | None = key(
        None,
        "Share of correct completions from which on a prompt is not drawn again; null: none is.",
        gt=0,
        le=1,
    )


class DataChanges(DataKeys):
    """Keys that replace those of the section data; keys that are not set are inherited."""

    @model_serializer(mode="wrap")
    def _only_set_keys(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: v for name, v in serialize(self).items() if name in self.model_fields_set}


class PartSection(DataChanges):
    """A part of a mixture.

    Example: ``{source: words.parquet, weight: 0.5, params: {streaming: true}}``.
    """

    name: str = key("", "Name in ids and metrics; without one, the last piece of the source.")
    weight: float = key(1.0, "Draws relative to the other parts.", gt=0, allow_inf_nan=False)


class EvalDataSection(DataChanges):
    """The prompts of evaluations; params.split is test unless it is set."""

    mixture: list[PartSection] = key([], "Parts beside eval.data itself, whose weight is 1.")


class DataSection(DataKeys):
    """Where prompts come from."""

    source: str = key(..., _SOURCE)
    mixture: list[PartSection] = key([], "Parts beside this section, whose weight is 1.")

    def changed(self, changes: DataChanges) -> DataSection:
        """This section with the keys that ``changes`` sets.

        ``params`` are added to this section's for the same source; another source starts with none.

        Example: ``{source: a, params: {x: 1}}`` changed by ``{params: {y: 2}}`` has the params
        ``{x: 1, y: 2}``; changed by ``{source: b}`` it has none.
        """
        keys = changes.model_fields_set & DataSection.model_fields.keys()
        values: dict[str, Any] = {name: getattr(changes, name) for name in keys}
        inherited = self.params if values.get("source", self.source) == self.source else {}
        return self.model_copy(update={**values, "params": {**inherited, **changes.params}})


class Filters(Section):
    """Changes to the distribution that completions are drawn from."""

    top_p: float = key(1.0, "Keep the smallest set of tokens with this mass.", gt=0, le=1)
    top_k: int = key(0, "Keep the k likeliest tokens; 0 keeps all.", "tokens", ge=0)
    min_p: float = key(
        0.0, "Keep tokens with this share of the likeliest token's mass.", ge=0, lt=1
    )
    repetition_penalty: float = key(1.0, "Penalty on tokens seen before; 1 is none.", gt=0)
    min_tokens: int = key(0, "Shortest completion: no stop before it.", "tokens", ge=0)


class SamplingSection(Section):
    """How completions are drawn."""

    num_completions: int = key(8, "Completions of one prompt: a group.", "completions", ge=1)
    temperature: float = key(1.0, "Sampling temperature.", gt=0)
    max_tokens: int = key(256, "Longest completion.", "tokens", ge=1)
    stop: list[str] = key([], "Strings that end a completion; they are part of it and trained.")
    filters: Filters = Filters()

    @model_validator(mode="after")
    def _lengths(self) -> SamplingSection:
        if self.filters.min_tokens > self.max_tokens:
            raise ValueError("filters.min_tokens is larger than max_tokens")
        return self

    def settings(self) -> Sampling:
        """The engine's view of this section."""
        values = self.model_dump(exclude={"filters"}) | self.filters.model_dump()
        return Sampling(**{**values, "stop": tuple(self.stop)})


class RewardSection(Section):
    """One reward function."""

    func: str = key(
        ...,
        "Function: exact, number, format, math, length, reasoning_gym, reward_model, http, judge, "
        "module:function, or file.py:function.",
    )
    name: str | None = key(None, "Name in metrics; null: the function's name.")
    weight: float = key(1.0, "Weight of the reward in the sum.")
    params: dict[str, Any] = key({}, "Keyword arguments of every call.")
    timeout_s: float = key(60.0, "Deadline of one call on one group.", "seconds", gt=0)
    cache: bool = key(False, "Score equal completions of a row once.")


class BestCheckpoint(Section):
    """The checkpoint with the best evaluation."""

    metric: str | None = key(
        None,
        "Metric whose best checkpoint is kept and exported (-metric: lowest is best); null: the "
        "last checkpoint is exported.",
    )
    patience: int = key(
        0,
        "Evaluations in a row without a better one that end the run; 0: never.",
        "evaluations",
        ge=0,
    )


class EvalSection(Section):
    """Evaluation on held-out prompts: one greedy completion of each, and sampled ones."""

    eval_steps: int = key(
        0,
        "Steps between evaluations, which also come before the first step and after the last; 0: "
        "none.",
        "steps",
        ge=0,
    )
    data: EvalDataSection = EvalDataSection()
    num_prompts: int = key(
        64, "Prompts of an evaluation, from the top of its data.", "prompts", ge=1
    )
    num_completions: int = key(
        0, "Sampled completions of a prompt, beside the greedy one.", "completions", ge=0
    )
    best: BestCheckpoint = BestCheckpoint()


class TrainSection(Section):
    """Steps, groups and updates."""

    steps: int = key(100, "Steps of the run; each makes one version of the weights.", "steps", ge=1)
    groups_per_step: int = key(8, "Groups in one step.", "groups", ge=1)
    max_staleness: int = key(
        0, "Versions that a trained group may lag behind; 0: on-policy.", "versions", ge=0
    )
    dynamic_sampling: bool = key(True, "Replace groups without signal by new groups (refill).")
    max_refill_factor: float = key(
        3.0, "Most groups tried for a step, in multiples of groups_per_step.", ge=1
    )
    num_iterations: int = key(1, "Passes over the groups of a step.", "passes", ge=1)
    num_minibatches: int = key(1, "Optimizer updates of one pass.", "updates", ge=1)
    tokens_per_microbatch: int = key(
        4096, "Padded tokens that a rank computes at once; one row may exceed it.", "tokens", ge=1
    )

    @property
    def max_refills(self) -> int:
        """Groups of a step that may be replaced for want of signal. Example: 5 groups, 1.4: 2."""
        # Rounded first: (1.4 - 1) * 5 is 1.9999999999999998.
        factor = self.max_refill_factor - 1
        return int(round(factor * self.groups_per_step, 6)) if self.dynamic_sampling else 0


_Decay = Annotated[float, Field(ge=0, lt=1)]


class AdamW(Section):
    """AdamW's arguments beside the learning rate."""

    betas: tuple[_Decay, _Decay] = key((0.9, 0.999), "Decay rates of AdamW's two means.")
    weight_decay: float = key(0.0, "Decoupled weight decay.", ge=0)
    eps: float = key(1e-8, "Number added to AdamW's denominator.", gt=0)


class OptimizerSection(Section):
    """AdamW and its schedule."""

    lr: float = key(1e-6, "Peak learning rate of AdamW.", ge=0)
    schedule: Literal["constant", "linear", "cosine"] = key("constant", "Decay after the warm-up.")
    min_lr_frac: float = key(0.0, "Share of lr that the learning rate decays to.", ge=0, le=1)
    warmup_updates: int = key(0, "Optimizer updates of the linear warm-up.", "updates", ge=0)
    adamw: AdamW = AdamW()
    max_grad_norm: float = key(
        1.0, "Largest global norm of a gradient, which is clipped to it; 0: no clipping.", ge=0
    )


class Reference(Section):
    """The reference policy of the KL."""

    sync_steps: int = key(
        0, "Steps between moves of the reference to the policy; 0: it never moves.", "steps", ge=0
    )
    sync_alpha: float = key(
        0.6, "A move: reference = sync_alpha * policy + (1 - sync_alpha) * reference.", gt=0, le=1
    )


class LearnerSection(Section):
    """The learner's ranks."""

    num_ranks: int = key(1, "Learner processes; each is one DeepSpeed rank.", "ranks", ge=1)
    zero_stage: Literal[0, 1, 2, 3] = key(1, "DeepSpeed ZeRO stage.")
    gradient_checkpointing: bool = key(False, "Recompute activations in the backward pass.")
    reference: Reference = Reference()
    lora: dict[str, Any] = key(
        {},
        "Arguments of peft's LoraConfig (r, lora_alpha, target_modules, ...); empty: all weights "
        "train.",
    )
    sequence_parallel: int = key(
        1, "Ranks that share the tokens of a row; a divisor of num_ranks.", "ranks", ge=1
    )
    deepspeed: dict[str, Any] = key(
        {}, "DeepSpeed's own configuration: zero_optimization, checkpoint and logging."
    )

    @model_validator(mode="after")
    def _fits_together(self) -> LearnerSection:
        if self.num_ranks % self.sequence_parallel:
            raise ValueError(
                f"num_ranks ({self.num_ranks}) is no multiple of sequence_parallel "
                f"({self.sequence_parallel})"
            )
        if self.lora and self.reference.sync_steps:
            raise ValueError(
                "reference.sync_steps with lora: the reference is the model without the adapter; "
                "leave out one of the two"
            )
        return self


class GeneratorsSection(Section):
    """The generators."""

    count: int = key(1, "Generator processes.", "generators", ge=1)
    engine: Literal["auto", "transformers", "vllm"] = key(
        "auto", "Inference engine. auto: vllm where it is installed and loads, else transformers."
    )
    options: dict[str, Any] = key({}, "Arguments of vLLM (vllm.AsyncEngineArgs), by name.")
    placement: Literal["disaggregate", "colocate"] = key(
        "disaggregate",
        "colocate: generators share the learner's GPUs and sleep while it trains; needs "
        "max_staleness 0.",
    )
    max_rows: int = key(64, "Completions that a generator decodes at once.", "completions", ge=1)


class WeightsSection(Section):
    """How weights reach the generators."""

    transport: Transport = key(
        "store",
        "store: through the weight store. nccl, ipc: from the learner's GPU to vLLM directly, and "
        "through the store for the other generators.",
    )


class ScorersSection(Section):
    """The scorers."""

    count: int = key(2, "Scorer processes.", "scorers", ge=1)
    max_reward_error_frac: float = key(
        0.1, "Share of errored scores in a step above which the run stops.", ge=0, le=1
    )


class CheckpointSection(Section):
    """Checkpoints: how often, and how many are kept."""

    save_steps: int = key(
        0, "Steps between checkpoints; 0: only the last step has one.", "steps", ge=0
    )
    keep: int = key(2, "Newest checkpoints that are kept; 0: all.", "checkpoints", ge=0)


class CompletionsStore(Section):
    """The completions that are stored in completions/."""

    frac: float = key(1.0, "Share of groups that are stored; replay needs 1.", ge=0, le=1)
    max_gb: float = key(10.0, "Size of completions/ at which it takes no more.", "GB", ge=0)


class TrackingSection(Section):
    """Where a run is recorded, beside its directory."""

    wandb: Literal["online", "offline", "disabled"] = key("disabled", "Weights & Biases mode.")
    tensorboard: bool = key(False, "Write TensorBoard files (extra: tensorboard).")
    completions: CompletionsStore = CompletionsStore()


class Timeouts(Section):
    """Deadlines."""

    start: float = key(600.0, "Deadline of an actor's start.", "seconds", gt=0)
    generate: float = key(1800.0, "Deadline of the generation of one group.", "seconds", gt=0)
    update: float = key(3600.0, "Deadline of one update or checkpoint.", "seconds", gt=0)
    sync: float = key(600.0, "Deadline of one weight sync.", "seconds", gt=0)


class Threads(Section):
    """CPU threads of an actor, by role."""

    learner: int = key(0, "CPU threads of a rank; 0: its share of the machine.", "threads", ge=0)
    generator: int = key(
        0, "CPU threads of a generator; 0: its share of the machine.", "threads", ge=0
    )


class Gpus(Section):
    """GPUs of an actor, by role."""

    learner: float = key(0.0, "GPUs of a learner rank; 0: it computes on CPUs.", "GPUs", ge=0)
    generator: float = key(0.0, "GPUs of a generator; 0: it computes on CPUs.", "GPUs", ge=0)


class RaySection(Section):
    """The cluster and its deadlines."""

    address: str = key(
        "auto",
        "Address of the cluster. local: a Ray of the run's own on this machine. auto: RAY_ADDRESS "
        "if it is set, else local.",
    )
    timeouts_s: Timeouts = Timeouts()
    threads: Threads = Threads()
    gpus: Gpus = Gpus()
    labels: dict[Literal["learner", "generator", "scorer"], dict[str, str]] = key(
        {}, "Labels of the nodes for a role's actors; a role without labels runs on any node."
    )


class RunConfig(Section):
    """A whole run."""

    recipe: str = key("default", "Named set of keys that the file builds on.")
    run_dir: str = key("grpo_output", "Directory of the run; a run in the same directory resumes.")
    seed: int = key(0, "Seed of weights, data order and sampling.", ge=0)
    deterministic: bool = key(
        False,
        "Bit-exact runs: groups decode one by one, with fixed kernels; needs max_staleness 0.",
    )
    model: ModelSection
    data: DataSection
    sampling: SamplingSection = SamplingSection()
    rewards: list[RewardSection] = key([], "Reward functions, summed by weight.")
    eval: EvalSection = EvalSection()
    advantage: AdvantageSection = AdvantageSection()
    loss: LossSection = LossSection()
    train: TrainSection = TrainSection()
    optimizer: OptimizerSection = OptimizerSection()
    learner: LearnerSection = LearnerSection()
    generators: GeneratorsSection = GeneratorsSection()
    weights: WeightsSection = WeightsSection()
    scorers: ScorersSection = ScorersSection()
    checkpoint: CheckpointSection = CheckpointSection()
    tracking: TrackingSection = TrackingSection()
    ray: RaySection = RaySection()

    @model_validator(mode="after")
    def _arithmetic(self) -> RunConfig:
        train = self.train
        if train.groups_per_step % train.num_minibatches:
            raise ValueError(
                f"train.groups_per_step ({train.groups_per_step}) is no multiple of "
                f"train.num_minibatches ({train.num_minibatches})"
            )
        if self.sampling.num_completions < 2:
            raise ValueError(
                "sampling.num_completions must be at least 2: a group needs a baseline"
            )
        if self.deterministic and train.max_staleness:
            raise ValueError("deterministic: true needs train.max_staleness: 0")
        if self.generators.placement == "colocate":
            self._check_colocation()
        names = [reward.name or reward.func for reward in self.rewards]
        if len(set(names)) != len(names):
            raise ValueError(f"rewards need distinct names, not {names}; set rewards[].name")
        return self

    @model_validator(mode="after")
    def _loss_fits(self) -> RunConfig:
        if self.loss.needs_sampler and self.changes_distribution:
            raise ValueError(
                "sampling.filters with a loss that uses the sampler's logprobs (loss.correction, "
                "ratio_anchor: sampler, dppo_tv or off_policy_threshold): the filtered "
                "distribution is renormalised, so its ratio to the policy is biased; turn one of "
                "the two off"
            )
        updates = self.train.num_iterations * self.train.num_minibatches
        if self.loss.loss == "reinforce" and updates > 1:
            raise ValueError(
                "loss.loss: reinforce has no ratio, so a step may have one update, not "
                f"{updates}: set loss.loss: clip, or train.num_iterations and num_minibatches to 1"
            )
        if self.learner.reference.sync_steps and not self.loss.beta:
            raise ValueError(
                "learner.reference.sync_steps moves the reference of the KL: set loss.beta too"
            )
        return self

    def _check_colocation(self) -> None:
        gpus, labels = self.ray.gpus, self.ray.labels
        if self.train.max_staleness:
            raise ValueError("generators.placement: colocate needs train.max_staleness: 0")
        if labels.get("generator", {}) not in ({}, labels.get("learner", {})):
            raise ValueError(
                "generators.placement: colocate needs the same ray.labels for generator and learner"
            )
        shared = gpus.learner + gpus.generator * -(-self.generators.count // self.learner.num_ranks)
        if gpus.generator and (shared > 1 or gpus.generator > 1):
            raise ValueError(
                f"a learner rank and its generators ask for {shared:g} of one GPU: "
                "set ray.gpus.learner and ray.gpus.generator to shares that add up to 1"
            )

    @property
    def changes_distribution(self) -> bool:
        """Whether sampling draws from another distribution than softmax(logits / temperature)."""
        return self.sampling.filters != Filters()


def reward_name(section: RewardSection) -> str:
    """The name in metrics: the section's own, else the function's."""
    return section.name or section.func.rpartition(":")[2]
