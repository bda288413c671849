"""Whether raygrpo computes on a GPU what it computes on a CPU, and how fast: without Ray.

    python benchmarks/gpu_check.py                       # on a machine with an NVIDIA GPU
    python benchmarks/gpu_check.py --device cpu --quick  # the same checks, to see that they run

Wants Python 3.11 or newer with torch, transformers, numpy, pydantic, pyyaml and xxhash; what
DeepSpeed and vLLM do is checked where they are installed. Parts (--only names some):

- head: the chunked language head against full logits in float32 and bfloat16.
- rows: logprobs and gradients of packed rows, of rows with a shared prompt, and of padded rows of
  one sample, for tiny Llama, Qwen 2 and Gemma 3 models, against padded rows on the CPU.
- engine: the transformers engine's logprobs against the learner's, sampling that repeats itself,
  weights staged and swapped in the middle of completions (twice, so that on a GPU both sets of
  buffers are used), tokens per second.
- learner: losses and gradient norms of some updates against those on the CPU: the reference
  learner, and DeepSpeed in fp32 and bf16. Without --quick on a GPU: MFU and peak memory of updates
  of a 0.5B and a 1.5B shape.
- vllm: start, generation, logprobs, and weights updated in place.

Prints a line for each check; the exit code is 1 where one fails.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.gpu_cases import Check, peak_of, relative_gap

PARTS = ("head", "rows", "engine", "learner", "vllm")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add = parser.add_argument
    add("--device", choices=["cuda", "cpu"], default="cuda")
    add("--quick", action="store_true", help="small sizes, no large shapes")
    add("--only", nargs="+", choices=PARTS, default=list(PARTS))
    add("--threads", type=int, default=len(os.sched_getaffinity(0)))
    return parser.parse_args(arguments)


def check_head(options: argparse.Namespace, _: Path) -> Iterator[Check]:
    """Value, gradient, memory and time of the chunked head."""
    import torch

    from benchmarks.lm_head import make_problem

    large = options.device == "cuda" and not options.quick
    vocabulary, tokens, hidden = (262_144, 4096, 640) if large else (8192, 256, 64)
    for dtype in ("float32", "bfloat16"):
        sizes = {"vocabulary": vocabulary, "hidden_size": hidden, "dtype": dtype}
        problem = make_problem(argparse.Namespace(device=options.device, **sizes), tokens)
        exact, ours = (head_gradients(form, problem) for form in ("full", "chunked"))
        name = f"head {dtype}, V {vocabulary}, T {tokens}"
        # bfloat16 rounds each logit by up to 2^-9 of it, and logits reach about 5.
        value, gradient = (1e-4, 1e-5) if dtype == "float32" else (5e-2, 2e-2)
        gap = float((exact[0] - ours[0]).abs().max())
        yield Check.most(f"{name}: logprobs", gap, value)
        for kind, one, other in (("hidden", exact[1], ours[1]), ("weight", exact[2], ours[2])):
            yield Check.most(f"{name}: gradient of {kind}", relative_gap(one, other), gradient)
        del exact, ours, one, other
        if large:
            yield from head_costs(name, problem)
        del problem
        if options.device == "cuda":
            torch.cuda.empty_cache()


def head_costs(name: str, problem: dict[str, Any]) -> Iterator[Check]:
    """Peak memory beyond the gradients and seconds, the best of three; the bars of lm_head.py."""
    from benchmarks.lm_head import FUSED_BAR, MEMORY_BAR, RECOMPUTED_BAR, run

    gradients = problem["hidden"].nbytes + problem["weight"].nbytes
    size, seconds = {}, {}
    for form in ("full", "fused", "recomputed"):
        taken = []
        for _ in range(3):
            start = time.perf_counter()
            with peak_of("cuda") as peak:
                run(form, problem)
            taken.append(time.perf_counter() - start)
        size[form], seconds[form] = peak.num_bytes - gradients, min(taken)
    for form, bar in (("fused", FUSED_BAR), ("recomputed", RECOMPUTED_BAR)):
        shares = size[form] / size["full"], seconds[form] / seconds["full"]
        yield Check.most(f"{name}: memory, {form} of full", shares[0], MEMORY_BAR)
        yield Check.most(f"{name}: time, {form} of full", shares[1], bar)


def head_gradients(form: str, problem: dict[str, Any]) -> tuple[Any, Any, Any]:
    """Logprobs, and the gradients of hidden states and weight of the loss -sum A l."""
    from raygrpo.algorithm.logprobs import HeadSettings, chunk_tokens_for, token_logprobs

    hidden, weight, targets = (problem[name] for name in ("hidden", "weight", "targets"))
    advantages = problem["advantages"]
    if form == "full":
        # In float32 from the start: in bfloat16 the logits' rounding is what is compared.
        logits = hidden.float() @ weight.float().T
        logprobs = logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(1)
    else:

        def expected_grad(which: Any, logprobs: Any, entropies: Any) -> tuple[Any, None]:
            return -advantages[which], None

        settings = HeadSettings(chunk_tokens=chunk_tokens_for(weight.shape[0]))
        logprobs, _ = token_logprobs(
            hidden, weight, targets, settings=settings, expected_grad=expected_grad
        )
    (-(advantages * logprobs).sum()).backward()
    found = logprobs.detach(), hidden.grad, weight.grad
    float(found[0].sum())  # waits for the device
    hidden.grad = weight.grad = None
    return found


def part(name: str) -> Callable[[argparse.Namespace, Path], Iterator[Check]]:
    """The checks of a part."""
    if name == "head":
        return check_head
    module = {"rows": "gpu_cases", "learner": "gpu_learners"}.get(name, "gpu_engines")
    found: Callable[[argparse.Namespace, Path], Iterator[Check]]
    found = getattr(importlib.import_module(f"benchmarks.{module}"), f"check_{name}")
    return found


def run_part(name: str, options: argparse.Namespace, directory: Path) -> list[Check]:
    """All checks of a part, printed as they come; one that raises is a check that failed."""
    checks = []
    started = time.perf_counter()
    try:
        for check in part(name)(options, directory):
            checks.append(check)
            print(check.line(), flush=True)
    except Exception:
        traceback.print_exc()
        checks.append(Check(name=f"{name} raised", value="see above", bound="", good=False))
        print(checks[-1].line(), flush=True)
    print(f"| {name} took {time.perf_counter() - started:.1f} s | | | |", flush=True)
    return checks


def describe(device: str) -> str:
    """What computes."""
    import torch
    import transformers

    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    if device == "cpu":
        return f"cpu, {versions}"
    capability = "{}.{}".format(*torch.cuda.get_device_capability())
    return f"{torch.cuda.get_device_name()} (capability {capability}), {versions}"


def main(arguments: list[str] | None = None) -> int:
    """Prints the table; 1 when a check failed, 2 without the device."""
    import torch

    options = parse_arguments(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device; --device cpu runs the checks on this machine's CPU")
        return 2
    torch.set_num_threads(options.threads)
    os.environ["HF_HUB_OFFLINE"] = "1"
    print(f"{describe(options.device)}\n\n| check | found | asked | |\n| --- | --- | --- | --- |")
    checks = []
    with tempfile.TemporaryDirectory() as directory:
        # vLLM imports Ray by itself where it is installed, so it comes last and is left out.
        for name in (part for part in PARTS if part in options.only and part != "vllm"):
            checks += run_part(name, options, Path(directory))
        checks.append(Check.true("Ray was not imported", "ray" not in sys.modules))
        print(checks[-1].line(), flush=True)
        if "vllm" in options.only:
            checks += run_part("vllm", options, Path(directory))
    failed = [check.name for check in checks if check.good is False]
    print(
        f"\n{len(checks)} checks, {len(failed)} failed{': ' if failed else ''}{'; '.join(failed)}"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
