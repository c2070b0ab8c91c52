"""Thing 1: residual layers side by side (section 3, equations 1 and 2).

Sequential, eq. (1), two layers:                     Parallel, eq. (2), the same four residual functions:
    x'      = x      + mhsa_1(x)                         x'  = x  + mhsa_1(x)  + mhsa_2(x)
    x''     = x'     + ffn_1(x')                         x'' = x' + ffn_1(x')  + ffn_2(x')
    x'''    = x''    + mhsa_2(x'')
    x''''   = x'''   + ffn_2(x''')

If each residual r is small, r'(x + r(x)) is close to r'(x), and both forms nearly agree. Any number of branches
works; one branch is the plain ViT. Nothing is divided by the number of branches, and every branch has a norm, a
LayerScale and a stochastic-depth draw of its own, so that parameters and multiply-adds are those of eq. (1).

Released code: models_v2.py, Block_paralx2 and Layer_scale_init_Block_paralx2 (two branches only).

Two executions of one model (Table 4):
seq   eq. (2) as written, one branch after the other: what the released code and timm do
par   at once: the branches' tensors are concatenated at each call, so that K branches are one wide MHSA and one
      wide FFN. The same function with the same gradients up to rounding, so it trains, too. A layer with a part that
      must be called (an adapter, a hook, a quantized matrix) runs as seq
(`weights.fuse` concatenates them once and for all, for inference and export.)

Why `par` is exact: all branches read the same x, so they share LayerNorm's normalisation, and its affine part folds
into the matrix after it; LayerScale folds into the matrix before it; and a sum of matrix products is one product of
concatenated matrices. So 18x2 is an 18-layer ViT with twice the heads and a twice wider FFN. (Paper, section 3: the
sum of two branches; it does not say that they are one wide layer.)

K branches, B batch, N tokens, M of them read, D width, F = 4D, H heads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitlib.errors import UsageError, unknown
from vitlib.model.config import ViTConfig
from vitlib.model.layers import ALL, EPS, FFN, MHSA, Reads, Residual, attend, is_plain, kept, project, take

EXECUTIONS = ("seq", "par")


class ParallelLayer(nn.Module):
    """One layer of K branches: eq. (2); with K = 1 a layer of the plain ViT. (B, N, D) -> (B, M, D)."""

    execution = "seq"

    def __init__(self, config: ViTConfig):
        super().__init__()
        width, scale, drop = config.width, config.layer_scale, config.drop_path
        branches = range(config.branches)
        # Each branch owns its tensors: LAMB's trust ratio is per tensor, so stacking them would be another optimizer.
        self.mhsa = nn.ModuleList(
            Residual(MHSA(width, config.heads, config.inner, config.key_bias), width, scale, drop) for _ in branches
        )
        self.ffn = nn.ModuleList(Residual(FFN(width, config.ffn_width), width, scale, drop) for _ in branches)

    @property
    def drop_path(self) -> float:
        """The highest rate of its residual functions, each of which has its own."""
        return max(getattr(r, "drop_path", 0.0) for r in (*self.mhsa, *self.ffn))

    def forward(self, x: Tensor, draws: Tensor | None = None, reads: Reads = ALL) -> Tensor:
        """`draws` (K, 2, B): stochastic depth, uniform in [0, 1), [:, 0] for mhsa and [:, 1] for ffn."""
        if not self.training or self.drop_path == 0:
            draws = None
        elif draws is None:
            draws = torch.rand(len(self.mhsa), 2, x.shape[0], device=x.device)
        if self.execution == "par" and len(self.mhsa) > 1 and obstacle(self) is None:
            return at_once(self, x, draws, reads)
        # each branch has draws of its own, (B,)
        of_mhsa, of_ffn = ([None] * len(r) for r in (self.mhsa, self.ffn)) if draws is None else draws.unbind(1)
        # eq. (2)
        attended = sum(r(x, draw, reads) for r, draw in zip(self.mhsa, of_mhsa, strict=True))
        x = take(x, reads.rows) + attended
        return x + sum(r(x, draw) for r, draw in zip(self.ffn, of_ffn, strict=True))


def set_execution(model: nn.Module, execution: str) -> nn.Module:
    """Choose how the branches of a ViT are processed from now on, one of EXECUTIONS; the model itself.

    Raises UsageError for an unknown execution, and for what is no ViT.
    """
    if not all(isinstance(layer, ParallelLayer) for layer in getattr(model, "layers", [None])):
        raise UsageError(f"the branches of a {type(model).__name__} cannot be processed otherwise: allowed is a ViT")
    if execution not in EXECUTIONS:
        raise unknown("execution", execution, EXECUTIONS)
    for layer in model.layers:
        layer.execution = execution
    return model


def at_once(layer: ParallelLayer, x: Tensor, draws: Tensor | None, reads: Reads) -> Tensor:
    """`par`: eq. (2), all branches at once. (B, N, D) -> (B, M, D), arguments as in `ParallelLayer.forward`."""
    K, wide = len(layer.mhsa), side_by_side(layer)
    # stochastic depth: 0 or 1 / (1 - rate) for each sample and branch, (B, K), of mhsa and of ffn
    keep = [None, None]
    if draws is not None:
        rates = layer.mhsa[0].drop_path, layer.ffn[0].drop_path
        keep = [kept(u, rate, x.dtype).T for u, rate in zip(draws.unbind(1), rates, strict=True)]
    if reads.relative is not None:  # the same for the heads of every branch
        reads = reads._replace(relative=reads.relative.repeat(K, 1, 1))
    q, k, v = project(_normalised(x), *wide["qkv"], reads.rows)  # (B, N, K D) each
    attended = attend(q, k, v, K * layer.mhsa[0].f.heads, reads)
    x = take(x, reads.rows) + _sum(attended, *wide["proj"], keep[0])
    hidden = F.gelu(F.linear(_normalised(x), *wide["fc1"]))  # (B, M, K F)
    return x + _sum(hidden, *wide["fc2"], keep[1])


def side_by_side(layer: ParallelLayer) -> dict[str, tuple[Tensor, Tensor]]:
    """The four wide matrices and their biases, made from the branches' tensors, which get the gradients.

    qkv (3 K D, D): q of every branch, then k, then v. proj (D, K D). fc1 (K F, D). fc2 (D, K F). The biases of proj and
    fc2 stay apart, (K, D), since stochastic depth drops them with their branches.
    """
    return {"qkv": _first(layer.mhsa, "qkv"), "proj": _last(layer.mhsa, "proj"),
            "fc1": _first(layer.ffn, "fc1"), "fc2": _last(layer.ffn, "fc2")}  # fmt: skip


def _first(branches: nn.ModuleList, name: str) -> tuple[Tensor, Tensor]:
    """First matrices with the norms' affine parts folded in."""
    parts = 3 if name == "qkv" else 1  # q, k, v stay outermost
    weights, biases = [], []
    for branch in branches:
        matrix = getattr(branch.f, name)
        bias = branch.f.qkv_bias if name == "qkv" else matrix.bias
        weights.append((matrix.weight * branch.norm.weight).unflatten(0, (parts, -1)))
        biases.append(torch.addmv(bias, matrix.weight, branch.norm.bias).unflatten(0, (parts, -1)))
    return torch.cat(weights, dim=1).flatten(0, 1), torch.cat(biases, dim=1).flatten()


