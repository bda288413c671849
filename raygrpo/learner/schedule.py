"""The learning rate as a pure function of the optimizer update's index."""

from __future__ import annotations

import math

from raygrpo.config import OptimizerSection


def learning_rate(update: int, total_updates: int, optimizer: OptimizerSection) -> float:
    """The learning rate of optimizer update ``update``, counted from 0.

    In a warm-up of w updates: ``lr * (update + 1) / (w + 1)``. No update has a rate of 0, and the
    first update after the warm-up has ``lr``. Afterwards, with the progress
    ``p = (update - w) / (total_updates - w)`` and ``m = min_lr_frac``:

    - constant: ``lr``
    - linear: ``lr * (m + (1 - m) * (1 - p))``; with w = 0 and m = 0 this is transformers'
      ``get_linear_schedule_with_warmup``, which TRL uses
    - cosine: ``lr * (m + (1 - m) * (1 + cos(pi p)) / 2)``

    At ``update = total_updates``, one past the last update, p is 1 and the rate ``lr * m``;
    the last update still moves the weights. Beyond, the rate stays.
    """
    warmup = optimizer.warmup_updates
    if update < warmup:
        return optimizer.lr * (update + 1) / (warmup + 1)
    if optimizer.schedule == "constant":
        return optimizer.lr
    progress = min(1.0, (update - warmup) / max(1, total_updates - warmup))
    if optimizer.schedule == "linear":
        left = 1 - progress
    else:
        left = (1 + math.cos(math.pi * progress)) / 2
    floor = optimizer.min_lr_frac
    return optimizer.lr * (floor + (1 - floor) * left)
