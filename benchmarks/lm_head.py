"""The chunked language-model head against full logits: memory beyond the weights, and time.

    python benchmarks/lm_head.py                       # V 262,144, T 4,096, H 640, bfloat16
    python benchmarks/lm_head.py --tokens 1024 --pairs 3

Each form gives value and gradient of a policy loss with respect to hidden states and weight.

- ``full``: the head's product, float32 softmax, autograd; logprobs alone. ``full, entropies``: the
  same and each token's entropy, without gradient, as trainers report it. ``full, lean``: all in the
  weight's dtype (`cross_entropy`), the least that full logits take, and less exact.
- ``fused``: chunked, the gradient formed in the forward pass, as for every loss that is a sum over
  tokens. ``recomputed``: chunked, the logits made again in the backward pass. Both give entropies.

Memory is what a form needs beyond hidden states, weight and their gradients, at its peak: taken in
a process of its own that does nothing else (resident size on a CPU, allocated bytes on a GPU). It
is measured at --tokens where the machine has the memory that a form will need; a form that does not
fit is measured at the largest half, quarter, ... that does and scaled, and the table says so. The
bar is against the smallest of the full forms that were measured at --tokens (of all, where none
was). Times are of forms taking turns in one process, at --time-tokens: each form's time is
proportional to that. The bar is against ``full``, the faster of the two in float32. The exit code
is 1 where a bar is missed.
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

FULL = ("full", "full, entropies", "full, lean")
FORMS = (*FULL, "fused", "recomputed")
# At their peak, [T, V] tables in float32 and in the weight's dtype that a full form holds.
TABLES = {"full": (4, 1), "full, entropies": (5, 1), "full, lean": (0, 4)}
MEMORY_BAR, FUSED_BAR, RECOMPUTED_BAR = 0.05, 1.15, 1.7
MEMORY_MARGIN = 0.8  # of what is free


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add = parser.add_argument
    add("--vocabulary", type=int, default=262_144)
    add("--tokens", type=int, default=4096, help="tokens whose memory is taken")
    add("--full-tokens", type=int, help="most tokens of the full forms' memory; none: --tokens")
    add("--time-tokens", type=int, default=1024, help="tokens whose time is taken")
    add("--hidden-size", type=int, default=640)
    add("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    add("--threads", type=int, default=2)
    add("--pairs", type=int, default=5, help="measured rounds of all forms")
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--matmul-size", type=int, help="of the plain product; none: 2048, on a GPU 8192")
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
    if form == "full, lean":
        logprobs = -torch.nn.functional.cross_entropy(
            hidden @ weight.T, targets, reduction="none"
        ).float()
    elif form in FULL:
        logits = (hidden @ weight.T).float()
        if form == "full, entropies":
            with torch.no_grad():
                table = logits - logits.logsumexp(1, keepdim=True)
                float(-torch.linalg.vecdot(table.exp(), table).sum())
                del table
        logprobs = logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(1)
    else:
        settings = HeadSettings(chunk_tokens=chunk_tokens_for(weight.shape[0]))

        def expected_grad(which: Any, logprobs: Any, entropies: Any) -> tuple[Any, None]:
            return -advantages[which], None

        logprobs, _ = token_logprobs(
            hidden,
            weight,
            targets,
            settings=settings,
            expected_grad=expected_grad if form == "fused" else None,
        )
    loss = -(advantages * logprobs).sum()
    loss.backward()
    hidden.grad = weight.grad = None
    return float(loss.detach())


def fitting_tokens(form: str, options: argparse.Namespace) -> int:
    """--tokens, or its largest half, quarter, ... at which a form's memory is there."""
    import psutil
    import torch

    num_tokens: int = options.tokens
    if form not in FULL:
        return num_tokens
    num_tokens = min(num_tokens, options.full_tokens or num_tokens)
    free = psutil.virtual_memory().available
    if options.device == "cuda":
        free = torch.cuda.mem_get_info()[0]
    wide, narrow = TABLES[form]
    size = {"float32": 4, "bfloat16": 2}[options.dtype]
    per_token = options.vocabulary * (4 * wide + size * narrow)
    while num_tokens > 1 and num_tokens * per_token > MEMORY_MARGIN * free:
        num_tokens //= 2
    return num_tokens


