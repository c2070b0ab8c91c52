"""The three model variants: parallel layers (eq. 2), stems (Algorithm 1), and the ViT around them."""

from vitlib.model.config import ViTConfig, vit_config
from vitlib.model.hmlp import HMLP, HMLPDecoder, HMLPStem
from vitlib.model.parallel import ParallelLayer, set_execution
from vitlib.model.regroup import commutation_gap, regroup
from vitlib.model.stems import leakage, make_stem
from vitlib.model.vit import ViT, resize_positions
from vitlib.model.weights import fuse

__all__ = [
    "HMLP", "HMLPDecoder", "HMLPStem", "ParallelLayer", "ViT", "ViTConfig", "commutation_gap", "fuse", "leakage", "make_stem",
    "regroup", "resize_positions", "set_execution", "vit_config",
]  # fmt: skip
