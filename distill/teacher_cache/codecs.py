"""The codecs of a cache: what is kept of one image as one row of bytes, packed on the host and unpacked on the device."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, Literal, Protocol, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

CodecName = Literal["features", "topk"]
FeatureType = Literal["fp16", "uint8"]
LEVELS = 255
LARGE_VOCABULARY = 2**16
"""Classes above which an index does not fit into two bytes."""


class Codec(Protocol):
    """Values of a batch, a float tensor [B, N, C] -> rows of bytes, and back."""

    facts: dict[str, Any]
    """What a manifest says of it; `codec_of` makes it again."""
    row: np.dtype
    """One image's row."""

    def pack(self, values: Tensor, labels: Tensor) -> NDArray[np.void]:
        """[B] of `row`. labels int64 [B]. Raises ValueError for values that the row cannot hold."""
        ...

    def unpack(self, rows: Tensor, labels: Tensor) -> Tensor:
        """float32 [B, N, C] of rows uint8 [B, bytes], on their device."""
        ...

    def whole(self, rows: NDArray[np.void]) -> NDArray[np.bool_]:
        """[B]: whether every number of the row is finite. Rows of samples that could not be read are not."""
        ...


class FeatureCodec:
    """`features`: N cells of C channels, in float16, or in 256 levels between each cell's least and largest value."""

    def __init__(self, cells: int, channels: int, dtype: FeatureType = "fp16") -> None:
        if dtype not in get_args(FeatureType):
            raise ValueError(f"dtype {dtype!r}: must be one of {', '.join(get_args(FeatureType))}")
        self.facts = {"name": "features", "dtype": dtype, "cells": cells, "channels": channels}
        self.shape = (cells, channels)
        levels = [("low", "<f2", (cells,)), ("step", "<f2", (cells,)), ("cell", "u1", self.shape)]
        self.row = np.dtype([("cell", "<f2", self.shape)] if dtype == "fp16" else levels)

    def pack(self, values: Tensor, labels: Tensor) -> NDArray[np.void]:
        """The rows of a batch of cells; cells beyond float16's 65,504 are refused."""
        rows = np.zeros(len(values), self.row)
        found = values.float().cpu().numpy()
        with np.errstate(over="ignore", invalid="ignore"):
            if "low" not in (self.row.names or ()):
                rows["cell"] = found
            else:
                rows["low"] = found.min(2)
                low = rows["low"].astype(np.float32)
                rows["step"] = (found.max(2) - low) / LEVELS
                step = rows["step"].astype(np.float32)[..., None]
                # by the stored numbers: their rounding is then no error of its own
                rows["cell"] = np.clip(np.rint((found - low[..., None]) / np.where(step > 0, step, 1)), 0, LEVELS)
        if not self.whole(rows).all():
            raise ValueError(f"a cell is {np.abs(found).max():.3g}, which float16 does not hold: this teacher cannot be cached")
        return rows

    def unpack(self, rows: Tensor, labels: Tensor) -> Tensor:
        """The cells of these rows; the labels are not read."""
        cells, _ = self.shape
        if "low" not in (self.row.names or ()):
            return _as(rows, torch.float16, self.shape).float()
        low, step = (_as(rows[:, i * 2 * cells : (i + 1) * 2 * cells], torch.float16, (cells, 1)).float() for i in range(2))
        return low + step * rows[:, 4 * cells :].unflatten(1, self.shape)

    def whole(self, rows: NDArray[np.void]) -> NDArray[np.bool_]:
        """Whether every number of a row is finite."""
        return _finite(rows, [name for name in ("low", "step", "cell") if name in (rows.dtype.names or ())])


