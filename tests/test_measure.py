"""Counts against the published ones and against sums done by hand."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lab.cost.count import (
    Memory,
    inference_memory,
    macs,
    memory,
    params,
    params_by_role,
    peak_bytes,
    saved_bytes,
    step_macs,
    training_state,
)
from vitlib.errors import UsageError
from vitlib.model import ParallelLayer, ViT, ViTConfig, vit_config
from vitlib.train.finetune import freeze

torch.set_num_threads(1)

SMALL = {"image_size": 16, "num_classes": 10}  # with patches of 4: N = 17 tokens


def small(name: str = "W64-2x2/4", **overrides: object) -> ViTConfig:
    return vit_config(name, **{**SMALL, **overrides})


# --- the peak of a forward pass ---


@pytest.mark.parametrize("batch", [1, 3])
def test_the_peak_of_a_forward_pass_is_that_of_the_ffn_and_does_not_grow_with_layers(batch):
    """At the GELU live: the layer's input, what the MHSA gave, their sum, the norm of it, and fc1's output twice."""
    config = small("W64-2x1/4")
    one = batch * config.tokens * config.width * 4
    found = inference_memory(config, batch, "fused")
    norms = 2 * batch * config.tokens * 4  # each norm's mean and deviation
    assert found.activations == pytest.approx((4 + 4 + 4) * one, abs=norms)
    assert found.images == batch * 3 * 16 * 16 * 4 and found.weights == 4 * params(ViT(config))
    deep = inference_memory(small("W64-4x1/4"), batch, "fused")
    assert deep.activations == found.activations and deep.weights > found.weights
    two = inference_memory(small("W64-2x2/4"), batch, "fused")
    assert two.activations - found.activations == pytest.approx(2 * one, abs=norms)  # another branch's two results
    with pytest.raises(UsageError, match="unknown attention"):
        inference_memory(config, batch, "flash")


# --- multiply-adds: paper-facts.md, section 2, patch 16, 224 pixels, 1000 classes ---

# models: linear stem without and with the norms, hMLP stem (batch norm) with them
GMACS = {
    "Ti12": ("1.254", "1.258", "1.252"),
    "Ti12x2 Ti24": ("2.478", "2.488", "2.481"),
    "S12": ("4.599", "4.608", "4.624"),
    "S12x2 S24": ("9.140", "9.158", "9.173"),
    "S12x3 S18x2 S36": ("13.680", "13.708", "13.723"),
    "S24x2 S48": ("18.221", "18.258", "18.273"),
    "S15x4 S30x2 S60": ("22.762", "22.807", "22.823"),
    "B6x2 B12": ("17.564", "17.583", "17.729"),
    "B13": ("19.018", "19.038", "19.185"),
    "B12x2 B24": ("35.011", "35.048", "35.195"),
    "B9x4 B18x2 B36": ("52.459", "52.514", "52.660"),
    "L12x2 L24": ("61.555", "61.604", "61.902"),
}


@cache
def dearer_stem(width: str) -> tuple[int, int]:
    """Multiply-adds that the hMLP stem has more than the linear one, without and with norms: from one layer each."""
    linear, hmlp = macs(vit_config(f"{width}1")), macs(vit_config(f"{width}1", stem="hmlp"))
    return hmlp.matmul - linear.matmul, hmlp.paper - linear.paper


@pytest.mark.parametrize("names", GMACS)
def test_multiply_adds_are_the_papers_to_the_printed_digit(names):
    name = names.split()[0]  # one model of each size is run, 20 ms a pair
    hmlp = macs(vit_config(name, stem="hmlp"))
    matmul, paper = dearer_stem(name.rstrip("x0123456789"))
    found = [f"{count / 1e9:.3f}" for count in (hmlp.matmul - matmul, hmlp.paper - paper, hmlp.paper)]
    assert tuple(found) == GMACS[names]


@pytest.mark.parametrize(("name", "row"), [("S12", "S12"), ("B12", "B6x2 B12")])
def test_multiply_adds_of_the_plain_model_are_the_papers_to_the_printed_digit(name, row):
    assert tuple(f"{count / 1e9:.3f}" for count in macs(vit_config(name))) == GMACS[row][:2]


def test_multiply_adds_with_the_convolutional_stem_are_the_papers():
    assert f"{macs(vit_config('B12', stem='conv')).paper / 1e9:.3f}" == "19.065"


@pytest.mark.parametrize(("name", "printed"), [("Ti12", "4.70"), ("S12", "15.52"), ("B12", "55.54"), ("L24", "191.21")])
def test_multiply_adds_at_384_pixels_are_the_papers(name, printed):
    config = vit_config(name, layer_scale=1e-4)
    assert f"{macs(config, image_size=384).paper / 1e9:.2f}" == printed


@pytest.mark.parametrize(
    ("width", "linear", "hmlp"),
    [("Ti", "0.029", "0.022"), ("S", "0.058", "0.072"), ("B", "0.116", "0.260"), ("L", "0.154", "0.450")],
)
def test_multiply_adds_of_the_stem_alone_are_the_papers(width, linear, hmlp):
    found = []
    for stem in ("linear", "hmlp"):
        config = vit_config(f"{width}1", stem=stem)
        rest = 12 * 197 * config.width**2 + 2 * 197**2 * config.width + 1000 * config.width
        found.append(f"{(macs(config).matmul - rest) / 1e9:.3f}")
    assert found == [linear, hmlp]


@pytest.mark.parametrize("name", ["W64-4x1/4", "W64-2x2/4", "W96-1x3/8"])
def test_multiply_adds_are_the_formula_exactly(name):
    c = small(name)
    D, N = c.width, c.tokens
    matmul = c.pairs * (12 * N * D * D + 2 * N * N * D) + (N - 1) * 3 * c.patch_size**2 * D + 10 * D
    norms = 5 * N * D * (2 * c.pairs + 1)
    assert macs(c) == (matmul, matmul + norms)


def test_stem_norms_count_5_and_2_an_element():
    elements = 16 * 16 * 16 + 8 * 8 * 16 + 4 * 4 * 64  # hMLP at patch 4: kernels 1, 2, 2
    bn, ln = macs(small(stem="hmlp")), macs(small(stem="hmlp", stem_norm="ln"))
    none = macs(small(stem="hmlp", stem_norm="none"))
    assert bn.matmul == ln.matmul == none.matmul
    assert (bn.paper - none.paper, ln.paper - none.paper) == (2 * elements, 5 * elements)


def test_counting_leaves_a_model_as_it_was():
    model = ViT(small(stem="hmlp", drop_path=0.5)).train()
    model.stem.eval()  # a frozen stem
    modes, values = [m.training for m in model.modules()], {k: v.clone() for k, v in model.state_dict().items()}
    assert macs(model) == macs(model.config) == macs(ViT(small(stem="hmlp", layer_scale=1e-4)))
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("fields", [
    {"name": "W64-5/4"}, {"name": "W64-3x4/4", "layer_scale": 1e-4}, {"name": "W64-3/4", "stem": "conv", "pos": "relative"},
    {"name": "W64-4/4", "stem": "local"}, {"name": "W64-1x2/4", "stem": "hmlp", "stem_norm": "ln", "pool": "mean"},
])  # fmt: skip
def test_a_configuration_is_counted_by_two_layers_as_its_whole_model(fields):
    config = small(**fields)
    assert macs(config) == macs(ViT(config)) != macs(replace(config, depth=config.depth + 1))


def test_a_norm_without_an_affine_part_counts_one_less_an_element():
    model = ViT(small("W64-1/4"))
    before = macs(model)
    model.norm = nn.LayerNorm(64, elementwise_affine=False)
    assert macs(model) == (before.matmul, before.paper - 17 * 64)


def test_relative_positions_cost_no_multiply_adds():
    assert macs(small(pos="relative")) == macs(small())


def test_timms_model_counts_as_ours():
    theirs = VisionTransformer(img_size=16, patch_size=4, embed_dim=64, depth=4, num_heads=2, num_classes=10)
    assert macs(theirs, image_size=16) == macs(small("W64-4/4"))


def test_an_image_size_is_asked_for_where_it_is_missing_and_refused_where_it_is_built_in():
    theirs = VisionTransformer(img_size=16, patch_size=4, embed_dim=64, depth=1, num_heads=2, num_classes=10)
    for model, size in ((theirs, None), (ViT(small()), 32)):
        with pytest.raises(UsageError, match="image_size"):
            macs(model, size)
    with pytest.raises(UsageError, match="16 and 20"):
        macs(small(), image_size=18)


# --- parameters ---


@pytest.mark.parametrize(
    ("name", "mhsa", "ffn", "with_mhsa", "with_ffn"),
    [
        ("Ti12", 1_778_688, 3_550_464, 2_082_280, 3_854_056),
        ("S12", 7_096_320, 14_178_816, 7_702_504, 14_785_000),
        ("B6x2", 28_348_416, 56_669_184, 29_559_784, 57_880_552),
        ("L24", 100_761_600, 201_449_472, 102_376_424, 203_064_296),
    ],
)
def test_fine_tuning_subsets_at_384_pixels_are_the_papers(name, mhsa, ffn, with_mhsa, with_ffn):
    with torch.device("meta"):
        role = params_by_role(ViT(vit_config(name, image_size=384, layer_scale=1e-4)))
    assert (role["mhsa"], role["ffn"]) == (mhsa, ffn)
    assert role["mhsa"] + role["head"] + role["pos_embed"] == with_mhsa
    assert role["ffn"] + role["head"] + role["pos_embed"] == with_ffn


@pytest.mark.parametrize(
    "parts",
    [
        {},
        {"layer_scale": 1e-4},
        {"stem": "hmlp", "stem_norm": "ln"},
        {"stem": "conv", "pos": "all"},
        {"pos": "relative", "pool": "mean", "num_classes": 0},
    ],
)
def test_roles_sum_to_all_parameters_and_none_is_left_over(parts):
    model = ViT(small(**parts))
    role = params_by_role(model)
    assert sum(role.values()) == params(model)
    assert role["other"] == 0
    assert role["stem"] == params(model.stem)
    assert role["norm"] == 2 * 64 * (2 * 4 + 1)
    assert role["layer_scale"] == (2 * 64 * 4 if "layer_scale" in parts else 0)
    positions = {"patches": 16 * 64, "all": 17 * 64, "relative": (7 * 7 + 3) * 2}
    assert role["pos_embed"] == positions[model.config.pos]
    assert role["cls_token"] == 64
    assert role["head"] == (0 if "num_classes" in parts else 64 * 10 + 10)


# --- bytes kept for the backward pass ---


def loss_fn(logits: Tensor) -> Tensor:
    return logits.logsumexp(1).mean()


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_linear_layer_keeps_its_input_and_a_gelu_its_own(device):
    with torch.device(device):
        model, x = nn.Sequential(nn.Linear(3, 2), nn.GELU()), torch.zeros(5, 3)
    assert saved_bytes(model, x, torch.sum) == 4 * (5 * 3 + 5 * 2)
    assert saved_bytes(model, x, lambda y: y.square().sum()) == 4 * (5 * 3 + 5 * 2 + 5 * 2)
    model[0].weight.requires_grad_(False)  # the bias alone needs no input
    assert saved_bytes(model, x, torch.sum) == 4 * (5 * 2)
    assert saved_bytes(model.requires_grad_(False), x, torch.sum) == 0


class Twice(nn.Module):
    """Two layers that read one tensor, the second only a part of it."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x).sum() + self.second(x[:1]).sum()


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_storage_counts_once_and_whole(device):
    with torch.device(device):
        model, x = Twice(), torch.zeros(5, 3)
        wide = torch.zeros(5, 300)[:, :3]
    assert saved_bytes(model, x, torch.sum) == 4 * 5 * 3
    assert saved_bytes(model, wide, torch.sum) == 4 * 5 * 300


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_a_layer_keeps_is_the_sum_done_by_hand(device):
    B, N, D, H = 2, 17, 64, 2
    with torch.device(device):
        layer, x = ParallelLayer(small("W64-1/4", layer_scale=1e-4)), torch.zeros(B, N, D)
    # Each norm keeps x, its output and two numbers a token; LayerScale keeps what it multiplies; attention keeps
    # q, k, v, its output and a number per query; the FFN keeps the hidden tokens before and after GELU.
    norms, scales = 2 * (2 * B * N * D + 2 * B * N), 2 * B * N * D
    mhsa, ffn = 3 * B * N * D + B * N * D + B * H * N, 2 * B * N * 4 * D
    assert saved_bytes(layer, x, torch.sum) == 4 * (norms + scales + mhsa + ffn)
    # Explicitly, the map instead of the number per query; q, k and v are kept as scaled copies instead of as one qkv.
    explicit = saved_bytes(layer, x, torch.sum, attention="explicit")
    assert explicit - saved_bytes(layer, x, torch.sum) == 4 * (B * H * N * N - B * H * N)


