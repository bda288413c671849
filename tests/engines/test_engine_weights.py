"""Double-buffered weights: staging beside the version in use, and swapping without a copy."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import nn

from raygrpo.config import ModelSection
from raygrpo.engines.hf.engine import TransformersEngine
from raygrpo.engines.hf.linear import PackedLinear
from raygrpo.engines.hf.model_weights import ALIGNMENT, ModelWeights
from raygrpo.errors import InfraError
from raygrpo.models import DTYPES, load_model
from raygrpo.types import ByteArray, Version
from raygrpo.weights.buckets import make_version
from raygrpo.weights.types import WeightsManifest
from tests import builders
from tests.tiny import Kind, save_tiny_model

Dtype = Literal["float32", "bfloat16"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    kinds: tuple[Kind, ...] = ("llama", "qwen2", "gemma3")
    return {kind: save_tiny_model(root / kind, kind) for kind in kinds}


def model_of(path: Path, dtype: Dtype = "float32") -> Any:
    return load_model(ModelSection(path=str(path)), seed=0, dtype=DTYPES[dtype])


def aligned(data: ByteArray, shift: int = 0) -> ByteArray:
    """A copy that starts ``shift`` bytes past a multiple of the alignment."""
    room = np.empty(data.nbytes + 2 * ALIGNMENT, np.uint8)
    start = -room.ctypes.data % ALIGNMENT + shift
    room[start : start + data.nbytes] = data
    return room[start : start + data.nbytes]


def publish(
    model: Any, step: int, scale: float, shift: int = 0
) -> tuple[WeightsManifest, list[ByteArray]]:
    """The model's weights times ``scale``, in several buckets."""
    tensors = ((name, p.detach() * scale) for name, p in model.named_parameters())
    manifest, buckets = make_version(Version(1, step), tensors, 8192)
    return manifest, [aligned(data, shift) for data in buckets]


def make_engine(path: Path, dtype: Dtype = "float32") -> TransformersEngine:
    section = ModelSection(path=str(path), dtype=dtype)
    return TransformersEngine(section, seed=0, max_rows=8, deterministic=False)


def make_weights(model: Any) -> ModelWeights:
    return ModelWeights(model, CPU, num_rows=8, version=None)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma3"])
def test_swapped_weights_compute_the_bits_of_copied_ones(
    paths: dict[str, Path], kind: str, dtype: Dtype
) -> None:
    """Against the other way: the same tensors copied into a model before an engine is made."""
    engine = make_engine(paths[kind], dtype)
    model = model_of(paths[kind], dtype)
    tokens = list(range(3, 43))
    for step, scale in enumerate((0.5, 0.75, 1.25)):
        engine.load_weights(*publish(model, step, scale))
        copied = model_of(paths[kind], dtype)
        with torch.no_grad():
            for parameter in copied.parameters():
                parameter.mul_(scale)
        copied.save_pretrained(paths[kind].parent / f"{kind}-{dtype}-{step}")
        other = make_engine(_with_tokenizer(paths[kind], f"{kind}-{dtype}-{step}"), dtype)
        np.testing.assert_array_equal(engine.score(tokens), other.score(tokens))


def _with_tokenizer(source: Path, name: str) -> Path:
    target = source.parent / name
    for file in source.glob("tokenizer*"):
        (target / file.name).write_bytes(file.read_bytes())
    return target


def test_nothing_is_copied_where_arrays_are_aligned(paths: dict[str, Path]) -> None:
    model = model_of(paths["qwen2"])
    weights = make_weights(model)
    manifest, buckets = publish(model, 0, 0.5)
    weights.stage(manifest, buckets)
    weights.commit()
    inside = 0
    for spec, data in zip(manifest.buckets, buckets, strict=True):
        for tensor in spec.tensors:
            pointer = weights.targets[tensor.name].data_ptr()
            assert pointer % ALIGNMENT == 0
            inside += pointer == data.ctypes.data + tensor.offset_bytes
    assert inside == len(weights.targets), "each of this model's tensors starts at a multiple of 64"
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_misaligned_arrays_give_the_same_bits(paths: dict[str, Path]) -> None:
    model = model_of(paths["llama"])
    engine = make_engine(paths["llama"])
    tokens = list(range(3, 43))
    scores = []
    for step, shift in enumerate((0, 4, 60)):
        engine.load_weights(*publish(model, step, 0.5, shift))
        scores.append(engine.score(tokens))
    np.testing.assert_array_equal(scores[0], scores[1])
    np.testing.assert_array_equal(scores[0], scores[2])


