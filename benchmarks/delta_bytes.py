"""What a delta between two steps weighs, and what it saves on a slow link.

    python benchmarks/delta_bytes.py [--model weights/smollm2-135m] [--lr 1e-6 1e-5] [--steps 7]

A real model in bfloat16 with fp32 masters takes real AdamW steps on the policy gradient of
completions that it sampled itself, with advantages that add up to zero. After each step the new
weights go over a TCP connection that is held to ``--gbits`` Gbit/s to two receivers, each of which
builds the version beside the one before and verifies it, as generators do: to one whole, to the
other as deltas. Coding, sending and applying follow each other here, and overlap in a run. What the
receivers then hold is compared with what was sent, bit for bit. The bars: at most 1 % of the bytes
at a learning rate of 1e-6, 2 % at 1e-5; at 1e-6 at least 20 times sooner than whole. The exit code
is 1 where one is missed.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import struct
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from raygrpo.config import ModelSection
from raygrpo.models import load_model, quiet_transformers
from raygrpo.types import ByteArray, Version
from raygrpo.weights import delta
from raygrpo.weights.buckets import make_version
from raygrpo.weights.replica import Replica
from raygrpo.weights.types import WeightsManifest

ROOT = Path(__file__).parents[1]
Weights = tuple[WeightsManifest, list[ByteArray]]
SIZE = struct.Struct("<Q")
# By learning rate: what may be sent, as a share of the full weights; and how many times sooner.
BYTES_BARS = {1e-6: 0.01, 1e-5: 0.02}
SPEED_BARS = {1e-6: 20.0}
SLICE_BYTES = 2**17
NUM_ROWS, PROMPT_LENGTH, NEW_TOKENS = 8, 48, 24


class Link:
    """A TCP connection to ourselves that carries no more than so many bytes per second."""

    def __init__(self, bytes_per_s: float) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self._sender = socket.create_connection(listener.getsockname())
            self._receiver, _ = listener.accept()
        self._rate = bytes_per_s
        self._reader = ThreadPoolExecutor(1)

    def carry(self, parts: Iterable[ByteArray], count: int) -> list[ByteArray]:
        """Sends arrays one after the other, as they come; what arrived at the other end."""
        arrived = self._reader.submit(lambda: [self._receive() for _ in range(count)])
        started, sent = time.perf_counter(), 0
        for part in parts:
            self._sender.sendall(SIZE.pack(part.nbytes))
            for start in range(0, part.nbytes, SLICE_BYTES):
                piece = part[start : start + SLICE_BYTES]
                self._sender.sendall(piece.data)
                sent += piece.nbytes
                time.sleep(max(0.0, started + sent / self._rate - time.perf_counter()))
        return arrived.result()

    def close(self) -> None:
        """Closes both ends."""
        self._reader.shutdown()
        self._sender.close()
        self._receiver.close()

    def _receive(self) -> ByteArray:
        (size,) = SIZE.unpack(self._receiver.recv(SIZE.size, socket.MSG_WAITALL))
        array, place = np.empty(size, np.uint8), 0
        while place < size:
            place += self._receiver.recv_into(array.data[place:])
        return array


class Policy:
    """A bfloat16 model, its fp32 masters under AdamW, and rows to train on."""

    def __init__(self, path: str, lr: float) -> None:
        section = ModelSection(path=path, dtype="bfloat16")
        self.model = load_model(section, seed=0, dtype=torch.bfloat16)
        self.masters = [p.detach().float().clone() for p in self.model.parameters()]
        self._optimizer = torch.optim.AdamW(self.masters, lr=lr, weight_decay=0.0)

    def step(self, number: int) -> None:
        """Samples completions of fresh prompts, then one step of the policy gradient on them."""
        torch.manual_seed(number)
        highest = min(20_000, self.model.config.get_text_config().vocab_size)
        prompts = torch.randint(min(100, highest // 2), highest, (NUM_ROWS, PROMPT_LENGTH))
        with quiet_transformers():
            rows = self.model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                do_sample=True,
                max_new_tokens=NEW_TOKENS,
                min_new_tokens=NEW_TOKENS,
                pad_token_id=0,
            )
        advantages = torch.randn(NUM_ROWS)
        advantages -= advantages.mean()
        logits = self.model(rows[:, :-1]).logits[:, PROMPT_LENGTH - 1 :].float()
        logprobs = logits.log_softmax(-1).gather(-1, rows[:, PROMPT_LENGTH:, None])[..., 0]
        (-(advantages[:, None] * logprobs).mean()).backward()
        for master, parameter in zip(self.masters, self.model.parameters(), strict=True):
            master.grad, parameter.grad = parameter.grad.float(), None
        torch.nn.utils.clip_grad_norm_(self.masters, 1.0)
        self._optimizer.step()
        with torch.no_grad():
            for master, parameter in zip(self.masters, self.model.parameters(), strict=True):
                parameter.copy_(master)

    def publish(self, step: int) -> Weights:
        """The weights as they are published."""
        return make_version(Version(1, step), self.model.named_parameters())


def take(replica: Replica, manifest: WeightsManifest, arrays: list[ByteArray]) -> None:
    """A generator's end: builds and verifies a version, and makes it the one in use."""
    replica.stage([(manifest, arrays)])
    replica.commit()


