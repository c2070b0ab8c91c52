"""What trained models look at: attention before and after tuning, the filters of stems, what is predicted under a mask.

Each figure is drawn from the weights that a page's runs left in the store, those of the first seed, and comes with its
caption. Raises UsageError where they are not there.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from timm.utils import AttentionExtract
from torch import Tensor, nn

from lab.experiments.catalogue import Runs
from lab.report.figures import GREY, channels_last, one_of_each, pictures, prototypes
from lab.runs import execute, store
from lab.runs.spec import RunSpec
from vitlib.data import DataSet
from vitlib.errors import UsageError
from vitlib.model import ViT
from vitlib.model.weights import to_timm
from vitlib.train import masked

FILTERS = 8  # so many of a stem's, those with the largest norms


def here(runs: Runs, column: str, weights: str = "weights") -> dict[str, RunSpec]:
    """By row, the first run of each arm of a column; with "predictor", the pre-training that it started from."""
    arms = {
        a.row: runs.experiment.seeds_of(label)[0] for label, a in runs.experiment.arms.items() if a.column == column
    }
    specs = {row: spec.parent if weights == "predictor" else spec for row, spec in arms.items()}
    there = {row: s for row, s in specs.items() if store.weights_path(s, weights).is_file() and not s.streamed}
    if not there:
        raise UsageError(
            f"no {weights} of {column!r} runs on images in memory are in the store (imported runs have metrics only)"
        )
    return there


def examples(spec: RunSpec, count: int) -> tuple[DataSet, Tensor]:
    """The first image of each of `count` classes, of those that the run is measured on; and their pixels from 0 to 1."""
    data = execute.data_of(spec, spec.split)
    data = data.take(one_of_each(data)[:count])
    return data, data.pixels() / 255


@torch.no_grad()
def class_attention(model: ViT, images: Tensor) -> Tensor:
    """What the class token attends to, mean over heads: (B, C, H, W) -> (depth, B, 1 + patches); a row sums to 1."""
    twin = to_timm(model)
    for module in twin.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # a fused kernel has no map that could be read
    maps = AttentionExtract(twin, method="hook")(images).values()  # (B, heads, N, N) of each layer
    return torch.stack([layer.mean(dim=1)[:, 0] for layer in maps])


def attention(runs: Runs) -> tuple[Figure, str]:
    """The class token's attention in an early and in the last layer, before and after `attn` tuned the trunk."""
    spec = next(iter(here(runs, "attn").values()))
    data, pixels = examples(spec, count=3)
    both = {"before": execute.prepare(spec, data)[0].eval(), "after": execute.trained_model(spec)}
    seen = {when: class_attention(model, data.normalise(data.pixels())) for when, model in both.items()}
    early, last = spec.model.depth // 4, spec.model.depth - 1
    maps = {f"layer {i + 1}, {when}": m[i, :, 1:] for i in (early, last) for when, m in seen.items()}
    scale = ScalarMappable(plt.Normalize(0, max(float(m.max()) for m in maps.values())), "rocket_r")
    squares = [scale.to_rgba(m.numpy()).reshape(len(data), spec.model.grid, -1, 4) for m in maps.values()]
    rows = zip(channels_last(pixels), *squares, strict=True)
    names = [data.classes[label] for label in data.labels.tolist()]
    figure = pictures(dict(zip(names, rows, strict=True)), (8, 1.5 * len(names)))
    for panel, title in zip(figure.axes, ["image", *maps], strict=False):
        panel.set_title(title, fontsize="small")
    figure.colorbar(scale, ax=figure.axes, label="share of the attention")
    return figure, (
        f"How much of the class token's attention goes to each patch, mean over heads, of three {spec.split} images at "
        f"{spec.model.image_size} pixels, in layers {early + 1} and {last + 1}: before, which is the trunk as it comes to this "
        f"size, and after {spec.steps} steps of tuning attention alone. What is missing to 1 goes to the class token itself."
    )


def responses(stem: nn.Module, patch_size: int, in_chans: int) -> Tensor:
    """How each number of a token answers to the pixels of its patch and of the eight around it: (D, C, 3P, 3P).

    The gradient at the mean image, which is 0; of a linear stem its filters.
    """
    image = torch.zeros(1, in_chans, 3 * patch_size, 3 * patch_size)
    return torch.autograd.functional.jacobian(lambda x: stem(x)[0, 4], image)[:, 0]


def strongest(filters: Tensor) -> np.ndarray:
    """The filters (K, C, h, w) with the largest norms, each scaled to 0 to 1, where grey is 0: (FILTERS, h, w, C)."""
    chosen = filters.detach()[filters.flatten(1).norm(dim=1).argsort(descending=True)[:FILTERS]]
    return channels_last(0.5 + 0.5 * chosen / chosen.abs().amax((1, 2, 3), keepdim=True).clamp(min=1e-12))


