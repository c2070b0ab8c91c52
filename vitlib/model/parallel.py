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
from vitlib.model.execution import EXECUTE, fastest
from vitlib.model.layers import FFN, MHSA, Residual, Rows, take


class ParallelLayer(nn.Module):
    """One layer of K branches: eq. (2), with K = 1 half of eq. (1). (B, N, D) -> (B, N, D)."""

    execution = "seq"  # how the branches are processed: see execution.py

    def __init__(self, config: ViTConfig):
        super().__init__()
        width, scale, drop = config.width, config.layer_scale, config.drop_path
        self.drop_path = drop
        branches = range(config.branches)
        # Each branch owns its tensors: LAMB's trust ratio is per tensor, so stacking them would be another optimizer.
        self.mhsa = nn.ModuleList(
            Residual(MHSA(width, config.heads, config.inner, config.key_bias), width, scale, drop) for _ in branches
        )
        self.ffn = nn.ModuleList(Residual(FFN(width, config.ffn_width), width, scale, drop) for _ in branches)

    def forward(
        self, x: Tensor, draws: Tensor | None = None, relative: Tensor | None = None, rows: Rows = None
    ) -> Tensor:
        """`draws` (branches, 2, B): this layer's stochastic-depth draws, [:, 0] for mhsa and [:, 1] for ffn.

        `rows`: the tokens that are read behind this layer; (B, M, D) then, and nothing is computed for the others.
        """
        if draws is None and self.training and self.drop_path > 0:
            draws = torch.rand(len(self.mhsa), 2, len(x), device=x.device)
        if len(self.mhsa) > 1 and self.execution != "seq":
            execution = self.execution if self.execution != "auto" else fastest(self, x, relative, rows)
            return EXECUTE[execution](self, x, draws, relative, rows)  # the same sums
        return self.equation_2(x, draws, relative, rows)

    def equation_2(self, x: Tensor, draws: Tensor | None, relative: Tensor | None, rows: Rows) -> Tensor:
        """One branch after the other."""
        mhsa = [m(x, _draw(draws, k, 0), relative=relative, rows=rows) for k, m in enumerate(self.mhsa)]
        x = take(x, rows) + sum(mhsa)
        return x + sum(ffn(x, _draw(draws, k, 1)) for k, ffn in enumerate(self.ffn))

    def __getstate__(self) -> dict:
        """Copies and pickles do without the matrices that `par` keeps for inference."""
        return {name: value for name, value in self.__dict__.items() if name != "kept"}


def _draw(draws: Tensor | None, branch: int, part: int) -> Tensor | None:
    return None if draws is None else draws[branch, part]
