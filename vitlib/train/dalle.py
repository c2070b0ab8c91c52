"""DALL-E's encoder as a tokenizer (Ramesh et al. 2021): what BEiT predicts, where its weights are on disk.

A patch is 8x8 pixels of it, so that a model with a grid of n x n patches has its images seen at 8n x 8n, as BEiT's are at
112 for 14 x 14. The environment variable VITLIB_DALLE names a safetensors file or a state dict with the encoder's tensors;
the published encoder.pkl is a pickled module, which runs code as it is read, and is refused: its `state_dict()`, saved
where it can be read, is what this wants.

Released code: openai/DALL-E, dall_e/encoder.py. A 7x7 convolution; four groups of two residual blocks with 256, 512, 1024
and 2048 channels, max-pooling between; a 1x1 convolution to 8192 tokens. Pixels in [0, 1] are mapped to [0.1, 0.9].
"""

from __future__ import annotations

import functools
import hashlib
import os
import pickle
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from vitlib.data import DataSet
from vitlib.data.memory import resize
from vitlib.errors import UsageError

VOCABULARY = 8192
WIDTH = 256
GROUPS, BLOCKS = 4, 2
GAIN = 1 / (GROUPS * BLOCKS) ** 2  # of every block's branch
PIXELS = 8  # side of a patch
EPS = 0.1


class DalleEncoder:
    """Tokens of the published encoder for models with `grid` x `grid` patches. Nothing of it is trained."""

    outputs = VOCABULARY

    def __init__(self, weights: dict[str, Tensor], grid: int):
        self.w, self.grid = weights, grid

    def to(self, device: str) -> DalleEncoder:
        return DalleEncoder({name: tensor.to(device) for name, tensor in self.w.items()}, self.grid)

    def look_up(self, images: Tensor, data: DataSet) -> Tensor:
        """Tokens of uint8 images: (B, C, H, W) -> int64 (B, patches). A single channel stands for all three."""
        pixels = resize(images.to(self.w["blocks.input.w"].device), PIXELS * self.grid).float() / 255
        return self.logits(pixels.expand(-1, 3, -1, -1)).argmax(dim=1).flatten(1)

    @torch.no_grad()
    def logits(self, pixels: Tensor) -> Tensor:
        """Pixels in [0, 1], (B, 3, 8n, 8n) -> (B, V, n, n)."""
        x = self._conv("blocks.input", (1 - 2 * EPS) * pixels + EPS)
        for group in range(1, GROUPS + 1):
            for block in range(1, BLOCKS + 1):
                x = self._block(f"blocks.group_{group}.block_{block}", x)
            x = F.max_pool2d(x, 2) if group < GROUPS else x
        return self._conv("blocks.output.conv", F.relu(x))

    def _block(self, name: str, x: Tensor) -> Tensor:
        y = x
        for i in (1, 2, 3, 4):
            y = self._conv(f"{name}.res_path.conv_{i}", F.relu(y))
        widens = f"{name}.id_path.w" in self.w
        return (self._conv(f"{name}.id_path", x) if widens else x) + GAIN * y

    def _conv(self, name: str, x: Tensor) -> Tensor:
        weight = self.w[f"{name}.w"]
        return F.conv2d(x, weight, self.w[f"{name}.b"], padding=weight.shape[-1] // 2)


def shapes() -> dict[str, tuple[int, ...]]:
    """The encoder's tensors by name."""
    convs = {"blocks.input": (WIDTH, 3, 7), "blocks.output.conv": (VOCABULARY, 8 * WIDTH, 1)}
    before = WIDTH
    for group in range(1, GROUPS + 1):
        width = WIDTH << (group - 1)
        for block in range(1, BLOCKS + 1):
            name, hidden = f"blocks.group_{group}.block_{block}", width // 4
            inputs = (before, hidden, hidden, hidden)
            for i, (fan_in, out, kernel) in enumerate(zip(inputs, (*[hidden] * 3, width), (3, 3, 3, 1), strict=True)):
                convs[f"{name}.res_path.conv_{i + 1}"] = (out, fan_in, kernel)
            if before != width:
                convs[f"{name}.id_path"] = (width, before, 1)
            before = width
    sizes = {f"{name}.w": (out, fan_in, k, k) for name, (out, fan_in, k) in convs.items()}
    return sizes | {f"{name}.b": (out,) for name, (out, _, _) in convs.items()}


def _path() -> Path:
    path = Path(os.environ.get("VITLIB_DALLE", ""))
    if not path.is_file():
        raise UsageError(
            "targets 'dalle' need the weights of DALL-E's encoder: VITLIB_DALLE is the path of a safetensors file or state "
            f"dict, and there is no file {str(path)!r}"
        )
    return path


def checksum() -> str:
    """Of the weights file: what a run's hash holds. Raises UsageError where there is none."""
    path = _path()
    return _checksum(path, path.stat().st_mtime_ns)


@functools.cache
def _checksum(path: Path, _changed: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def load(grid: int) -> DalleEncoder:
    """Raises UsageError for a file that is not there, is unsafe to read, or holds other tensors."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = _path()
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError) as fault:
        raise UsageError(f"{path} is neither a safetensors file nor a state dict ({type(fault).__name__})") from fault
    found = {n: tuple(t.shape) for n, t in state.items() if isinstance(t, Tensor)} if isinstance(state, dict) else {}
    wanted = shapes()
    if differ := sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name)):
        raise UsageError(f"{path} is not DALL-E's encoder: {len(differ)} tensors differ, the first is {differ[0]}")
    return DalleEncoder({name: tensor.float() for name, tensor in state.items()}, grid)