def _last(branches: nn.ModuleList, name: str) -> tuple[Tensor, Tensor]:
    """Last matrices with LayerScale folded in."""
    weights, biases = [], []
    for branch in branches:
        matrix, gamma = getattr(branch.f, name), branch.gamma
        weights.append(matrix.weight if gamma is None else matrix.weight * gamma[:, None])
        biases.append(matrix.bias if gamma is None else matrix.bias * gamma)
    return torch.cat(weights, dim=1), torch.stack(biases)


def _normalised(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=EPS)


def _sum(hidden: Tensor, weight: Tensor, bias: Tensor, keep: Tensor | None) -> Tensor:
    """The sum over branches after the last matrix: (B, M, K F) -> (B, M, D)."""
    if keep is None:
        return F.linear(hidden, weight, bias.sum(0))
    # Stochastic depth: each branch and sample is kept or dropped on its own, bias included.
    hidden = hidden.unflatten(-1, (bias.shape[0], -1)) * keep[:, None, :, None]
    return F.linear(hidden.flatten(-2), weight) + (keep @ bias)[:, None]


PLAIN = (nn.LayerNorm, MHSA, FFN, nn.Linear)


def obstacle(layer: ParallelLayer) -> str | None:
    """Why the branches of a layer cannot be concatenated, e.g. "mhsa.0.f.qkv is a LoraLayer"; None: they can.

    Checked at each call of `par`, since an adapter or a hook may be added at any time; so it must be quick.
    """
    for part, branches in (("mhsa", layer.mhsa), ("ffn", layer.ffn)):
        for k, r in enumerate(branches):
            inside = {"": r}
            if is_plain(r, Residual):
                inside = {".norm": r.norm, ".f": r.f} | {f".f.{name}": m for name, m in r.f._modules.items()}
            for name, module in inside.items():
                if not is_plain(module, *PLAIN):
                    kind = f"{type(module).__module__}.{type(module).__qualname__}"
                    return f"{part}.{k}{name} is an adapter, a quantized layer or one with hooks ({kind})"
            own = getattr(r.f, "q_bias", None) is not None  # biases of q and v in the place of qkv's
            biases = [m.bias for name, m in r.f._modules.items() if not (own and name == "qkv")]
            if None in biases or r.norm.bias is None or r.norm.eps != EPS:
                return "a bias is missing or a norm is another one"
        if any(_form(r) != _form(branches[0]) for r in branches[1:]):
            return "the branches are not alike"
    return None


def _form(r: Residual) -> tuple:
    sizes = [tuple(p.shape) for m in (r.norm, *r.f._modules.values()) for p in m._parameters.values() if p is not None]
    return sizes, getattr(r.f, "heads", None), r.gamma is None, r.drop_path