def peak_bytes(form: str, num_tokens: int, options: argparse.Namespace, answer: Any) -> None:
    """In a process of its own: sends the peak beyond hidden states, weight and their gradients."""
    import torch

    torch.set_num_threads(options.threads)
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
        answer.send(torch.cuda.max_memory_allocated() - before - gradients)
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
    answer.send(max(1, peak - before - gradients))


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def measure_memory(options: argparse.Namespace) -> dict[str, tuple[int, int]]:
    """Peak bytes of each form, and the tokens at which they were taken."""
    context = multiprocessing.get_context("spawn")
    found = {}
    for form in FORMS:
        num_tokens = fitting_tokens(form, options)
        ours, theirs = context.Pipe()
        process = context.Process(target=peak_bytes, args=(form, num_tokens, options, theirs))
        process.start()
        theirs.close()
        found[form] = ours.recv(), num_tokens
        process.join()
    return found


def report_memory(found: dict[str, tuple[int, int]], num_tokens: int) -> bool:
    """Prints the table; whether the bar holds."""
    scaled = {form: taken * num_tokens / at for form, (taken, at) in found.items()}
    full = [form for form in FULL if found[form][1] == num_tokens] or list(FULL)
    peer = min(full, key=lambda form: scaled[form])
    for form, size in scaled.items():
        at = found[form][1]
        note = "" if at == num_tokens else f" (EXTRAPOLATED from {at} tokens)"
        shares = ", ".join(f"{size / scaled[other]:.2%} of {other!r}" for other in FULL)
        print(f"  {form}: {size / 2**20:.0f} MiB{note}; {shares}")
    holds = max(scaled["fused"], scaled["recomputed"]) <= MEMORY_BAR * scaled[peer]
    print(f"memory at most {MEMORY_BAR:.0%} of {peer!r}: {'holds' if holds else 'FAILS'}")
    return holds


def measure_time(options: argparse.Namespace) -> dict[str, list[tuple[float, float]]]:
    """Seconds and CPU-seconds; the first round is left out."""
    import torch

    torch.set_num_threads(options.threads)
    problem = make_problem(options, options.time_tokens)
    found: dict[str, list[tuple[float, float]]] = {form: [] for form in FORMS}
    for number in range(options.pairs + 1):
        for form in FORMS if number % 2 == 0 else reversed(FORMS):
            start, cpu = time.perf_counter(), time.process_time()
            run(form, problem)  # its answer waits for the device
            taken = time.perf_counter() - start, time.process_time() - cpu
            if number:
                found[form].append(taken)
    return found


def report_time(times: dict[str, list[tuple[float, float]]], options: argparse.Namespace) -> bool:
    """Prints the table; whether the bars hold."""
    from benchmarks.flops import matmul_flops

    medians = {f: [statistics.median(v) for v in zip(*t, strict=True)] for f, t in times.items()}
    plain = matmul_flops(options.dtype, options.device, options.threads, options.matmul_size)
    # Three products; what is recomputed counts as time, not as work.
    flops = 3 * 2 * options.vocabulary * options.hidden_size * options.time_tokens
    print(f"  a plain product: {plain / 1e9:.0f} GFLOP/s")
    for form, (seconds, cpu) in medians.items():
        ratios = ", ".join(f"{seconds / medians[other][0]:.2f} of {other!r}" for other in FULL)
        print(
            f"  {form}: {seconds:.2f} s, {cpu:.2f} CPU-s; {ratios}; "
            f"{flops / seconds / 1e9:.0f} GFLOP/s, {flops / seconds / plain:.2f} of a plain product"
        )
    full = medians["full"][0]
    ratios = [medians[form][0] / full for form in ("fused", "recomputed")]
    holds = ratios[0] <= FUSED_BAR and ratios[1] <= RECOMPUTED_BAR
    print(
        f"time at most {FUSED_BAR} of 'full' fused, {RECOMPUTED_BAR} recomputed: "
        f"{'holds' if holds else 'FAILS'}"
    )
    return holds


def main(arguments: list[str] | None = None) -> int:
    """Prints both tables; 1 when a bar is missed."""
    options = parse_arguments(arguments)
    holds = True
    size = f"V {options.vocabulary}, H {options.hidden_size}, {options.dtype}, {options.device}"
    if not options.skip_memory:
        print(f"extra memory, {size}, T {options.tokens}:", flush=True)
        holds &= report_memory(measure_memory(options), options.tokens)
    if not options.skip_time:
        print(f"time, {size}, T {options.time_tokens}:", flush=True)
        holds &= report_time(measure_time(options), options)
    return 0 if holds else 1


if __name__ == "__main__":
    raise SystemExit(main())