def filters(runs: Runs) -> tuple[Figure, str]:
    """Of each stem trained with labels alone: the kernels of its first convolution, and what a token answers to."""
    rows, side = {}, 0
    for name, spec in here(runs, "supervised").items():
        stem, side = execute.trained_model(spec).stem, spec.model.patch_size
        kernels = [module.weight for module in stem.modules() if isinstance(module, nn.Conv2d)][:1]
        rows |= {f"{name}\n{first.shape[-1]}x{first.shape[-1]} kernels": strongest(first) for first in kernels}
        rows[f"{name}\nwhole stem"] = strongest(responses(stem, side, spec.model.in_chans))
    figure = level_names(pictures(rows, (8, 0.85 * len(rows))))
    whole = [name.endswith("whole stem") for name in rows]
    for panel in np.reshape(figure.axes, (len(rows), FILTERS))[whole].flat:
        panel.add_patch(plt.Rectangle((side - 0.5, side - 0.5), side, side, fill=False, edgecolor="C1"))
    return figure, (
        f"The {FILTERS} strongest filters of each stem trained with labels alone, each at its own scale: grey is 0, white "
        "positive, black negative. First row of a stem: the kernels of its first convolution. Second: how one number of a token "
        "changes with the pixels of its own patch (framed) and of those around it, which is the gradient at the mean image."
    )


def level_names(figure: Figure) -> Figure:
    """The names of rows written level."""
    for panel in figure.axes:
        panel.yaxis.label.set(rotation=0, ha="right", va="center", fontsize="small")
    return figure


def coder(spec: RunSpec, data: DataSet) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """The tokens of a pre-training run: uint8 images -> int64 (B, patches); and their pictures, from 0 to 1."""
    if spec.tokenizer is None:
        kmeans = prototypes(spec.data, spec.model.image_size, spec.model.patch_size, spec.seed)
        return kmeans.look_up, kmeans.decode
    dvae = execute.trained_tokenizer(spec.tokenizer)
    return (
        lambda images: dvae.look_up(images, data),
        lambda tokens: (dvae.decode(dvae.codebook[tokens]) * data.std + data.mean).clamp(0, 1),
    )


def pretrained(spec: RunSpec) -> masked.MaskedViT:
    """The whole masked model of a finished run, in eval mode."""
    state = store.weights(spec, "predictor")
    model = masked.MaskedViT(spec.model, len(state["predictor.bias"]), spec.seed, spec.blank)
    model.load_state_dict(state | {f"vit.{name}": tensor for name, tensor in store.weights(spec).items()})
    return model.eval()


def guessed(tokens: Tensor, mask: Tensor, logits: Tensor) -> Tensor:
    """Tokens (B, patches) with the most probable ones under the mask: logits (masked patches of the batch, V)."""
    return tokens.masked_scatter(mask, logits.argmax(dim=-1))


@torch.no_grad()
def predictions(runs: Runs) -> tuple[Figure, str]:
    """Images, what the encoder sees of them, and what each pre-trained model predicts under the mask."""
    specs = here(runs, "pretrained", "predictor")
    spec = next(iter(specs.values()))
    grid, size = spec.model.grid, spec.model.image_size
    data, pixels = examples(spec, count=8)
    mask = torch.from_numpy(masked.block_masks(spec.seed, 0, np.arange(len(data)), grid, spec.masked))
    hidden = masked.pixels(mask, grid, spec.model.patch_size)
    look_up, decode = coder(spec, data)
    tokens = look_up(data.pixels())
    filled = {f"{spec.masked} of {grid**2} masked": torch.tensor(GREY), "true tokens": decode(tokens)}
    for name, one in specs.items():  # all stems of a seed predict the same tokens
        filled[name] = decode(guessed(tokens, mask, pretrained(one)(data.normalise(data.pixels()), mask)))
    rows = {"image": pixels} | {name: torch.where(hidden, shown, pixels) for name, shown in filled.items()}
    figure = level_names(pictures({name: channels_last(row) for name, row in rows.items()}, (8, 0.9 * len(rows))))
    kind = "k-means prototypes of patches" if spec.tokenizer is None else "those of the discrete autoencoder"
    return figure, (
        f"Eight {spec.split} images at {size} pixels, their masks, and the masked patches filled in: by what their own tokens "
        f"({kind}) look like, the best that a prediction can be, and by the tokens that the model with each stem finds most "
        f"probable after {spec.steps} steps of pre-training."
    )
