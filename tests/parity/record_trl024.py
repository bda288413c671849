"""Records what TRL 0.24.0 itself makes of the rollouts in `trl_cases`, into ``trl024.json``.

TRL 0.24 does not run beside transformers 5, so this runs in an environment of its own and imports
nothing of the project:

    python -m tests.parity.trl_cases CASE          # in the project's environment
    pip install trl==0.24.0 transformers==4.57.1   # in another one
    python tests/parity/record_trl024.py CASE tests/parity/trl024.json

Of each update it keeps the loss, the rate, and of the gradient and of the weights' movement their
length and their products with `NUM_DIRECTIONS` fixed random directions.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

CASES = [
    {"name": "as it is", "lr": 1e-6},
    {"name": "two iterations", "lr": 1e-3, "num_iterations": 2},
    {"name": "accumulated", "lr": 1e-4, "accumulation": 3},
    {"name": "perturbed old logprobs", "lr": 1e-4, "noise": True},
]
NUM_DIRECTIONS = 8


def project(tensors: dict[str, torch.Tensor]) -> list[float]:
    """The length, and the products with fixed random directions, in the order of the names."""
    vector = np.concatenate(
        [tensors[n].numpy().ravel().astype(np.float64) for n in sorted(tensors)]
    )
    random = np.random.RandomState(11)
    products = [float(vector @ random.standard_normal(vector.size)) for _ in range(NUM_DIRECTIONS)]
    return [float(np.linalg.norm(vector)), *products]


def record(case: dict[str, Any], model: Path, data: dict[str, Any], output: Path) -> dict[str, Any]:
    """One run of TRL's trainer."""
    rollouts = [rollout for step in data["steps"] for rollout in step]
    noise = {(group, index): values for group, index, values in data["noise"]}
    size = len(rollouts[0]["completions"])
    rows = len(data["steps"][0]) * size
    found: dict[str, Any] = {"advantages": [], "updates": []}

    class Recorder(GRPOTrainer):
        def _generate_single_turn(self, prompts: list[str], images: Any) -> Any:
            chosen = [(rollouts[int(p)], i % size) for i, p in enumerate(prompts)]
            prompt_ids = [rollout["prompt"] for rollout, _ in chosen]
            return prompt_ids, [rollout["completions"][i] for rollout, i in chosen], None, {}

        def _generate_and_score_completions(self, inputs: Any) -> Any:
            result = super()._generate_and_score_completions(inputs)
            found["advantages"].append(result["advantages"].tolist())
            if case.get("noise"):
                length = result["completion_ids"].shape[1]
                added = torch.zeros(result["completion_ids"].shape)
                for row, sample in enumerate(inputs):
                    values = noise[int(sample["prompt"]), row % size]
                    added[row, : len(values)] = torch.tensor(values)
                ids = torch.cat([result["prompt_ids"], result["completion_ids"]], 1)
                mask = torch.cat([result["prompt_mask"], result["completion_mask"]], 1)
                with torch.no_grad():
                    old, _ = self._get_per_token_logps_and_entropies(self.model, ids, mask, length)
                result["old_per_token_logps"] = old + added
            return result

        def training_step(self, *arguments: Any, **keywords: Any) -> Any:
            loss = super().training_step(*arguments, **keywords)
            named = self.model.named_parameters()
            # The last one of an update leaves the whole gradient, not clipped yet.
            self.gradient = {name: p.grad.clone() for name, p in named if p.grad is not None}
            self.losses = [*getattr(self, "losses", []), float(loss)]
            return loss

        def log(self, logs: dict[str, float], *arguments: Any, **keywords: Any) -> None:
            super().log(logs, *arguments, **keywords)
            if "grad_norm" not in logs:
                return
            moved = {n: p.detach() - start[n] for n, p in self.model.named_parameters()}
            found["updates"].append(
                {
                    "loss": sum(self.losses),
                    "lr": logs["learning_rate"],
                    "gradient": project(self.gradient),
                    "movement": project(moved),
                }
            )
            self.losses = []

    accumulation, num_iterations = case.get("accumulation", 1), case.get("num_iterations", 1)
    config = GRPOConfig(
        output_dir=str(output),
        per_device_train_batch_size=rows // accumulation,
        gradient_accumulation_steps=accumulation,
        num_iterations=num_iterations,
        max_steps=len(data["steps"]) * num_iterations,
        learning_rate=case["lr"],
        shuffle_dataset=False,
        logging_steps=1,
        bf16=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    dataset = {
        "prompt": [str(number) for number in range(len(rollouts))],
        "rewards": [rollout["rewards"] for rollout in rollouts],
    }
    trainer = Recorder(
        model=str(model),
        reward_funcs=lambda rewards, **_: [r[i % size] for i, r in enumerate(rewards)],
        args=config,
        train_dataset=Dataset.from_dict(dataset),
        # The directory names a tokenizer class that transformers 4 does not know.
        processing_class=PreTrainedTokenizerFast(
            tokenizer_file=str(model / "tokenizer.json"), pad_token="<pad>", eos_token="<eos>"
        ),
    )
    start = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    found["start"] = project(start)
    trainer.train()
    return found


def main(directory: Path, output: Path) -> None:
    """Every case with every model."""
    import transformers
    import trl

    data = json.loads((directory / "case.json").read_text())
    runs = [
        {"kind": kind, **case, **record(case, directory / kind, data, directory / "output")}
        for kind in ("llama", "gemma3")
        for case in CASES
    ]
    versions = {"trl": trl.__version__, "transformers": transformers.__version__}
    versions["torch"] = torch.__version__
    output.write_text(json.dumps({"versions": versions, "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
