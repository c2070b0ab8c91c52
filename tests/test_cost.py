"""Counts against the published ones and against sums done by hand; what runs will take, and where a rate is from."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lab.bench import runner
from lab.cost import count, plan
from lab.cost.count import (
    Memory,
    inference_memory,
    macs,
    memory,
    params,
    params_by_role,
    saved_bytes,
    step_macs,
    training_state,
)
from lab.cost.plan import Rate, gpu_plan, gpu_text, measured_rate, rate_of
from lab.experiments import imagenet, profiles
from lab.experiments import small as small_runs
from lab.experiments.catalogue import NOTEBOOKS, all_specs, arms_of
from lab.runs.spec import RunSpec
from vitlib.errors import UsageError
from vitlib.model import ParallelLayer, ViT, ViTConfig, vit_config
from vitlib.train.dvae import DVAEConfig
from vitlib.train.finetune import freeze
from vitlib.train.recipe import Recipe

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
    assert two.activations - found.activations == pytest.approx(
        one, abs=norms
    )  # the sum so far, beside a branch's result
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
    assert f"{macs(replace(config, image_size=384)).paper / 1e9:.2f}" == printed


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
    assert macs(theirs, (3, 16, 16)) == macs(small("W64-4/4"))


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
    assert role.keys() <= {*count.LAYERS, "layer_scale", "cls_token", "head"}
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
    assert training_state(model) == Memory(4 * 86_566_888, 4 * 86_566_888, 8 * 86_566_888 + 4 * tensors)
    assert training_state(model, "sgd") == Memory(4 * 86_566_888, 4 * 86_566_888, 4 * 86_566_888)


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
    for words in ({"attention": "flash"}, {"precision": "half"}, {"strategy": "all"}):
        with pytest.raises(UsageError, match=f"{next(iter(words.values()))}"):
            memory(small(), **{"strategy": "full", **words})


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


# --- multiply-adds of a run ---

IMAGENET = 1_281_167
PLAIN = Recipe(epochs=2, batch_size=8, lr=1e-3)
LITTLE = vit_config("W64-5x2/4", image_size=16, num_classes=10, layer_scale=1e-4)
FLOP = Rate(1e-12 / 3600, "given", "one FLOP per hour")  # so that hours are FLOPs


@pytest.fixture(autouse=True)
def no_benchmarks_of_this_checkout(monkeypatch, tmp_path):
    monkeypatch.setenv("VITLIB_OUTPUTS", str(tmp_path))
    monkeypatch.setattr(plan.paths, "REFERENCE", tmp_path / "reference")


def b12(**fields: object) -> RunSpec:
    recipe = replace(imagenet.supervised_recipe("B"), ema=None)
    return replace(RunSpec("supervised", vit_config("B12"), "imagenet-1k", recipe, precision="bf16"), **fields)


def fine_tuned(strategy: str, **fields: object) -> RunSpec:
    return replace(b12(), protocol="finetune", parent=b12(), strategy=strategy, **fields)


def little(model: ViTConfig = LITTLE, **fields: object) -> RunSpec:
    return replace(RunSpec("supervised", model, "fashion-mnist", PLAIN, images=100, precision="bf16"), **fields)


def test_vit_b_for_300_epochs_takes_what_a_pencil_says():
    # 17.564e9 multiply-adds forward, three times that per step, 2 FLOP each, 300 x 1,281,167 images, at 400 TFLOP/s
    by_hand = 2 * 17.564e9 * (3 * 300 * 1_281_167 + 50_000) / 400e12 / 3600
    (hours,) = gpu_plan([b12(recipe=replace(b12().recipe, epochs=300))], Rate(400, "given", ""))["hours"]
    assert hours == pytest.approx(by_hand, rel=2e-5) == pytest.approx(28.13, abs=5e-3)


def test_evaluation_is_one_forward_pass_and_with_an_average_of_weights_two():
    def evaluation(**fields):
        spec = b12(recipe=replace(b12().recipe, **fields))
        return plan.gpu_hours(spec, FLOP) - 2 * spec.recipe.epochs * IMAGENET * count.training_macs(spec)

    once = 2 * 50_000 * 17_563_828_224
    assert evaluation() == pytest.approx(once, rel=1e-3) and evaluation(ema=0.9999) == pytest.approx(2 * once, rel=1e-3)


def test_activation_checkpointing_adds_a_forward_pass():
    more = count.training_macs(b12(checkpointing=True)) - count.training_macs(b12())
    assert more == count.forward_macs(b12())


def test_attention_alone_leaves_out_the_gradients_of_the_other_weights():
    T, D, layers = 197, 768, 12
    ffn, stem = layers * T * 8 * D * D, 196 * 768 * D  # a gradient by weights has as many multiply-adds as the forward
    attn = fine_tuned("attn")
    # The plain rule of three gives the stem a gradient by the images too, which nobody needs.
    assert 3 * count.forward_macs(attn) - count.training_macs(attn) == ffn + 2 * stem


def test_layer_scale_and_stochastic_depth_change_no_multiply_add():
    other = b12(model=vit_config("B12", layer_scale=1e-4, drop_path=0.1))
    assert count.training_macs(other) == count.training_macs(b12())


TOKENIZER = RunSpec(
    "tokenizer", DVAEConfig(in_chans=3, **imagenet.TOKENIZER_MODEL), "imagenet-1k", imagenet.TOKENIZER
)  # fmt: skip
P, W, V, PIXELS = 196, 256, 8192, 8 * 8 * 3
ENCODER = P * (PIXELS * W + 2 * (9 * W * W + W * W) + W * V)
DECODER = P * (2 * (9 * W * W + W * W) + W * PIXELS)


def test_masked_pretraining_predicts_masked_patches_and_runs_the_tokenizers_encoder():
    shared = {"recipe": imagenet.BEIT_PRETRAINING, "protocol": "masked", "masked": 75}
    tokens, pixels = b12(**shared, targets="dvae", tokenizer=TOKENIZER), b12(**shared, targets="pixels")
    trunk = 17_563_828_224 - 768 * 1000
    assert count.forward_macs(tokens) == trunk + 75 * 768 * V
    assert count.training_macs(tokens) == 3 * count.forward_macs(tokens) + ENCODER
    assert count.training_macs(pixels) == 3 * (trunk + 75 * 768 * 768)


def test_a_tokenizer_trains_with_the_product_of_soft_tokens_and_codebook():
    assert count.training_macs(TOKENIZER) == 3 * (ENCODER + P * V * W + DECODER)


# --- memory of a run ---


@pytest.mark.parametrize("strategy", ["full", "attn"])
@pytest.mark.parametrize("fields", [{}, {"pos": "relative", "pool": "mean"}, {"stem": "hmlp"}], ids=str)
def test_memory_of_five_layers_is_that_of_the_whole_model_at_any_batch(strategy, fields):
    config = small("W64-5x2/4", **fields)
    for batch in (1, 7):
        found = memory(config, strategy, batch=batch, precision="amp")
        with torch.device("meta"):
            model = ViT(config).train()
            images, labels = torch.empty(batch, 3, 16, 16), torch.empty(batch, dtype=torch.long)
        freeze(model, strategy)
        with count.Autocast():
            saved = saved_bytes(model, images, lambda y, t=labels: F.cross_entropy(y, t))
        assert found == training_state(model)._replace(activations=saved)
    tuned = little(config, protocol="finetune", parent=little(config), strategy=strategy)
    assert count.run_memory(tuned, 7) == found


def test_lamb_holds_what_adamw_does_sgd_half_of_it_and_an_average_the_weights_again():
    def held(**fields):
        return count.run_memory(little(recipe=replace(PLAIN, **fields)), 2)

    adamw, sgd, averaged = held(), held(optimizer="sgd"), held(ema=0.99)
    assert held(optimizer="lamb") == adamw
    assert sgd.optimizer == adamw.weights and adamw.optimizer > 2 * adamw.weights
    assert averaged == adamw._replace(weights=2 * adamw.weights)


def test_masked_pretraining_holds_a_predictor_and_a_mask_token_in_place_of_the_head():
    spec = little(protocol="masked", masked=6, targets="tokens")
    with torch.device("meta"):
        trunk = params(ViT(replace(LITTLE, num_classes=0)))
    assert count.run_memory(spec, 1).weights == 4 * (trunk + LITTLE.width + (LITTLE.width + 1) * 128)
    one, more = (count.run_memory(replace(spec, masked=masked), 1).activations for masked in (6, 7))
    assert more - one == 4 * 128 + 2 * LITTLE.width


def test_a_batch_goes_through_in_the_parts_of_its_spec_and_what_does_not_fit_is_said():
    for gpus, accumulate, images in ((1, 1, 2048), (1, 8, 256), (4, 8, 256), (8, 8, 256), (16, 8, 128)):
        spec = b12(accumulate=accumulate)
        assert plan.images_at_once(spec, gpus) == images
        assert gpu_plan([spec], FLOP, gpus).loc[0, "memory_gb"] * plan.GB == count.run_memory(spec, images).total
    # Statistics of batch norm: of as many images on any number of GPUs, 2048 / 8.
    assert plan.images_at_once(b12(accumulate=8, model=vit_config("B12", stem="hmlp")), 8) == 32
    fits, large = (gpu_text([spec], "h100").splitlines()[4] for spec in (b12(accumulate=8), b12()))
    assert fits.endswith("yes") and large.endswith("no")


PARTS = {  # by batch and image size: 2048 / 256, 1024 / 256, 512 / 128, 768 / 256, 512 / 512
    (2048, 224): 8, (1024, 224): 4, (512, 384): 4, (768, 224): 3, (512, 112): 1,
}  # fmt: skip


def test_profile_imagenet_has_as_many_images_at_once_in_all_arms_and_fits_one_gpu_of_80_gb():
    p = profiles.profile("imagenet")
    for spec in plan.family(all_specs(p, NOTEBOOKS)):
        assert spec.accumulate == PARTS[spec.recipe.batch_size, spec.model.image_size], spec.model.name
    tables = (small_runs.resolution, small_runs.branches, small_runs.stems)
    wide, deep, stems = ({label: arm.spec for label, arm in arms_of(table, p).items()} for table in tables)
    largest = [wide["L full"], wide["full"], deep["36x1+LS"], deep["S60x1"], stems["local pretrained"].parent]
    assert 0.85 * 80 < gpu_plan(largest, FLOP)["memory_gb"].max() <= plan.HEADROOM * 80


# --- which runs ---


def test_a_spec_that_two_ask_for_is_one_run_and_rows_are_kinds_of_run():
    trunk = little(replace(LITTLE, in_chans=1), seed=1000, images=50)
    tuned = replace(trunk, protocol="finetune", parent=trunk, strategy="attn")
    both = [spec.with_seed(seed) for seed in (1000, 1001) for spec in (tuned, tuned)]
    cost = gpu_plan(plan.family(both), FLOP)
    assert list(zip(cost["kind"], cost["runs"], strict=True)) == [("supervised", 2), ("finetune attn", 2)]
    assert cost["hours"].sum() == pytest.approx(2 * gpu_plan(plan.family([tuned]), FLOP)["hours"].sum())
    assert gpu_plan(both, FLOP)["runs"].tolist() == [2]
    # Tuning seeds are judged on validation images, of which there are fewer.
    judged = plan.gpu_hours(trunk.with_seed(0), FLOP) - plan.gpu_hours(trunk, FLOP)
    assert judged == pytest.approx(2 * (5000 - 2000) * count.forward_macs(trunk))
    assert cost["disk_gb"].sum() * plan.GB == 4 * 4 * params(ViT(trunk.model))


# --- the rate ---


def bench_row(device="NVIDIA H100 80GB HBM3", **fields) -> dict:
    row = {"case": "B12", "arm": "full", "time_s": 0.5, "gmacs": 100_000.0, "precision": "bfloat16", "kind": "cuda"}
    return row | {"device": device, "date": "2026-01-01"} | fields


def write_bench(folder, rows, name="finetune"):
    runner.write(folder / "bench" / f"{name}.csv", rows)


def test_a_rate_is_assumed_as_a_share_of_the_makers_peak_until_it_is_measured_or_given(tmp_path):
    assumed = rate_of("h100")
    assert (assumed.how, assumed.tflops) == ("assumed", pytest.approx(0.35 * 989)) and "35 %" in assumed.source
    write_bench(tmp_path / "gpu", [bench_row(), bench_row(time_s=0.4), bench_row(time_s=10.0)])
    measured = rate_of("h100")
    assert (measured.how, measured.tflops) == ("measured", 400.0)  # 2 x 1e14 multiply-adds in the median 0.5 s
    assert "H100 80GB" in measured.source and "2026-01-01" in measured.source
    assert rate_of("a100").how == "assumed"
    assert rate_of("h100", rate=123.0) == plan.Rate(123.0, "given", "by the caller")


def test_the_largest_step_counts_and_a_committed_one_where_there_is_no_other(tmp_path):
    write_bench(tmp_path / "reference" / "gpu", [bench_row(case="small", gmacs=1000.0), bench_row()])
    assert measured_rate("h100").tflops == 400.0
    write_bench(tmp_path / "gpu", [bench_row(time_s=0.25)])
    assert measured_rate("h100").tflops == 800.0


NO_STEP = {
    "a processor": {"kind": "cpu"}, "another library": {"arm": "12x1 timm"},
    "a part of the weights": {"arm": "attn"}, "another device": {"device": "NVIDIA A100-SXM4-80GB"},
}  # fmt: skip


@pytest.mark.parametrize("why", NO_STEP)
def test_only_full_training_steps_on_that_device_are_a_rate(tmp_path, why):
    write_bench(tmp_path / "gpu", [bench_row(**NO_STEP[why])])
    assert measured_rate("h100") is None


def test_devices_are_found_by_the_names_that_they_give_themselves(tmp_path):
    write_bench(
        tmp_path / "gpu", [bench_row(device="NVIDIA GeForce RTX 4090"), bench_row(device="Tesla V100-SXM2-32GB")]
    )
    assert measured_rate("rtx4090") and measured_rate("v100")
    write_bench(tmp_path / "gpu", [bench_row(device="NVIDIA L40S")])
    assert measured_rate("l40s") and not measured_rate("l4")


REFUSED = {
    "unknown device 'h1000': allowed are a100, .*; did you mean 'h100'?": {"device": "h1000"},
    "rate is 0: allowed is a positive": {"rate": 0},
    "rate is -3.0: allowed": {"rate": -3.0},
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_what_cannot_be_planned_with_is_refused_in_one_sentence(sentence):
    with pytest.raises(UsageError, match=sentence):
        gpu_text([b12()], **({"device": "h100"} | REFUSED[sentence]))


# --- the text ---


def test_the_text_has_the_sum_each_kind_of_run_where_the_rate_is_from_and_the_formula(tmp_path):
    specs = [b12(), b12(seed=1), fine_tuned("attn")]
    hours, text = gpu_plan(specs, rate_of("h100"))["hours"].sum(), gpu_text(specs, "h100", gpus=4)
    assert text.startswith(f"3 runs: {hours:,.0f} GPU-hours, {plan.span(900 * hours)} on 4 h100 (assumed)")
    assert "assumed: 35 % of 989 TFLOP/s, the maker's peak (dense, half precision)" in text and "346.1" in text
    assert "GPU-hours (assumed)" in text and "finetune attn" in text
    assert "GPU-hours = 2 x (images seen x step + images evaluated x forward) / rate / 3600" in text
    write_bench(tmp_path / "gpu", [bench_row()])
    text = gpu_text([b12()], "h100")
    assert (
        "assumed" not in text and text.count("(measured)") == 2 and "measured: bench finetune, B12, NVIDIA H100" in text
    )


def test_no_runs_cost_nothing():
    assert gpu_text([], "h100").startswith("0 runs: 0 GPU-hours, 0 seconds on 1 h100 (assumed), 0.0 GB")


def test_years_of_a_cpu_are_said_in_years_and_that_a_gpu_is_meant():
    text = plan.cpu_text([b12(device="cuda")], 2)
    assert "1 runs, 1 of them to train: about" in text and "years of one CPU core" in text and "meant for a GPU" in text
    assert "GPU" not in plan.cpu_text([little()], 2)


def test_a_time_is_said_in_words_that_a_person_reads():
    found = [plan.span(seconds) for seconds in (0, 45, 720, 3 * 3600, 2.6 * 86400, 82_400_590_511)]
    assert found == ["0 seconds", "45 seconds", "12 minutes", "3 hours", "2.6 days", "2,600 years"]