@pytest.mark.parametrize("attention", ["fused", "explicit"])
@pytest.mark.parametrize("parts", [{}, {"stem": "hmlp", "layer_scale": 1e-4}, {"pos": "relative"}])
def test_the_meta_device_keeps_what_the_cpu_keeps(parts, attention):
    config = small(drop_path=0.1, **parts)
    found = []
    for device in ("cpu", "meta"):
        with torch.device(device):
            found.append(saved_bytes(ViT(config).train(), torch.zeros(2, 3, 16, 16), loss_fn, attention))
    assert found[0] == found[1] > 0


def freeze_all_but(model: ViT, kind: str | None) -> ViT:
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    for layer in model.layers:
        for residual in {"mhsa": layer.mhsa, "ffn": layer.ffn, None: ()}[kind]:
            residual.f.requires_grad_(True)
    return model


@pytest.mark.parametrize("name", ["W64-4x1/4", "W64-2x2/4"])
def test_frozen_parts_keep_less(name):
    model, images = ViT(small(name, layer_scale=1e-4)), torch.zeros(2, 3, 16, 16)
    full = saved_bytes(model, images, loss_fn)
    attn = saved_bytes(freeze_all_but(model, "mhsa"), images, loss_fn)
    ffn = saved_bytes(freeze_all_but(model, "ffn"), images, loss_fn)
    head = saved_bytes(freeze_all_but(model, None), images, loss_fn)
    assert 0 < head < min(attn, ffn) and max(attn, ffn) < full


