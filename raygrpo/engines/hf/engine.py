"""The embedded engine: continuous batching over a transformers model, on CPU or one GPU."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from raygrpo.config import ModelSection
from raygrpo.engines.hf.forward import Forward
from raygrpo.engines.hf.model_weights import ModelWeights
from raygrpo.engines.hf.rows import RowTable
from raygrpo.engines.hf.sampling import sample
from raygrpo.engines.hf.shared_prompts import share_prompts, sharing_pays
from raygrpo.engines.randomness import row_keys, uniforms
from raygrpo.engines.requests import Admission, Running, not_finite
from raygrpo.engines.stops import StopStrings
from raygrpo.errors import InfraError
from raygrpo.models import DTYPES, load_model, load_tokenizer, stop_token_ids
from raygrpo.types import (
    ByteArray,
    Completion,
    Finish,
    FloatArray,
    Group,
    GroupRequest,
    Sampling,
    Stream,
    Version,
)
from raygrpo.weights.types import WeightsManifest

FIRST_ROOM = 256
# The share of new weights that one decode step packs.
PACKED_A_STEP = 1 / 16


@dataclass(slots=True)
class Decoding(Running):
    """A group with rows: those it got first, and its completions that have ended, by index."""

    rows: slice
    ended: dict[int, Completion]


class TransformersEngine:
    """Decodes groups with a transformers model; implements `raygrpo.engines.base.Engine`.

    Each running completion has a row of ``rows`` and of ``cache``. Groups enter whole, in order of
    submission, as rows become free; a group of more than ``max_rows`` completions runs alone. A
    group's prompt is computed once. Its keys and values stay in a slot of ``prompts``, which the
    group's rows share, or are copied to the rows. They are copied if sharing does not pay, if the
    completions began elsewhere, or if the model cannot share.

    A step decodes one token of each row by one forward pass, and removes the rows that ended. A
    ``deterministic`` engine runs one group at a time in memory of its own, so that the tokens
    depend on weights, request and thread count only.
    """

    def __init__(
        self,
        model: ModelSection,
        *,
        seed: int,
        max_rows: int,
        deterministic: bool,
        device: str = "cpu",
        version: Version | None = None,
    ) -> None:
        self._device = torch.device(device)
        self._max_rows, self._deterministic = max_rows, deterministic
        self.model = load_model(model, seed=seed, dtype=DTYPES[model.dtype]).to(self._device)
        self.model.eval().requires_grad_(False)
        # ``version`` is that of the weights on disk, if the engine serves them.
        self.weights = ModelWeights(
            self.model,
            self._device,
            num_rows=max_rows,
            version=version,
            pack_later=not deterministic,
        )
        self._tokenizer = load_tokenizer(model)
        self._text_config = self.model.config.get_text_config()
        self.forward = Forward(self.model, self._device, fp32_head=model.fp32_head)
        self._is_stop = np.zeros(self.forward.vocab_size, np.bool_)
        stop_ids = stop_token_ids(self.model, self._tokenizer)
        self._is_stop[[token for token in stop_ids if token < self._is_stop.size]] = True
        self._stop_ids = torch.from_numpy(np.flatnonzero(self._is_stop)).to(self._device)
        self._stops = StopStrings(self._tokenizer)
        self._versions = [version] if version else []
        self._settings: list[Sampling] = []
        self.admission: Admission[Decoding] = Admission(
            max_positions=getattr(self._text_config, "max_position_embeddings", None),
            vocab_size=self._is_stop.size,
        )
        self._empty_rows()

    def _empty_rows(self) -> None:
        self.rows = RowTable()
        self.cache, self.prompts = self.forward.new_cache(), self.forward.new_cache()

    @property
    def version(self) -> Version | None:
        """The version of the weights in use; None before the first load."""
        return self.weights.version

    @property
    def num_unfinished(self) -> int:
        """Groups submitted and not yet returned or aborted."""
        return self.admission.num_unfinished

    @property
    def can_step(self) -> bool:
        """Whether a step would make progress."""
        return self.admission.can_step(self.version)

    def submit(self, request: GroupRequest) -> None:
        """Queues a group; see `Admission.submit`."""
        self.admission.submit(request)

    @torch.inference_mode()
    def step(self) -> list[Group]:
        """Decodes one token of every running completion, then starts the groups that fit.

        Raises:
            NumericError: logits were not finite. Their groups are dropped; the others could go on.
            InfraError: no version is loaded.
        """
        version = self.weights.version
        if version is None:
            raise InfraError("the engine holds no version", "load weights first")
        self.weights.pack(PACKED_A_STEP if self.admission.running else 1.0)
        if self.admission.running:
            self._decode()
        slices = [group.rows for group in self.admission.admit(version, self._fits, self._start)]
        if slices:
            self._append(slice(slices[0].start, slices[-1].stop), self._prefill(slices))
        return self.admission.take_finished()

    def _fits(self, count: int) -> bool:
        if not self.admission.running:
            return True
        return not self._deterministic and self.rows.num_rows + count <= self._max_rows

    def _start(self, request: GroupRequest, serial: int) -> Decoding:
        """Gives a group its rows, and a slot for its prompt if the rows share the prompt."""
        started = time.monotonic()
        if request.sampling not in self._settings:
            self._settings.append(request.sampling)
        sampling = request.sampling
        keys = row_keys(request.seed, request.stream, request.group_id, sampling.num_completions)
        first = self.rows.add(request, serial, self._settings.index(sampling), keys)
        rows = slice(first, self.rows.num_rows)
        if self._deterministic:
            self.cache, self.prompts = self.forward.new_cache(), self.forward.new_cache()
        pays = sharing_pays(request.prompt.token_ids.size, rows.stop - first)
        if self.forward.shares_prompts and pays and not request.partials:
            self.rows.take_slot(rows)
        ended = {i: c for i, c in enumerate(request.partials) if c.finish != "abort"}
        return Decoding(request, serial, started, rows, ended)

    def _prefill(self, groups: list[slice]) -> Tensor:
        """Computes new groups' prompts, into slots or rows, and then their partial completions.

        Returns the logits [R, V] after each of the rows.
        """
        table, after = self.rows, dict[int, Tensor]()
        new = slice(groups[0].start, groups[-1].stop)
        room = np.minimum(table.max_length[new] - table.length[new], FIRST_ROOM)
        self.cache.reserve(new.stop, int((table.length[new] - table.base[new] + room).max()))
        firsts = [rows.start for rows in groups]
        shared = [row for row in firsts if table.slot[row] >= 0]
        copied = [row for row in firsts if table.slot[row] < 0]
        if shared:
            slots, longest = table.slot[shared], int(table.prompt_length[shared].max())
            self.prompts.reserve(int(slots.max()) + 1, longest)
            logits = self.forward.prefill_prompts(
                self.prompts, slots.tolist(), [table.prompt(row) for row in shared]
            )
            after.update(zip(shared, logits, strict=True))
        if copied:
            logits = self.forward.prefill_prompts(
                self.cache, copied, [table.prompt(row) for row in copied]
            )
            after.update(zip(copied, logits, strict=True))
        parts = []
        for rows in groups:
            length = int(table.prompt_length[rows.start])
            if rows.start in copied:
                self.cache.share(rows.start, rows.stop - rows.start - 1, length)
            for row in range(rows.start, rows.stop):
                history = table.tokens[row, : table.length[row]]
                if history.size > length:
                    parts.append(self.forward.prefill(self.cache, row, history, length))
                else:
                    parts.append(after[rows.start][None])
        return torch.cat(parts)

    def _decode(self) -> None:
        table = self.rows
        rows = slice(0, table.num_rows)
        positions, bases = table.length[rows] - 1, table.base[rows]
        self.cache.reserve(table.num_rows, int((positions - bases).max()) + 1)
        ids = torch.from_numpy(table.last(rows)).to(self._device)
        prompts = share_prompts(self.prompts.layers, table.slot[rows], bases)
        self._append(rows, self.forward.decode(self.cache, ids, positions, bases, prompts))

    def _append(self, rows: slice, logits: Tensor) -> None:
        """Samples each row's next token, and removes the rows that end with this token."""
        finite = logits.sum(-1).isfinite()
        broken = np.flatnonzero(~finite.cpu().numpy()) + rows.start
        if broken.size:
            logits = logits.masked_fill(~finite[:, None], 0)
        tokens, logprobs = self._sample(rows, logits)
        self.rows.append(rows, tokens, logprobs, len(self._versions) - 1)
        dropped = self._drop_broken(broken)
        self._collect(slice(rows.start, self.rows.num_rows))
        if dropped:
            raise not_finite(dropped, self.version)

    def _sample(
        self, rows: slice, logits: Tensor
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        table = self.rows
        drawn = table.length[rows] - table.prompt_length[rows]
        numbers = torch.from_numpy(uniforms(table.keys[rows], drawn)).to(self._device)
        settings = table.setting[rows]
        tokens = torch.empty(len(drawn), dtype=torch.int64, device=self._device)
        logprobs = torch.empty(len(drawn), dtype=torch.float32, device=self._device)
        for setting in np.unique(settings):
            chosen = np.flatnonzero(settings == setting)
            mine = torch.from_numpy(chosen).to(self._device)
            part = logits if chosen.size == settings.size else logits[mine]
            tokens[mine], logprobs[mine] = sample(
                part,
                self._settings[setting],
                numbers[mine],
                history=self._history(self._settings[setting], chosen + rows.start),
                early=self._early(chosen + rows.start),
                stop_ids=self._stop_ids,
            )
        return tokens.cpu().numpy(), logprobs.cpu().numpy()

    def _history(self, sampling: Sampling, rows: npt.NDArray[np.int64]) -> Tensor | None:
        if sampling.repetition_penalty == 1:
            return None
        longest = int(self.rows.length[rows].max())
        return torch.from_numpy(self.rows.tokens[rows, :longest]).to(self._device)

    def _early(self, rows: npt.NDArray[np.int64]) -> Tensor | None:
        early = self.rows.length[rows] < self.rows.min_length[rows]
        return torch.from_numpy(early).to(self._device) if early.any() else None

    def _collect(self, rows: slice) -> None:
        """Ends rows whose newest token stops them, and groups whose rows have all ended."""
        table = self.rows
        stopped = self._is_stop[table.last(rows)] | self._stops.ended(table, rows, self._settings)
        full = table.length[rows] >= table.max_length[rows]
        gone = (np.flatnonzero(stopped | full) + rows.start).tolist()
        if not gone:
            return
        for row in gone:
            self._end_row(row, "stop" if stopped[row - rows.start] else "length")
        self._remove_rows(gone)
        for group in list(self.admission.running.values()):
            if len(group.ended) == group.request.sampling.num_completions:
                self.admission.finish(group, _in_order(group))

    def _end_row(self, row: int, finish: Finish) -> None:
        group = self.admission.running[int(self.rows.group[row])]
        index, partials = int(self.rows.completion[row]), group.request.partials
        before = partials[index].version_runs if partials else ()
        group.ended[index] = self.rows.make_completion(
            row, finish, self._tokenizer, self._versions, before
        )

    def _remove_rows(self, rows: list[int]) -> None:
        sources, targets = self.rows.remove(rows)
        if sources:
            table = self.rows
            longest = int((table.length[targets] - table.base[targets]).max())
            self.cache.move(sources, targets, longest)
        sources, targets = self.rows.close_slots()
        if sources:
            self.prompts.move(sources, targets, int(self.rows.base.max()))

    def _drop_broken(self, rows: npt.NDArray[np.int64]) -> list[Decoding]:
        """Drops the groups of rows whose logits were not finite; returns these groups."""
        serials = np.unique(self.rows.group[rows]).tolist()
        groups = [self.admission.running[serial] for serial in serials]
        for group in groups:
            self._drop(group, clear=True)
        return groups

    def _drop(self, group: Decoding, *, clear: bool = False) -> None:
        table = self.rows
        rows = np.flatnonzero(table.group[: table.num_rows] == group.serial).tolist()
        if clear:
            self.cache.clear(rows)
            self.prompts.clear([slot for slot in table.slot[rows].tolist() if slot >= 0])
        self._remove_rows(rows)
        del self.admission.running[group.serial]

    def stage_weights(self, manifest: WeightsManifest, buckets: Iterable[ByteArray]) -> None:
        """Makes a version ready on any thread, while steps go on; see `ModelWeights.stage`."""
        self.weights.stage(manifest, buckets)

    def commit_weights(self) -> None:
        """Puts the staged version into use; completions keep their keys and values."""
        version = self.weights.commit()
        self.forward.forget()
        if self._versions[-1:] != [version]:
            self._versions.append(version)

    def load_weights(self, manifest: WeightsManifest, buckets: Iterable[ByteArray]) -> None:
        """Stages and commits a version."""
        self.stage_weights(manifest, buckets)
        self.commit_weights()
        self.weights.pack()

    @torch.inference_mode()
    def abort(self, stream: Stream, group_id: int) -> list[Completion]:
        """Drops a group; returns its completions so far, in order; none if it had not begun."""
        group = self.admission.drop(stream, group_id)
        if group is None:
            return []
        for row in range(self.rows.num_rows):
            if self.rows.group[row] == group.serial:
                self._end_row(row, "abort")
        self._drop(group)
        return _in_order(group)

    @torch.inference_mode()
    def score(self, token_ids: Sequence[int], temperature: float = 1.0) -> FloatArray:
        """Logprobs [T] of each token given those before it, in nats, by one full forward pass."""
        return self.forward.score(token_ids, temperature)

    def sleep(self) -> None:
        """Frees the cache, and on a GPU the memory of the weights."""
        self._empty_rows()
        self.forward.forget()
        self.weights.move(torch.device("cpu"))
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def wake(self) -> None:
        """Brings the weights back to their device."""
        self.weights.move(self._device)

    def close(self) -> None:
        """Drops all groups and frees model and cache; the engine cannot be used afterwards."""
        self.admission.clear()
        self._empty_rows()
        del self.model, self.forward, self.weights


def _in_order(group: Decoding) -> list[Completion]:
    return [group.ended[index] for index in sorted(group.ended)]
