"""The chunked language-model head against full logits: memory beyond the weights, and time.

    python benchmarks/lm_head.py                       # V 262,144, T 4,096, H 640, bfloat16
    python benchmarks/lm_head.py --tokens 1024 --pairs 3

Three forms, each value and gradient of a policy loss with respect to hidden states and weight. Full
logits: the head's product, float32 softmax, autograd. Fused: the gradient is formed in the forward
pass, as for every loss that is a sum over tokens. Recomputed: the logits are made again in the
backward pass. Memory is what a form needs beyond hidden states, weight and their gradients, at its
peak: taken in a process of its own that does nothing else (resident size on a CPU, allocated bytes
on a GPU). Times are of forms taking turns in one process.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

FORMS = ("full", "fused", "recomputed")
MEMORY_BAR, FUSED_BAR, RECOMPUTED_BAR = 0.05, 1.15, 1.7


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add = parser.add_argument
    add("--vocabulary", type=int, default=262_144)
    add("--tokens", type=int, default=4096, help="tokens whose memory is taken")
    add(
        "--full-tokens",
        type=int,
        default=1024,
        help="tokens at which full logits' memory is taken; scaled to --tokens, as all of it is",
    )
    add("--time-tokens", type=int, default=1024, help="tokens whose time is taken")
    add("--hidden-size", type=int, default=640)
    add("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    add("--threads", type=int, default=2)
    add("--pairs", type=int, default=5, help="measured rounds of all three")
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--skip-memory", action="store_true")
    add("--skip-time", action="store_true")
    return parser.parse_args(arguments)


def make_problem(options: argparse.Namespace, num_tokens: int) -> dict[str, Any]:
    import torch

    torch.manual_seed(0)
    dtype, device = getattr(torch, options.dtype), options.device
    size = options.hidden_size
    return {
        "hidden": torch.randn(num_tokens, size, dtype=dtype, device=device, requires_grad=True),
        "weight": (torch.randn(options.vocabulary, size, device=device) / size**0.5)
        .to(dtype)
        .requires_grad_(),
        "targets": torch.randint(options.vocabulary, (num_tokens,), device=device),
        "advantages": torch.randn(num_tokens, device=device) / num_tokens,
    }


def run(form: str, problem: dict[str, Any]) -> float:
    """The loss -sum A l, and its gradient; returns the loss."""
    import torch

    from raygrpo.algorithm.logprobs import HeadSettings, chunk_tokens_for, token_logprobs

    hidden, weight = problem["hidden"], problem["weight"]
    targets, advantages = problem["targets"], problem["advantages"]
    if form == "full":
        logits = (hidden @ weight.T).float()
        logprobs = logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(1)
        with torch.no_grad():
            table = logits - logits.logsumexp(1, keepdim=True)
            float(-(table.exp() * table).sum())
            del table
    else:
        settings = HeadSettings(chunk_tokens=chunk_tokens_for(weight.shape[0]))

        def foretold(which: Any, logprobs: Any, entropies: Any) -> tuple[Any, None]:
            return -advantages[which], None

        logprobs, _ = token_logprobs(
            hidden,
            weight,
            targets,
            settings=settings,
            token_gradient=foretold if form == "fused" else None,
        )
    loss = -(advantages * logprobs).sum()
    loss.backward()
    hidden.grad = weight.grad = None
    return float(loss.detach())


def peak_bytes(form: str, options: argparse.Namespace, answer: Any) -> None:
    """In a process of its own: sends the peak beyond hidden states, weight and their gradients."""
    import torch

    torch.set_num_threads(options.threads)
    num_tokens = options.full_tokens if form == "full" else options.tokens
    problem = make_problem(options, num_tokens)
    small = {**problem, "targets": problem["targets"][:16]}
    small["advantages"] = problem["advantages"][:16]
    small["hidden"] = problem["hidden"][:16].detach().requires_grad_()
    run("recomputed", small)
    gradients = sum(problem[name].nbytes for name in ("hidden", "weight"))
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(form, problem)
        taken = torch.cuda.max_memory_allocated() - before - gradients
        answer.send(taken * options.tokens // num_tokens)
        return
    before, peak, done = resident_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, resident_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    run(form, problem)
    done.set()
    watcher.join()
    answer.send((peak - before - gradients) * options.tokens // num_tokens)


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def measure_memory(options: argparse.Namespace) -> dict[str, int]:
    context = multiprocessing.get_context("spawn")
    found = {}
    for form in FORMS:
        ours, theirs = context.Pipe()
        process = context.Process(target=peak_bytes, args=(form, options, theirs))
        process.start()
        theirs.close()
        found[form] = ours.recv()
        process.join()
    return found


def measure_time(options: argparse.Namespace) -> dict[str, list[tuple[float, float]]]:
    """Seconds and CPU-seconds; the first round is left out."""
    import torch

    torch.set_num_threads(options.threads)
    problem = make_problem(options, options.time_tokens)
    found: dict[str, list[tuple[float, float]]] = {form: [] for form in FORMS}
    for number in range(options.pairs + 1):
        for form in FORMS if number % 2 == 0 else reversed(FORMS):
            start, cpu = time.perf_counter(), time.process_time()
            run(form, problem)
            taken = time.perf_counter() - start, time.process_time() - cpu
            if number:
                found[form].append(taken)
    return found


def main(arguments: list[str] | None = None) -> int:
    from benchmarks.update_sides import matmul_flops

    options = parse_arguments(arguments)
    holds = True
    size = f"V {options.vocabulary}, H {options.hidden_size}, {options.dtype}"
    if not options.skip_memory:
        memory = measure_memory(options)
        print(f"extra memory, {size}, T {options.tokens}:")
        for form, taken in memory.items():
            print(f"  {form}: {taken / 2**20:.0f} MiB, {taken / memory['full']:.1%} of full logits")
        holds &= max(memory["fused"], memory["recomputed"]) <= MEMORY_BAR * memory["full"]
    if not options.skip_time:
        times = measure_time(options)
        medians = {
            f: [statistics.median(v) for v in zip(*t, strict=True)] for f, t in times.items()
        }
        plain = matmul_flops(options.dtype, options.device, options.threads)
        # Three products; what is recomputed counts as time, not as work.
        flops = 3 * 2 * options.vocabulary * options.hidden_size * options.time_tokens
        print(f"time, {size}, T {options.time_tokens}; a plain product: {plain / 1e9:.0f} GFLOP/s")
        for form, (seconds, cpu) in medians.items():
            print(
                f"  {form}: {seconds:.2f} s, {cpu:.2f} CPU-s, "
                f"{seconds / medians['full'][0]:.2f} "
                f"of full logits, {flops / seconds / 1e9:.0f} GFLOP/s, "
                f"{flops / seconds / plain:.2f} of a plain product"
            )
        full = medians["full"][0]
        holds &= medians["fused"][0] <= FUSED_BAR * full
        holds &= medians["recomputed"][0] <= RECOMPUTED_BAR * full
    print(
        f"memory at most {MEMORY_BAR:.0%}, time at most {FUSED_BAR} fused and {RECOMPUTED_BAR} "
        f"recomputed: {'holds' if holds else 'FAILS'}"
    )
    return 0 if holds else 1


if __name__ == "__main__":
    raise SystemExit(main())
