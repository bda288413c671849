"""Lossless sparse deltas between two versions of the same bytes.

At RL learning rates 95 to 99 % of a bf16 model's weights keep their bits from one step to the next.
A delta says where elements differ and by how much, in integers. So NaN payloads, signed zeros and
every dtype come out bit for bit.

A delta is a header and two sections. *Positions* are gaps between changed elements, in 16 bits; the
gap 65535 skips 65535 unchanged elements. *Values* are the elements' wrapping differences as
integers, zigzag coded: a step by one unit in the last place is 1 or 2. Both sections are split into
byte planes, and zstd level 1 compresses each plane that gets smaller. The last ``size % 8`` bytes
travel as they are. The header holds the sizes, the checksums of base and result, and a checksum of
all that follows.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow
import xxhash

from raygrpo.errors import InfraError, WeightsCorrupt
from raygrpo.types import ByteArray

MAGIC = b"rgD1"
# Above this share of changed elements the plain bytes are sent: over a link of 1 Gbit/s they arrive
# as soon as a delta is coded, sent and decoded (benchmarks/delta_bytes.py).
DENSE_FRAC = 0.25
WORD = 8
CHUNK_BYTES = 16 * 2**20
SAMPLE_BYTES, SAMPLE_STEP = 2**13, 2**19
BLOCK_GAPS = 2**20
SKIP = 2**16 - 1

_SEAL = struct.Struct("<4sQ")  # magic, checksum of all that follows
_HEAD = struct.Struct("<BBQQQQQ")  # 1, then the fields of `_Header`
_CODEC = pyarrow.Codec("zstd", compression_level=1)


class _Header(NamedTuple):
    """A delta's header: ``base`` and ``result`` are xxh3_64 of all bytes before and after."""

    itemsize: int
    num_bytes: int
    base: int
    result: int
    num_changed: int
    num_symbols: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """The outcome of a comparison; ``data`` is the delta, None if the plain bytes are better."""

    data: bytes | None
    num_changed: int
    num_elements: int


def checksum(data: ByteArray) -> int:
    """xxh3_64 of a byte array."""
    return xxhash.xxh3_64_intdigest(data.data)