class TopKCodec:
    """`topk`: of each of N rows of logits the k largest, the label's, and the log-sum-exp of all others.

    Unpacked, the others are as large as each other. Exact enough at temperature 1 alone: a higher one lives on the others.
    """

    def __init__(self, rows: int, classes: int, k: int = 50) -> None:
        if not 1 <= k <= classes:
            raise ValueError(f"k {k}: must be from 1 to the {classes} classes")
        self.facts = {"name": "topk", "k": k, "cells": rows, "channels": classes}
        self.k, self.classes = k, classes
        self.index = np.dtype("<u2" if classes <= LARGE_VOCABULARY else "<u4")
        several = [("rest", "<f2", (rows,)), ("label", "<f2", (rows,))]
        self.row = np.dtype([("index", self.index, (rows, k)), ("value", "<f2", (rows, k)), *several])

    def pack(self, values: Tensor, labels: Tensor) -> NDArray[np.void]:
        """The rows of a batch of logits; the largest come first."""
        logits = values.float().cpu()
        kept, index = logits.topk(self.k, dim=2)
        mine = labels.cpu()[:, None, None].expand(-1, logits.shape[1], 1)
        others = logits.scatter(2, index, -math.inf).scatter(2, mine, -math.inf).logsumexp(2)
        rows = np.zeros(len(logits), self.row)
        rows["index"], rows["value"] = index.numpy(), kept.numpy()
        rows["rest"] = torch.where(others.isneginf(), 0.0, others).numpy()  # no others: never read
        rows["label"] = logits.gather(2, mine)[..., 0].numpy()
        if not self.whole(rows).all():
            raise ValueError("a logit is beyond what float16 holds: this teacher cannot be cached")
        return rows

    def unpack(self, rows: Tensor, labels: Tensor) -> Tensor:
        """The logits of these rows, float32 [B, N, K]."""
        count, k = self.row["rest"].shape[0], self.k
        ends = [0, *np.cumsum([self.row[name].itemsize for name in ("index", "value", "rest", "label")]).tolist()]
        index, value, rest, label = (rows[:, a:b] for a, b in pairwise(ends))
        signed = torch.int16 if self.index.itemsize == 2 else torch.int32
        places = _as(index, signed, (count, k)).long() & (2 ** (8 * self.index.itemsize) - 1)
        mine = labels[:, None, None].expand(-1, count, 1)
        listed = (places == mine).any(2)
        left = (self.classes - k - 1 + listed.long()).clamp_min(1)  # classes that share the rest
        each = _as(rest, torch.float16, (count,)).float() - left.float().log()
        logits = each[..., None].repeat(1, 1, self.classes)
        logits.scatter_(2, mine, _as(label, torch.float16, (count, 1)).float())
        return logits.scatter_(2, places, _as(value, torch.float16, (count, k)).float())

    def whole(self, rows: NDArray[np.void]) -> NDArray[np.bool_]:
        """Whether every logit of a row is finite, and every index a class."""
        return _finite(rows, ["value", "rest", "label"]) & (rows["index"] < self.classes).all((1, 2))


def codec_of(facts: Mapping[str, Any]) -> Codec:
    """The codec that a manifest describes. ValueError for one that this version does not know."""
    if facts["name"] == "features":
        return FeatureCodec(facts["cells"], facts["channels"], facts["dtype"])
    if facts["name"] == "topk":
        return TopKCodec(facts["cells"], facts["channels"], facts["k"])
    raise ValueError(f"codec {facts['name']!r}: this version knows {', '.join(get_args(CodecName))}")


def absent_row(codec: Codec) -> NDArray[np.void]:
    """[1]: the row of a sample that could not be read; `whole` says no to it."""
    row = np.zeros(1, codec.row)
    for name in codec.row.names or ():
        if codec.row[name].base.kind == "f":
            row[name] = np.nan
    return row


def _as(rows: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """Bytes [B, n] as numbers of this type [B, *shape]; a copy, for views need rows that begin at a multiple of the size."""
    return rows.contiguous().view(dtype).unflatten(1, shape)


def _finite(rows: NDArray[np.void], names: list[str]) -> NDArray[np.bool_]:
    """Whether all floats of each row are finite. By their exponents: `np.isfinite` takes ten times as long for float16."""
    fine = np.ones(len(rows), bool)
    for name in names:
        if rows.dtype[name].base.kind == "f":
            exponents = np.ascontiguousarray(rows[name]).view("<u2").reshape(len(rows), -1) & 0x7C00
            fine &= (exponents != 0x7C00).all(1)
    return fine