@pytest.mark.parametrize(("attention", "saving"), [("fused", 0.316), ("explicit", 0.266)])
def test_attention_only_saves_what_was_measured_for_vit_s(attention, saving):
    """traps.md, "Memory saved depends on the attention kernel": ViT-S at 224 pixels, no LayerScale."""
    with torch.device("meta"):
        model, images = ViT(vit_config("S12")), torch.zeros(2, 3, 224, 224)
    model.skip_unread = False
    full = saved_bytes(model, images, loss_fn, attention)
    freeze_all_but(model, "mhsa").pos_embed.requires_grad_(True)
    assert 1 - saved_bytes(model, images, loss_fn, attention) / full == pytest.approx(saving, abs=0.001)


def test_an_unknown_way_of_attention_is_refused():
    with pytest.raises(UsageError, match="did you mean 'fused'"):
        saved_bytes(ViT(small()), torch.zeros(2, 3, 16, 16), loss_fn, attention="fussed")


# --- bytes of weights, gradients and optimizer ---


@pytest.mark.parametrize("kind", [None, "mhsa", "full"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_training_state_is_what_an_optimizer_really_holds(kind, optimizer):
    model = ViT(small(layer_scale=1e-4))
    if kind != "full":
        freeze_all_but(model, kind)
    expected = training_state(model, optimizer)
    trainable = [p for p in model.parameters() if p.requires_grad]
    step = torch.optim.AdamW(trainable) if optimizer == "adamw" else torch.optim.SGD(trainable, momentum=0.9)
    loss_fn(model(torch.ones(2, 3, 16, 16))).backward()
    step.step()
    held = [tensor for state in step.state.values() for tensor in state.values()]
    assert expected == Memory(
        weights=sum(p.nbytes for p in model.parameters()),
        gradients=sum(p.grad.nbytes for p in model.parameters() if p.grad is not None),
        optimizer=sum(tensor.nbytes for tensor in held),
        activations=0,
    )


def test_training_state_of_vit_b_is_four_bytes_times_its_parameters():
    with torch.device("meta"):
        model = ViT(vit_config("B12"))
    tensors = 12 * 12 + 2 + 2 + 2 + 2  # 12 a block; stem, cls_token and pos_embed, last norm, head
    assert training_state(model) == (4 * 86_566_888, 4 * 86_566_888, 8 * 86_566_888 + 4 * tensors, 0)
    assert training_state(model, "sgd") == (4 * 86_566_888, 4 * 86_566_888, 4 * 86_566_888, 0)


# --- the whole of a step: weights, gradients, optimizer, activations ---


def test_memory_is_training_state_and_what_autograd_keeps_on_a_real_device():
    config = small(layer_scale=1e-4)
    for strategy in ("full", "attn", "ffn", "head"):
        model = ViT(config).train()
        freeze(model, strategy)
        for attention in ("fused", "explicit"):
            labels = torch.zeros(3, dtype=torch.long)
            saved = saved_bytes(model, torch.zeros(3, 3, 16, 16), lambda y, t=labels: F.cross_entropy(y, t), attention)
            found = memory(config, strategy, attention, batch=3)
            assert found == training_state(model)._replace(activations=saved)
            assert found.total == found.weights + found.gradients + found.optimizer + found.activations


def by_hand(B: int, attention: str, precision: str, strategy: str) -> int:
    """Bytes kept of W64-1/4 with LayerScale at 16 pixels, 10 classes, every token computed, under full or attn."""
    N, D, H, C = 17, 64, 2, 10
    half = 2 if precision == "amp" else 4
    full = strategy == "full"
    # What a norm reads is float32 (the last one's input has no other reader), and it keeps 2 numbers a token.
    norms = 3 * (B * N * D + 2 * B * N) * 4
    # Half copies (amp) of norms' outputs are what trainable matrices read; LayerScale keeps what it multiplies.
    read = (2 if full else 1) * B * N * D * half
    scales = 2 * B * N * D * half if full else 0
    maps = {"fused": B * H * N * 4, "explicit": B * H * N * N * (4 if precision == "float32" else 4 + 2)}[attention]
    mhsa = 4 * B * N * D * half + maps  # q, k, v, output
    ffn = (2 if full else 1) * B * N * 4 * D * half  # before GELU, and if fc2 trains behind it
    images = B * 3 * 16 * 16 * half if full else 0
    # The head reads one row of a float32 tensor, kept whole, or that row's half copy. Log-probabilities are float32; in
    # amp the half logits stay too. Class numbers, and one number for all.
    head = B * N * D * 4 + B * C * 4 if precision == "float32" else B * D * 2 + B * C * (2 + 4)
    head += B * 8 + 4
    # Half copies of matrices, for the gradients of what they multiply; a convolution keeps its own in any case.
    weights = (12 * D * D + D * C + (3 * 4 * 4 * D if full else 0)) * 2 if precision == "amp" else 0
    return norms + read + scales + mhsa + ffn + images + head + weights


@pytest.mark.parametrize("precision", ["float32", "amp"])
@pytest.mark.parametrize("attention", ["fused", "explicit"])
@pytest.mark.parametrize("strategy", ["full", "attn"])
def test_activations_are_the_sum_done_by_hand(attention, precision, strategy):
    config = small("W64-1/4", layer_scale=1e-4)
    for B in (2, 3, 5):
        found = memory(config, strategy, attention, B, precision, skip_unread=False)
        assert found.activations == by_hand(B, attention, precision, strategy)


@pytest.mark.parametrize("precision", ["float32", "amp"])
@pytest.mark.parametrize("attention", ["fused", "explicit"])
def test_memory_is_a_fixed_part_and_a_part_an_image(attention, precision):
    two, three, eight = (memory(small("W64-2/4"), "attn", attention, B, precision) for B in (2, 3, 8))
    assert eight.activations == two.activations + 6 * (three.activations - two.activations)
    assert eight[:3] == two[:3]


def test_half_precision_leaves_weights_and_their_state_as_they_are():
    whole, half = (memory(small(), "full", batch=8, precision=p) for p in ("float32", "amp"))
    assert half[:3] == whole[:3] and half.activations < whole.activations


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="PyTorch without CUDA knows no CUDA tensors")
@pytest.mark.parametrize(
    "parts",
    [{"layer_scale": 1e-4}, {"stem": "hmlp", "drop_path": 0.1}, {"stem": "conv", "pos": "all"}, {"pos": "relative"}],
)
def test_half_precision_keeps_what_cudas_autocast_keeps(parts):
    """On CUDA tensors without values, which need no GPU."""
    config = small(**parts)
    for strategy in ("full", "attn"):
        with torch.device("meta"):
            model = ViT(config).train()
        freeze(model, strategy)
        with FakeTensorMode(), torch.device("cuda"):
            model._apply(lambda t: torch.empty(t.shape, dtype=t.dtype))
            images, labels = torch.empty(2, 3, 16, 16), torch.empty(2, dtype=torch.long)
            torch.set_autocast_dtype("cuda", torch.float16)
            torch.set_autocast_enabled("cuda", True)  # torch.autocast refuses without a GPU
            try:
                saved = saved_bytes(model, images, lambda y, t=labels: F.cross_entropy(y, t), "explicit")
            finally:
                torch.set_autocast_enabled("cuda", False)
                torch.clear_autocast_cache()
        assert memory(config, strategy, "explicit", 2, "amp").activations == saved


def test_tokens_that_nobody_reads_keep_nothing_unless_asked():
    assert memory(small(), "full", batch=8).total < memory(small(), "full", batch=8, skip_unread=False).total


def test_unknown_words_are_refused():
    for words in ({"attention": "flash"}, {"precision": "half"}, {"optimizer": "lamb"}, {"strategy": "all"}):
        with pytest.raises(UsageError, match=f"{next(iter(words.values()))}"):
            memory(small(), **{"strategy": "full", **words})


def test_a_peak_is_asked_of_a_gpu_and_of_nothing_else():
    ran = []
    assert peak_bytes(lambda: ran.append(1), "cpu") is None and peak_bytes(lambda: ran.append(1), "meta") is None
    assert not ran
    if torch.cuda.is_available():
        assert peak_bytes(lambda: torch.zeros(2**20, device="cuda"), "cuda") >= 2**22


# --- multiply-adds of a training step ---


@pytest.mark.parametrize("name", ["W64-4x1/4", "W64-2x2/4"])
@pytest.mark.parametrize("strategy", ["full", "attn", "ffn", "head"])
def test_multiply_adds_of_a_step_are_the_formula(name, strategy):
    c = small(name)
    D, N, pairs = c.width, c.tokens, c.pairs
    mhsa, maps, ffn = pairs * 4 * N * D * D, pairs * 2 * N * N * D, pairs * 8 * N * D * D
    stem, head = (N - 1) * 48 * D, 10 * D
    # Backward, a product each for the gradient of the input (not of the images) and, if it trains, of the matrix.
    assert step_macs(c, strategy) == {
        "mhsa": (mhsa, 2 * mhsa if strategy in ("full", "attn") else mhsa),
        "attention": (maps, 2 * maps),
        "ffn": (ffn, 2 * ffn if strategy in ("full", "ffn") else ffn),
        "stem": (stem, stem if strategy == "full" else 0),
        "head": (head, 2 * head),
        "other": (0, 0),
    }


@pytest.mark.parametrize("parts", [{"stem": "hmlp", "layer_scale": 1e-4}, {"stem": "conv"}, {"pos": "relative"}])
def test_the_forward_half_of_a_step_is_what_macs_counts(parts):
    for strategy in ("full", "attn"):  # without positions to train, the first layers have no gradient at all
        step = step_macs(small(**parts), strategy)
        assert sum(kind.forward for kind in step.values()) == macs(small(**parts)).matmul
        assert step["other"] == (0, 0)


@pytest.mark.parametrize(("image_size", "attn", "ffn"), [(224, "0.21", "0.11"), (384, "0.20", "0.10")])
def test_attention_only_spares_vit_b_a_third_of_the_ffns_multiply_adds_and_ffn_only_a_third_of_attentions(
    image_size, attn, ffn
):
    """paper-facts.md, section 2: 21 % of the step at 224 pixels, 20 % at 384."""
    config = vit_config("B12", image_size=image_size)
    full = step_macs(config, "full")
    total = sum(kind.total for kind in full.values())
    for strategy, frozen, share in (("attn", "ffn", attn), ("ffn", "mhsa", ffn)):
        spared = total - sum(kind.total for kind in step_macs(config, strategy).values())
        assert spared == full[frozen].total / 3 + full["stem"].backward
        assert f"{spared / total:.2f}" == share


def test_par_multiplies_as_often_as_seq():
    seq, par = (step_macs(small(layer_scale=1e-4), "full", execution) for execution in ("seq", "par"))
    for direction in ("forward", "backward"):
        assert getattr(par["other"], direction) == sum(getattr(seq[k], direction) for k in ("mhsa", "attention", "ffn"))
    assert (par["stem"], par["head"]) == (seq["stem"], seq["head"])
