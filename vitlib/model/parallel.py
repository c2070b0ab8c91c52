"""Thing 1: residual layers side by side (section 3, equations 1 and 2).

Sequential, eq. (1), two layers:                     Parallel, eq. (2), the same four residual functions:
    x'      = x      + mhsa_1(x)                         x'  = x  + mhsa_1(x)  + mhsa_2(x)
    x''     = x'     + ffn_1(x')                         x'' = x' + ffn_1(x')  + ffn_2(x')
    x'''    = x''    + mhsa_2(x'')
    x''''   = x'''   + ffn_2(x''')

If each residual r is small, r'(x + r(x)) is close to r'(x), under which both forms agree. Any number of branches
works; one branch is the plain ViT. Nothing is divided by the number of branches, and every branch has a norm, a
LayerScale and a stochastic-depth draw of its own, so that parameters and multiply-adds are those of eq. (1).

Released code: models_v2.py, Block_paralx2 and Layer_scale_init_Block_paralx2 (two branches only).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitlib.model.config import ViTConfig
from vitlib.model.execution import par_layer
from vitlib.model.layers import FFN, MHSA, Residual


class ParallelLayer(nn.Module):
    """One layer of K branches: eq. (2), with K = 1 half of eq. (1). (B, N, D) -> (B, N, D)."""

    execution = "seq"  # or "par": see execution.py

    def __init__(self, config: ViTConfig):
        super().__init__()
        width, scale, drop = config.width, config.layer_scale, config.drop_path
        self.drop_path = drop
        branches = range(config.branches)
        # Each branch owns its tensors: LAMB's trust ratio is per tensor, so stacking them would be another optimizer.
        self.mhsa = nn.ModuleList(Residual(MHSA(width, config.heads), width, scale, drop) for _ in branches)
        self.ffn = nn.ModuleList(Residual(FFN(width), width, scale, drop) for _ in branches)

    def forward(self, x: Tensor, draws: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """`draws` (branches, 2, B): this layer's stochastic-depth draws, [:, 0] for mhsa and [:, 1] for ffn."""
        if draws is None and self.training and self.drop_path > 0:
            draws = torch.rand(len(self.mhsa), 2, len(x), device=x.device)
        if self.execution == "par" and len(self.mhsa) > 1:
            return par_layer(self, x, draws, bias)  # the same sums, the branches' tensors side by side
        x = x + sum(mhsa(x, _draw(draws, k, 0), bias) for k, mhsa in enumerate(self.mhsa))
        x = x + sum(ffn(x, _draw(draws, k, 1)) for k, ffn in enumerate(self.ffn))
        return x


def _draw(draws: Tensor | None, branch: int, part: int) -> Tensor | None:
    return None if draws is None else draws[branch, part]
