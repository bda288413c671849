"""One run of TRL's GRPOTrainer in this process, for `vs_trl.py`: python trl_run.py SPEC.json

The specification names the model, rows of prompts, sizes and precision. One JSON object a step goes
to ``spec["rows"]`` when the step has ended, and one before the first; whoever reads the file takes
the time. Completions end at ``spec["stop"]``, which must be a single token.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.vowels import vowels


def exact(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    """1 where the first line is the answer."""
    lines = [text.split("\n")[0].strip() for text in completions]
    return [float(line == right) for line, right in zip(lines, answer, strict=True)]


REWARDS = {"exact": exact, "vowels": vowels}


class TimedTrainer(GRPOTrainer):  # type: ignore[misc]
    """Writes what each step took: generating, and scoring with the preparation of the batch."""

    def __init__(self, rows: Path, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._rows = rows.open("a", buffering=1)
        self._generate_s = self._prepare_s = 0.0

    def _generate(self, prompts: list[Any]) -> Any:
        start = time.perf_counter()
        output = super()._generate(prompts)
        self._generate_s += time.perf_counter() - start
        return output

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        start = time.perf_counter()
        output = super()._generate_and_score_completions(inputs)
        self._prepare_s += time.perf_counter() - start
        self._num_tokens = int(output["completion_mask"].sum())
        return output

    def log(self, logs: dict[str, float], *arguments: Any, **keywords: Any) -> None:
        super().log(logs, *arguments, **keywords)
        if "reward" not in logs:
            return
        row = {
            "step": self.state.global_step,
            "reward": self.state.log_history[-1]["reward"],
            "generate_s": self._generate_s,
            "other_s": self._prepare_s - self._generate_s,
            "num_completion_tokens": self._num_tokens,
        }
        self._rows.write(json.dumps(row) + "\n")
        self._generate_s = self._prepare_s = 0.0

    def begin(self) -> None:
        """Says that the first step starts."""
        self._rows.write(json.dumps({"step": 0}) + "\n")


def load(spec: dict[str, Any]) -> tuple[Any, Any]:
    """The model in the precision asked for, and its tokenizer."""
    dtype = torch.bfloat16 if spec["precision"] == "bf16" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(spec["model"], padding_side="left")
    if spec["stop"]:
        (stop,) = tokenizer(spec["stop"], add_special_tokens=False)["input_ids"]
        # The trainer takes every id here for an end, in generating and in masking.
        model.generation_config.eos_token_id = [tokenizer.eos_token_id, stop]
    return model, tokenizer


def config(spec: dict[str, Any]) -> GRPOConfig:
    """TRL at its defaults, but for sizes, the rate and what would only cost time."""
    num_rows = spec["num_prompts"] * spec["num_completions"]
    microbatch = min(spec["microbatch"], num_rows)
    extra = {"min_new_tokens": spec["min_tokens"]} if spec["min_tokens"] else None
    return GRPOConfig(
        output_dir=spec["output"],
        per_device_train_batch_size=microbatch,
        gradient_accumulation_steps=num_rows // microbatch,
        num_generations=spec["num_completions"],
        max_completion_length=spec["max_tokens"],
        generation_kwargs=extra,
        max_steps=spec["steps"],
        learning_rate=spec["lr"],
        lr_scheduler_type=spec["schedule"],
        bf16=spec["precision"] == "autocast",
        gradient_checkpointing=False,
        seed=spec["seed"],
        logging_steps=1,
        use_cpu=spec["device"] == "cpu",
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )


def main(spec: dict[str, Any]) -> None:
    """Trains as the specification says."""
    model, tokenizer = load(spec)
    trainer = TimedTrainer(
        rows=Path(spec["rows"]),
        model=model,
        processing_class=tokenizer,
        reward_funcs=REWARDS[spec["reward"]],
        args=config(spec),
        train_dataset=Dataset.from_list(spec["dataset"]),
    )
    trainer.begin()
    trainer.train()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
