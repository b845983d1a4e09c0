"""GGUF's block formats Q4_1 and Q8_0, taken apart and multiplied out.

Layouts are those of ggml: a block is 32 weights along the input dimension. Q4_1 is a float16 step d, a float16 minimum
m and 16 bytes whose low nibbles are weights 0-15 and whose high nibbles are weights 16-31, w = d*q + m. Q8_0 is a
float16 step d and 32 signed bytes, w = d*q.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from furiosa_llm.example.errors import ModelFileError

BLOCK = 32
_Q4_1_NBYTES = 2 + 2 + BLOCK // 2
_Q8_0_NBYTES = 2 + BLOCK

Float = npt.NDArray[np.float32]
Rows = npt.NDArray[np.intp]


@dataclass(frozen=True, slots=True, kw_only=True)
class Q4Weight:
    """A matrix [N, K] in 4-bit blocks, w = step*quants + minimum."""

    quants: npt.NDArray[np.uint8]
    """[N, K/32, 32], each 0 to 15."""
    step: Float
    """[N, K/32], d."""
    minimum: Float
    """[N, K/32], m."""

    def take_rows(self, rows: Rows) -> Q4Weight:
        """The same matrix with its N output rows in another order."""
        return Q4Weight(quants=self.quants[rows], step=self.step[rows], minimum=self.minimum[rows])

    def dense(self) -> Float:
        """The float32 matrix [N, K]."""
        values = self.step[..., None] * self.quants.astype(np.float32) + self.minimum[..., None]
        return values.reshape(len(values), -1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Q8Weight:
    """A matrix [N, K] in 8-bit blocks, w = step*quants."""

    quants: npt.NDArray[np.int8]
    """[N, K/32, 32], each -128 to 127."""
    step: Float
    """[N, K/32], d."""

    def dense(self) -> Float:
        """The float32 matrix [N, K]."""
        values = self.step[..., None] * self.quants.astype(np.float32)
        return values.reshape(len(values), -1)


def decode_q4_1(raw: npt.NDArray[np.uint8]) -> Q4Weight:
    """Takes apart the bytes [N, K/32*20] of a Q4_1 matrix [N, K]; raises `ModelFileError` on another row length."""
    blocks = _split_rows(raw, _Q4_1_NBYTES, "Q4_1")
    packed = blocks[..., 4:]
    quants = np.concatenate([packed & 0x0F, packed >> 4], axis=-1)
    return Q4Weight(quants=quants, step=_half(blocks[..., 0:2]), minimum=_half(blocks[..., 2:4]))


def decode_q8_0(raw: npt.NDArray[np.uint8]) -> Q8Weight:
    """Takes apart the bytes [N, K/32*34] of a Q8_0 matrix [N, K]; raises `ModelFileError` on another row length."""
    blocks = _split_rows(raw, _Q8_0_NBYTES, "Q8_0")
    return Q8Weight(quants=blocks[..., 2:].view(np.int8), step=_half(blocks[..., 0:2]))


def unpermuted_rows(num_rows: int, heads: int) -> Rows:
    """For each row of a Q or K projection as Hugging Face orders it, the row of the GGUF file that holds it.

    GGUF's Llama converter interleaves the two halves of each head, for a rotary embedding that turns neighbours; ONNX's
    and Hugging Face's turns element i with element i + D/2.

    Args:
        num_rows: rows of the projection, heads * D.
        heads: query heads for Q, key/value heads for K.
    """
    half = num_rows // heads // 2
    return np.arange(num_rows).reshape(heads, half, 2).swapaxes(1, 2).reshape(-1)


def _split_rows(raw: npt.NDArray[np.uint8], block_nbytes: int, kind: str) -> npt.NDArray[np.uint8]:
    if raw.dtype != np.uint8 or raw.ndim != 2 or raw.shape[1] % block_nbytes:
        raise ModelFileError(
            f"{kind} data has shape {list(raw.shape)} and type {raw.dtype}; expected uint8 rows of whole "
            f"{block_nbytes}-byte blocks; pass the tensor's raw bytes as the gguf reader gives them"
        )
    return raw.reshape(raw.shape[0], -1, block_nbytes)


def _half(pair: npt.NDArray[np.uint8]) -> Float:
    return np.ascontiguousarray(pair).view("<f2")[..., 0].astype(np.float32)
