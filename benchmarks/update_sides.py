"""The two sides of `update_vs_trl.py`, each in a process that makes one update when asked."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any


def serve(name: str, spec: dict[str, Any], pipe: Connection) -> None:
    """Answers the parent's requests until it says ``end``."""
    import torch

    torch.set_num_threads(spec["threads"])
    os.environ["HF_HUB_OFFLINE"] = "1"
    (serve_raygrpo if name == "raygrpo" else serve_trl)(name, spec, pipe)


def peak_gb(device: str) -> float:
    """This process's peak memory: of the device, or resident."""
    import torch

    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def synchronise(device: str) -> None:
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def now() -> tuple[float, float]:
    """Wall clock, and this process's CPU-seconds over its threads."""
    return time.perf_counter(), time.process_time()


def since(start: tuple[float, float]) -> tuple[float, float]:
    """Seconds and CPU-seconds since then."""
    wall, cpu = now()
    return wall - start[0], cpu - start[1]


# --- raygrpo ------------------------------------------------------------------------------------


def our_config(spec: dict[str, Any], dtype: str) -> Any:
    from raygrpo.config.file import load_config

    first = spec["groups"][0]
    values: dict[str, Any] = {
        "recipe": "trl024",
        "model": {"path": spec["model"], "dtype": dtype},
        "data": {"source": "reasoning_gym:chain_sum"},
        "sampling": {
            "num_completions": len(first["completions"]),
            "max_tokens": max(len(c) for c in first["completions"]),
        },
        "train": {"steps": spec["steps"], "groups_per_step": len(spec["groups"])},
    }
    return load_config(values, spec["set"])


def our_step(spec: dict[str, Any], config: Any) -> tuple[Any, dict[int, Any]]:
    """The plan of the step, and its groups."""
    from raygrpo.algorithm.step_plan import make_step_batch
    from raygrpo.types import FinishedGroup, summarise
    from tests import builders

    finished, payloads = [], {}
    for number, stored in enumerate(spec["groups"]):
        request = builders.request(number, tokens=stored["prompt"])
        request = replace(request, sampling=config.sampling.settings())
        completions = [
            builders.completion(ids, [0.0] * len(ids), finish="length")
            for ids in stored["completions"]
        ]
        payloads[number] = builders.group(request, completions)
        scores = [builders.score(reward) for reward in stored["rewards"]]
        summary = summarise(payloads[number], scores)
        finished.append(FinishedGroup(summary=summary, payload=None, teaches=True))
    return make_step_batch(0, finished, config), payloads


def serve_raygrpo(_name: str, spec: dict[str, Any], pipe: Connection) -> None:
    import socket

    import torch

    from benchmarks.flops import Work, executed
    from raygrpo.actors.process import keep_heap
    from raygrpo.algorithm.packing import make_microbatch, place

    keep_heap()  # as the learner's actor does
    config = our_config(spec, spec["dtype"])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    learner = recording_learner(spec)(config, master_port=port, device=spec["device"])
    torch.set_num_threads(spec["threads"])
    batch, payloads = our_step(spec, config)

    def rows() -> list[Any]:
        ((plans,),) = place(
            batch,
            1,
            tokens_per_microbatch=config.train.tokens_per_microbatch,
            layout=learner.layout,
            hidden_size=learner.hf_model.config.get_text_config().hidden_size,
        )
        learner.samples = [[sample for row in plan for sample in row] for plan in plans]
        return [make_microbatch(plan, payloads) for plan in plans]

    def update() -> tuple[float, float]:
        synchronise(spec["device"])
        start = now()
        stats = learner.update([rows()])
        learner.loss = stats["loss"].sum
        synchronise(spec["device"])
        return since(start)

    def work() -> Work:
        return sum((executed(item, learner.layout) for item in rows()), Work(0, 0, 0))

    def parity() -> float:
        update()
        torch.save(learner.gradient, Path(spec["work"]) / "raygrpo.pt")
        return float(learner.loss)

    def profile() -> str:
        with torch.profiler.profile(record_shapes=True) as profiler:
            update()
        options = {"sort_by": "self_cpu_time_total", "row_limit": 50}
        return str(profiler.key_averages().table(**options))

    answers: dict[str, Callable[[], Any]] = {
        "update": update,
        "profile": profile,
        "peak": lambda: peak_gb(spec["device"]),
        "parity": parity,
        "work": work,
    }
    pipe.send("ready")
    while (request := pipe.recv()) != "end":
        pipe.send(answers[request]())
    learner.close()