class Comparison:
    """A learner's end with two receivers: one is sent whole versions, the other deltas."""

    def __init__(self, link: Link, threads: int, first: Weights) -> None:
        self._link, self._held = link, first
        self._workers = ThreadPoolExecutor(threads)
        self._whole, self._sparse = Replica(threads), Replica(threads)
        for replica in (self._whole, self._sparse):
            take(replica, *first)

    def send(self, new: Weights) -> dict[str, float]:
        """Sends a version both ways; sizes in bytes, times in seconds."""
        manifest, buckets = new
        started = time.perf_counter()
        take(self._whole, manifest, self._link.carry(buckets, len(buckets)))
        full_s = time.perf_counter() - started
        started = time.perf_counter()
        encoded = list(self._workers.map(delta.compare, *self._pairs(new)))
        encode_s = time.perf_counter() - started
        deltas = [np.frombuffer(e.data or b"", np.uint8) for e in encoded]
        assert all(part.size for part in deltas), "every bucket is worth a delta"
        arrived = self._link.carry(deltas, len(deltas))
        send_s = time.perf_counter() - started - encode_s
        specs = zip(manifest.buckets, deltas, strict=True)
        sparse = replace(
            manifest,
            kind="delta",
            base_version=self._held[0].version,
            buckets=tuple(replace(spec, encoded_bytes=part.nbytes) for spec, part in specs),
        )
        take(self._sparse, sparse, arrived)
        delta_s = time.perf_counter() - started
        held = self._whole.current.buckets, self._sparse.current.buckets
        for one, other, sent in zip(*held, buckets, strict=True):
            assert np.array_equal(one, sent), "the whole bytes arrived"
            assert np.array_equal(other, sent), "the deltas gave the same bytes"
        self._held = new
        return {
            "changed": sum(e.num_changed for e in encoded) / sum(e.num_elements for e in encoded),
            "bytes": sparse.sent_bytes,
            "full_bytes": manifest.num_bytes,
            "encode_s": encode_s,
            "send_s": send_s,
            "apply_s": delta_s - encode_s - send_s,
            "delta_s": delta_s,
            "full_s": full_s,
        }

    def _pairs(self, new: Weights) -> tuple[Sequence[Any], ...]:
        old_sums, new_sums = ([b.checksum for b in w[0].buckets] for w in (self._held, new))
        return self._held[1], new[1], old_sums, new_sums


def measure(arguments: argparse.Namespace, lr: float, link: Link) -> bool:
    """Prints a line for each step and the medians; whether they are within the bars."""
    policy = Policy(arguments.model, lr)
    comparison, rows = Comparison(link, arguments.threads, policy.publish(0)), []
    for number in range(1, arguments.steps + 1):
        policy.step(number)
        rows.append(comparison.send(policy.publish(number)))
        print_row(f"{lr:g} step {number}", rows[-1])
    # The first version of each end's second set of buffers is memory's first use.
    medians = {name: statistics.median([row[name] for row in rows[2:]]) for name in rows[0]}
    print_row(f"{lr:g} median from step 3", medians)
    share, ratio = medians["bytes"] / medians["full_bytes"], medians["full_s"] / medians["delta_s"]
    return verdict(lr, share, ratio)


def verdict(lr: float, share: float, ratio: float) -> bool:
    """Prints what is asked at a learning rate and whether it holds."""
    bytes_bar, speed_bar = BYTES_BARS.get(lr), SPEED_BARS.get(lr)
    holds = (bytes_bar is None or share <= bytes_bar) and (speed_bar is None or ratio >= speed_bar)
    asked = [] if bytes_bar is None else [f"bytes at most {bytes_bar:.0%}"]
    asked += [] if speed_bar is None else [f"at least {speed_bar:g} times sooner"]
    bars = f"bars ({' and '.join(asked)}): {'holds' if holds else 'FAILS'}" if asked else "no bar"
    print(f"\n{lr:g}: {share:.2%} of the bytes, {ratio:.1f} times sooner: {bars}\n", flush=True)
    return holds


def print_row(name: str, row: dict[str, float]) -> None:
    times = " | ".join(f"{row[key]:.3f}" for key in ("encode_s", "send_s", "apply_s", "delta_s"))
    print(
        f"| {name} | {100 * row['changed']:.2f} % | {row['bytes'] / 1e6:.2f} | "
        f"{100 * row['bytes'] / row['full_bytes']:.2f} % | {times} | {row['full_s']:.3f} | "
        f"{row['full_s'] / row['delta_s']:.1f} |",
        flush=True,
    )


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default=str(ROOT / "weights/smollm2-135m"))
    parser.add_argument("--lr", type=float, nargs="+", default=list(BYTES_BARS))
    parser.add_argument("--steps", type=int, default=7, help="the first two warm up")
    parser.add_argument("--gbits", type=float, default=1.0)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    return parser.parse_args(arguments)


def main(given: list[str] | None = None) -> int:
    """Prints the table; 1 when a bar is missed."""
    arguments = parse_arguments(given)
    torch.set_num_threads(arguments.threads)
    link = Link(arguments.gbits * 1e9 / 8)
    print(f"{arguments.model}, bfloat16 with fp32 masters, AdamW; {arguments.gbits:g} Gbit/s\n")
    print(
        "| lr | changed | MB | of full | encode s | send s | apply s | delta s | full s | ratio |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    try:
        good = [measure(arguments, lr, link) for lr in arguments.lr]
    finally:
        link.close()
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