def test_staging_changes_nothing_that_decoding_reads(paths: dict[str, Path]) -> None:
    """Another thread stages version after version while this one decodes."""
    model = model_of(paths["llama"])
    published = [publish(model, step, 1 + step / 4) for step in (1, 2, 3, 4)]
    order = builders.request(0, num_completions=4, max_tokens=200, min_tokens=200)

    def generate(stage: bool) -> list[bytes]:
        engine = make_engine(paths["llama"])
        engine.load_weights(*publish(model, 0, 1.0))
        engine.submit(order)
        failures: list[BaseException] = []
        ended = threading.Event()
        staged = 0

        def work() -> None:
            nonlocal staged
            try:
                while not ended.is_set():
                    engine.stage_weights(*published[staged % len(published)])
                    staged += 1
            except BaseException as error:
                failures.append(error)

        thread = threading.Thread(target=work)
        if stage:
            thread.start()
        groups: list[Any] = []
        while not groups:
            groups = engine.step()
        ended.set()
        if stage:
            thread.join()
            assert staged > 1
        assert not failures
        assert engine.version == Version(1, 0)
        return [c.logprobs.tobytes() for c in groups[0].completions]

    assert generate(stage=True) == generate(stage=False)


def test_the_last_staged_version_is_the_one_that_is_committed(paths: dict[str, Path]) -> None:
    model = model_of(paths["llama"])
    weights = make_weights(model)
    original = model.model.norm.weight.clone()
    weights.stage(*publish(model, 1, 2.0))
    weights.stage(*publish(model, 2, 3.0))
    assert torch.equal(model.model.norm.weight, original)
    assert weights.commit() == Version(1, 2)
    assert torch.equal(model.model.norm.weight, original * 3)
    with pytest.raises(InfraError, match="no version is staged"):
        weights.commit()


def test_linear_weights_are_packed_a_share_at_a_time(paths: dict[str, Path]) -> None:
    model = model_of(paths["llama"])
    weights = ModelWeights(model, CPU, num_rows=8, version=None, pack_later=True)
    total = sum(linear.weight.nbytes for linear in weights.linears)
    most = max(linear.weight.nbytes for linear in weights.linears)
    plain = nn.functional.linear

    def check_packed() -> int:
        """The bytes that are packed, each of the weights in use."""
        num_bytes = 0
        for linear in weights.linears:
            x = torch.randn(8, linear.in_features)
            torch.testing.assert_close(linear(x), plain(x, linear.weight, linear.bias))
            num_bytes += linear.weight.nbytes if linear.packed is not None else 0
        return num_bytes

    weights.stage(*publish(model, 1, 2.0))
    weights.commit()
    assert check_packed() == 0
    packed = 0
    while packed < total:
        weights.pack(0.25)
        more = check_packed() - packed
        assert min(total / 4, total - packed) <= more < total / 4 + most
        packed += more
        if packed > total / 2:  # overtaken: what was packed is of the version before
            weights.stage(*publish(model, 2, 3.0))
            weights.commit()
            assert check_packed() == 0
            break
    weights.pack()
    assert check_packed() == total


def test_packing_that_fails_is_not_silent(
    paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(paths["llama"])
    weights = ModelWeights(model, CPU, num_rows=8, version=None, pack_later=True)
    assert weights.linears

    def failing(*_: Any) -> None:
        raise RuntimeError("can't allocate memory")

    weights.stage(*publish(model, 1, 2.0))
    weights.commit()
    with monkeypatch.context() as broken:
        broken.setattr(PackedLinear, "pack", failing)
        with pytest.raises(RuntimeError, match="allocate"):
            weights.pack()
    weights.pack()
    assert all(linear.packed is not None for linear in weights.linears)
