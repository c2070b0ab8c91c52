"""What a finished run says: metrics, which images were right, and where and when it ran."""

from __future__ import annotations

import base64
from dataclasses import dataclass

import numpy as np

# What every result says of its surroundings besides its numbers.
ABOUT = ("split", "wall_s", "cpu_s", "mem_mb", "device", "torch", "python", "commit", "date")


@dataclass(frozen=True)
class Result:
    """A finished run: metrics, which images were right, and where and when it ran."""

    hash: str
    metrics: dict[str, float]
    correct: np.ndarray | None  # bool (images of the split,), in the split's order; None for masked pre-training
    ledger: dict[str, str]  # hash of every part of a claim when the run began
    about: dict  # split, wall_s, cpu_s, mem_mb, gpu_mem_mb, device, world (processes), versions, commit, date, files
    correct_v2: np.ndarray | None = None  # the same of ImageNet-V2, where it was there

    @property
    def files(self) -> dict[str, str]:
        """Split -> checksum of its listing; empty for images in memory, whose pixels are in the hash, and in older results."""
        return self.about.get("files", {})

    def record(self) -> dict:
        more = {} if self.correct_v2 is None else {"correct_v2": _packed(self.correct_v2)}
        return {
            "hash": self.hash, "metrics": self.metrics, "correct": _packed(self.correct), "ledger": self.ledger,
            **more, **self.about,
        }  # fmt: skip

    @classmethod
    def from_record(cls, record: dict) -> Result:
        """Raises KeyError or ValueError for a record that is not whole or contradicts itself."""
        record = dict(record)
        packed, packed_v2 = record.pop("correct"), record.pop("correct_v2", None)
        named = {name: record.pop(name) for name in ("hash", "metrics", "ledger")}
        if absent := [name for name in ABOUT if name not in record]:
            raise KeyError(", ".join(absent))
        correct = packed and _unpacked(packed, named["metrics"], "top1")
        correct_v2 = packed_v2 and _unpacked(packed_v2, named["metrics"], "top1_v2")
        return cls(correct=correct, about=record, correct_v2=correct_v2, **named)


def _packed(correct: np.ndarray | None) -> dict | None:
    """Which images were right, one bit each."""
    if correct is None:
        return None
    return {"images": len(correct), "bits": base64.b64encode(np.packbits(correct).tobytes()).decode()}


def _unpacked(packed: dict, metrics: dict[str, float], name: str) -> np.ndarray:
    """Bool (images,). Raises ValueError where the bits contradict the accuracy of that name."""
    bits = np.frombuffer(base64.b64decode(packed["bits"]), np.uint8)
    if len(bits) != -(-packed["images"] // 8):
        raise ValueError(f"{len(bits)} bytes of bits for {packed['images']} images")
    correct = np.unpackbits(bits, count=packed["images"]).astype(bool)
    if not np.isclose(100 * correct.mean(), metrics[name]):
        raise ValueError(f"{name} is not what the bits say")
    return correct
