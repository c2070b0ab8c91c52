"""Random numbers as a function of names, never of the batch, the worker or the process count.

Every per-sample draw (order, flip, mixup, mask, drop-path) is a function of (seed, purpose, epoch, image
index), so that two arms of a comparison see the same images in the same order under the same noise, and a
run does not change when it is split differently. SplitMix64 (Steele, Lea, Flood 2014) gives random access:
its k-th output is a hash of `key + k * GAMMA`.
"""

from __future__ import annotations

import hashlib

import numpy as np

GAMMA = np.uint64(0x9E3779B97F4A7C15)


def key(*names: object) -> int:
    """A 64-bit key that depends on every name and on their order."""
    text = "/".join(map(str, names)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def _split_mix(state: np.ndarray) -> np.ndarray:
    z = state
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def uniform(seed: int, purpose: str, epoch: int, index: np.ndarray, n: int = 1) -> np.ndarray:
    """n uniform numbers in [0, 1) for each image: (B,) image indices -> (B, n) float64."""
    # Two rounds: the first turns the image index into a stream, the second walks along it, so that the streams
    # of neighbouring images do not overlap whatever n is.
    with np.errstate(over="ignore"):
        start = _split_mix(np.uint64(key(seed, purpose, epoch)) + np.asarray(index, dtype=np.uint64) * GAMMA)
        steps = np.arange(1, n + 1, dtype=np.uint64) * GAMMA
        bits = _split_mix(start[:, None] + steps[None, :])
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def order(seed: int, purpose: str, epoch: int, n: int) -> np.ndarray:
    """A permutation of range(n): the images sorted by their own draw."""
    return np.argsort(uniform(seed, purpose, epoch, np.arange(n))[:, 0], kind="stable")