def recording_learner(spec: dict[str, Any]) -> Any:
    """The learner; for parity one that perturbs and stores old logprobs, and keeps the gradient."""
    import torch
    from deepspeed.utils import safe_get_full_grad

    from raygrpo.learner.deepspeed_learner import DeepSpeedLearner

    if not spec["parity"]:
        return DeepSpeedLearner

    class Recording(DeepSpeedLearner):
        def _update_once(self, batch: Any, caches: Any) -> Any:
            stored, known = {}, []
            for item, cache, samples in zip(batch, caches, self.samples, strict=True):
                with torch.no_grad():
                    old = self._forward(item.inputs)[0]
                for number, sample in enumerate(samples):
                    where = sample.group_id, sample.completion_index
                    here = item.sequence_ids == number
                    old[here] += torch.tensor(spec["groups"][where[0]]["noise"][where[1]])
                    stored[where] = old[here]
                known.append(replace(cache, old_logprobs=old))
            torch.save(stored, Path(spec["work"]) / "old.pt")
            return super()._update_once(batch, known)

        def _apply(self, lr: float) -> float:
            named = self.hf_model.named_parameters()
            self.gradient = {name: safe_get_full_grad(p).clone() for name, p in named}
            return super()._apply(lr)

    return Recording


# --- TRL ----------------------------------------------------------------------------------------


def serve_trl(name: str, spec: dict[str, Any], pipe: Connection) -> None:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    precision = name.split()[1]
    groups = spec["groups"]
    count = len(groups[0]["completions"])
    num_rows = len(groups) * count
    microbatch = min(spec["microbatch"], num_rows)

    def replay(prompts: list[str], trainer: Any) -> dict[str, list[Any]]:
        chosen = [(groups[int(p)], i % count) for i, p in enumerate(prompts)]
        return {
            "prompt_ids": [group["prompt"] for group, _ in chosen],
            "completion_ids": [group["completions"][i] for group, i in chosen],
            "logprobs": None,  # type: ignore[dict-item]
            "given": [group["rewards"][i] for group, i in chosen],
        }

    class Turns(GRPOTrainer):  # type: ignore[misc]
        """Waits for its turn before each step, and times the step from its stored rollouts on."""

        def _generate_and_score_completions(self, inputs: Any) -> Any:
            while (request := pipe.recv()) == "peak":
                pipe.send(peak_gb(spec["device"]))
            if request == "end":
                os._exit(0)
            output = super()._generate_and_score_completions(inputs)
            if request == "parity":
                stored = torch.load(Path(spec["work"]) / "old.pt")
                numbers = [int(row["prompt"]) for row in inputs]
                rows = [stored[number, i % count] for i, number in enumerate(numbers)]
                output["old_per_token_logps"] = torch.stack(rows)
            self.loss = 0.0
            self.request = request
            self.started = now()
            return output

        def training_step(self, *arguments: Any, **keywords: Any) -> Any:
            loss = super().training_step(*arguments, **keywords)
            if self.request == "parity":
                self.loss += float(loss)
            return loss

        def _clip_grad_norm(self, model: Any) -> Any:
            if self.request == "parity":
                named = model.named_parameters()
                gradient = {n: p.grad.clone() for n, p in named if p.grad is not None}
                torch.save(gradient, Path(spec["work"]) / f"{name}.pt")
            return super()._clip_grad_norm(model)

    class Answer(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            synchronise(spec["device"])
            pipe.send(trainer.loss if trainer.request == "parity" else since(trainer.started))

    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    config = GRPOConfig(
        output_dir=f"{spec['work']}/trl",
        per_device_train_batch_size=microbatch,
        gradient_accumulation_steps=num_rows // microbatch,
        num_generations=count,
        max_completion_length=max(len(c) for c in groups[0]["completions"]),
        max_steps=spec["steps"] + 1,
        learning_rate=1e-6,
        bf16=precision == "autocast",
        gradient_checkpointing=False,
        shuffle_dataset=False,
        use_cpu=spec["device"] == "cpu",
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = Turns(
        model=AutoModelForCausalLM.from_pretrained(spec["model"], dtype=dtype),
        processing_class=AutoTokenizer.from_pretrained(spec["model"], padding_side="left"),
        reward_funcs=lambda given, **_: given,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": [str(n) for n in range(len(groups))]}),
        rollout_func=replay,
        callbacks=[Answer()],
    )
    torch.set_num_threads(spec["threads"])
    pipe.send("ready")
    trainer.train()
