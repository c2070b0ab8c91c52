"""Random numbers as a function of names, never of the batch, the worker or the process count.

Every per-sample draw (order, flip, mixup, mask, drop-path) is a function of (seed, purpose, epoch, image
index), so that two arms of a comparison see the same images in the same order under the same noise, and a
run does not change when it is split differently. SplitMix64 (Steele, Lea, Flood 2014) gives random access:
its k-th output is a hash of `key + k * GAMMA`.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

GAMMA = np.uint64(0x9E3779B97F4A7C15)
MIX = (30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)  # a shift and a factor, twice
LAST = 31


def key(*names: object) -> int:
    """A 64-bit key that depends on every name and on their order."""
    text = "/".join(map(str, names)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def _split_mix(z: np.ndarray) -> np.ndarray:
    for shift, factor in MIX:
        z = (z ^ (z >> np.uint64(shift))) * np.uint64(factor)
    return z ^ (z >> np.uint64(LAST))


def _streams(seed: int, purpose: str, epoch: int, index: np.ndarray) -> np.ndarray:
    """Where the stream of each image begins: uint64 (B,)."""
    with np.errstate(over="ignore"):
        return _split_mix(np.uint64(key(seed, purpose, epoch)) + np.asarray(index, dtype=np.uint64) * GAMMA)


def uniform(seed: int, purpose: str, epoch: int, index: np.ndarray, n: int = 1) -> np.ndarray:
    """n uniform numbers in [0, 1) for each image: (B,) image indices -> (B, n) float64."""
    # Two rounds: the first turns the image index into a stream, the second walks along it, so that the streams
    # of neighbouring images do not overlap whatever n is.
    with np.errstate(over="ignore"):
        steps = np.arange(1, n + 1, dtype=np.uint64) * GAMMA
        bits = _split_mix(_streams(seed, purpose, epoch, index)[:, None] + steps[None, :])
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def uniform_on(
    device: torch.device | str, seed: int, purpose: str, epoch: int, index: np.ndarray, n: int = 1
) -> Tensor:
    """`uniform`, bit for bit, computed on `device`: for draws that are too many to be made on the host."""
    start = torch.from_numpy(_streams(seed, purpose, epoch, index).view(np.int64)).to(device)
    z = start[:, None] + torch.arange(1, n + 1, device=device) * _signed(int(GAMMA))
    for shift, factor in MIX:
        z ^= _shifted(z, shift)
        z *= _signed(factor)
    z ^= _shifted(z, LAST)
    return _shifted(z, 11).double().mul_(2.0**-53)


def _signed(bits: int) -> int:
    """The int64 with these 64 bits: torch multiplies int64 alone, which wraps around as uint64 does."""
    return bits - (bits >> 63 << 64)


def _shifted(z: Tensor, by: int) -> Tensor:
    """z >> by with zeros moving in, where int64 would repeat its sign."""
    return (z >> by).bitwise_and_((1 << 64 - by) - 1)


def order(seed: int, purpose: str, epoch: int, n: int) -> np.ndarray:
    """A permutation of range(n): the images sorted by their own draw."""
    return np.argsort(uniform(seed, purpose, epoch, np.arange(n))[:, 0], kind="stable")