def compare(
    old: ByteArray,
    new: ByteArray,
    base: int,
    result: int,
    itemsize: int = 2,
    max_frac: float = DENSE_FRAC,
) -> Encoded:
    """The delta from ``old`` to ``new``, two arrays of one size with these checksums.

    ``itemsize`` (1, 2, 4 or 8) is the width in which elements are compared. Every width gives the
    right bytes; the width of most elements gives the smallest delta. Above ``max_frac`` of changed
    elements the comparison stops, and ``num_changed`` is an estimate from samples.

    Raises:
        ValueError: the sizes differ, or the width is not 1, 2, 4 or 8.
    """
    if itemsize not in (1, 2, 4, 8) or old.size != new.size:
        raise ValueError(f"cannot compare {old.size} and {new.size} bytes by {itemsize}")
    num_elements, changed = old.size // itemsize, 0
    sampled = _sampled_frac(old, new, itemsize)
    dense = Encoded(data=None, num_changed=round(sampled * num_elements), num_elements=num_elements)
    if sampled > 2 * max_frac:
        return dense
    positions: list[npt.NDArray[np.int64]] = []
    values: list[npt.NDArray[Any]] = [np.empty(0, f"<u{itemsize}")]
    for start in range(0, old.size // WORD * WORD, CHUNK_BYTES):
        where, difference = _differences(old, new, itemsize, start)
        changed += where.size
        if changed > max_frac * num_elements:
            return replace(dense, num_changed=max(changed, dense.num_changed))
        positions.append(where)
        values.append(difference)
    gaps = _gaps(positions)
    planes = [*_planes(gaps), *_planes(np.concatenate(values))]
    head = _HEAD.pack(1, itemsize, old.size, base, result, changed, gaps.size)
    tail = new[old.size // WORD * WORD :].tobytes()
    data = _seal(head, tail, *(_compress(plane) for plane in planes))
    smaller = len(data) < new.size
    return Encoded(data=data if smaller else None, num_changed=changed, num_elements=num_elements)


def patch(target: ByteArray, data: ByteArray, base: int) -> int:
    """Turns the base into the result in place; returns the checksum that the result must have.

    The caller vouches for ``base``, the target's checksum, and checks the result.

    Raises:
        InfraError: ``data`` is of another base; the target is unchanged.
        WeightsCorrupt: the delta's bytes have changed; the target is unchanged.
    """
    header = _read_header(data)
    if target.size != header.num_bytes or base != header.base:
        raise InfraError("the delta is of another base", "take a whole version")
    sections = data[_SEAL.size + _HEAD.size :]
    body = target.size // WORD * WORD
    tail = target.size - body
    target[body:] = sections[:tail]
    reader = _Reader(sections[tail:])
    gaps = reader.planes(header.num_symbols, 2)
    values = reader.planes(header.num_changed, header.itemsize)
    elements = target[:body].view(values.dtype)
    place = 0
    for where in _positions(gaps):
        zigzag = values[place : place + where.size]
        place += where.size
        elements[where] += (zigzag >> 1) ^ (0 - (zigzag & 1))
    return header.result


class _Reader:
    """Takes planes off the front of a delta's sections."""

    def __init__(self, sections: ByteArray) -> None:
        self._rest = sections

    def planes(self, count: int, itemsize: int) -> npt.NDArray[Any]:
        out = np.empty((count, itemsize), np.uint8)
        for place in range(itemsize):
            size = int.from_bytes(self._rest[:WORD].tobytes(), "little")
            part, self._rest = self._rest[WORD : WORD + size], self._rest[WORD + size :]
            out[:, place] = part if size == count else _decompress(part, count)
        return out.reshape(-1).view(f"<u{itemsize}")


def _read_header(data: ByteArray) -> _Header:
    """A delta's header, after the checksum is verified."""
    if data.size >= _SEAL.size + _HEAD.size:
        magic, seal = _SEAL.unpack_from(data.data)
        if magic == MAGIC and seal == checksum(data[_SEAL.size :]):
            return _Header(*_HEAD.unpack_from(data.data, _SEAL.size)[1:])
    raise WeightsCorrupt("a delta is corrupt", "the weights are published again")


def _seal(head: bytes, *parts: bytes) -> bytes:
    body = b"".join((head, *parts))
    return _SEAL.pack(MAGIC, xxhash.xxh3_64_intdigest(body)) + body


def _differences(
    old: ByteArray, new: ByteArray, itemsize: int, start: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[Any]]:
    """Positions and zigzag differences of the elements that changed in one chunk.

    Words of 8 bytes are compared first. Few of them differ, and only their elements are compared.
    """
    unit, lane_bits = np.dtype(f"<u{itemsize}"), (WORD // itemsize).bit_length() - 1
    part = slice(start, min(start + CHUNK_BYTES, old.size // WORD * WORD))
    a, b = old[part].view(np.uint64), new[part].view(np.uint64)
    words = np.flatnonzero(a != b)
    before, after = a[words].view(unit), b[words].view(unit)
    chosen = np.flatnonzero(before != after)
    lane = chosen & ((1 << lane_bits) - 1)
    where = (words[chosen >> lane_bits] << lane_bits) + lane + start // itemsize
    difference = after[chosen] - before[chosen]
    one, sign = unit.type(1), unit.type(8 * itemsize - 1)
    return where, (difference << one) ^ (0 - (difference >> sign))


def _sampled_frac(old: ByteArray, new: ByteArray, itemsize: int) -> float:
    """The share of changed elements in a sample: a few percent of the bytes, spread evenly."""
    unit, end = f"<u{itemsize}", old.size // WORD * WORD
    parts = [slice(start, min(start + SAMPLE_BYTES, end)) for start in range(0, end, SAMPLE_STEP)]
    changed = sum(np.count_nonzero(old[p].view(unit) != new[p].view(unit)) for p in parts)
    return float(changed) * itemsize / max(sum(p.stop - p.start for p in parts), 1)


def _gaps(positions: list[npt.NDArray[np.int64]]) -> npt.NDArray[np.uint16]:
    """Counts of unchanged elements before each changed one; SKIPs make up longer counts."""
    parts, last = [np.empty(0, np.uint16)], -1
    for where in positions:
        if where.size:
            gaps = np.diff(where, prepend=last) - 1
            last = int(where[-1])
            parts.append(_symbols(gaps) if gaps.max() >= SKIP else gaps.astype(np.uint16))
    return np.concatenate(parts)


def _symbols(gaps: npt.NDArray[np.int64]) -> npt.NDArray[np.uint16]:
    skips = gaps // SKIP
    symbols = np.full(gaps.size + int(skips.sum()), SKIP, np.uint16)
    symbols[np.cumsum(skips + 1) - 1] = gaps % SKIP
    return symbols


def _positions(gaps: npt.NDArray[np.uint16]) -> Iterator[npt.NDArray[np.int64]]:
    """The positions behind `_gaps`, block by block."""
    base = 0
    for start in range(0, gaps.size, BLOCK_GAPS):
        block = gaps[start : start + BLOCK_GAPS]
        lands = block != SKIP
        ends = np.cumsum(block + lands.astype(np.int64)) + base
        base = int(ends[-1])
        yield ends[lands] - 1


def _planes(values: npt.NDArray[Any]) -> list[ByteArray]:
    size = values.dtype.itemsize
    flat = values.astype(f"<u{size}", copy=False).view(np.uint8).reshape(-1, size)
    return [np.ascontiguousarray(flat[:, place]) for place in range(size)]


def _compress(plane: ByteArray) -> bytes:
    small: bytes = _CODEC.compress(plane, asbytes=True)
    data = small if len(small) < plane.size else plane.tobytes()
    return len(data).to_bytes(WORD, "little") + data


def _decompress(part: ByteArray, count: int) -> ByteArray:
    plain = _CODEC.decompress(part, decompressed_size=count)
    return np.frombuffer(plain, np.uint8)
