"""The model room: the paper's equations written out, its published sizes, and what each stem lets through.

Numerics are compared in float64: a wrong epsilon moves float32 logits by less than their own rounding.
"""

from __future__ import annotations

import copy
import itertools
import math
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import ParallelThingsBlock, VisionTransformer
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from lab.cost import count
from vitlib.errors import UsageError
from vitlib.model import (
    ParallelLayer,
    ViT,
    ViTConfig,
    fuse,
    make_stem,
    regroup,
    resize_positions,
    set_execution,
    vit_config,
)
from vitlib.model.layers import EPS, Reads
from vitlib.model.stems import STEMS, Kind, Stem, hmlp_kernels, leakage, norm
from vitlib.model.vit import RelativeBias
from vitlib.model.weights import from_timm, load, save, to_timm

torch.set_num_threads(1)

SMALL = {"image_size": 16, "num_classes": 10}  # with patches of 4: a 4 x 4 grid, 17 tokens


STEM_ARMS = {
    "linear": {"stem": "linear"},
    "hmlp-ln": {"stem": "hmlp", "stem_norm": "ln"},
    "hmlp-bn": {"stem": "hmlp", "stem_norm": "bn"},
    "conv": {"stem": "conv"},
    "local": {"stem": "local"},
}


def small(name: str = "W64-2x2/4", **overrides: object) -> ViTConfig:
    return vit_config(name, **{**SMALL, **overrides})


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@torch.no_grad()
def filled(module: nn.Module, seed: int = 1) -> nn.Module:
    """The module in float64 and eval mode with every parameter and statistic random: no zero or one hides a term."""
    generator = torch.Generator().manual_seed(seed)
    module = module.double().eval()
    for tensor in itertools.chain(module.parameters(), module.buffers()):
        if tensor.is_floating_point():
            tensor.uniform_(0.05, 0.35, generator=generator)
            if tensor.ndim > 1:
                tensor.sub_(0.2)
    return module


# --- equations (1) and (2), written out ---


def layer_norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-6) * norm.weight + norm.bias


def mhsa(x: Tensor, r: nn.Module) -> Tensor:
    heads, D = r.f.heads, x.shape[-1]
    y = layer_norm(x, r.norm)
    # The rows of qkv are q, k, v; within each, head after head.
    weight, bias = r.f.qkv.weight.view(3, heads, D // heads, D), r.f.qkv.bias.view(3, heads, D // heads)
    q, k, v = torch.einsum("bnd,thed->tbnhe", y, weight) + bias[:, None, None]
    logits = torch.einsum("bnhe,bmhe->bhnm", q, k) / math.sqrt(D // heads)
    weights = torch.exp(logits) / torch.exp(logits).sum(-1, keepdim=True)
    mixed = torch.einsum("bhnm,bmhe->bnhe", weights, v).flatten(2)
    y = torch.einsum("bnd,ed->bne", mixed, r.f.proj.weight) + r.f.proj.bias
    return y if r.gamma is None else r.gamma * y


def ffn(x: Tensor, r: nn.Module) -> Tensor:
    y = torch.einsum("bnd,ed->bne", layer_norm(x, r.norm), r.f.fc1.weight) + r.f.fc1.bias
    y = 0.5 * y * (1 + torch.erf(y / math.sqrt(2)))
    y = torch.einsum("bnd,ed->bne", y, r.f.fc2.weight) + r.f.fc2.bias
    return y if r.gamma is None else r.gamma * y


@pytest.mark.parametrize("layer_scale", [None, 1e-4])
@pytest.mark.check
def test_two_layers_of_one_branch_are_equation_1(layer_scale):
    config = small("W64-2x1/4", layer_scale=layer_scale)
    first, second = (filled(ParallelLayer(config), seed) for seed in (1, 2))
    x = noise(2, 17, 64)
    with torch.no_grad():
        x1 = x + mhsa(x, first.mhsa[0])
        x2 = x1 + ffn(x1, first.ffn[0])
        x3 = x2 + mhsa(x2, second.mhsa[0])
        x4 = x3 + ffn(x3, second.ffn[0])
        torch.testing.assert_close(second(first(x)), x4, rtol=0, atol=1e-12)


@pytest.mark.parametrize("layer_scale", [None, 1e-4])
@pytest.mark.parametrize("branches", [1, 2, 3])
@pytest.mark.check
def test_a_layer_of_k_branches_is_equation_2(branches, layer_scale):
    layer = filled(ParallelLayer(small(f"W64-1x{branches}/4", layer_scale=layer_scale)))
    x = noise(2, 17, 64)
    with torch.no_grad():
        x1 = x + sum(mhsa(x, r) for r in layer.mhsa)
        x2 = x1 + sum(ffn(x1, r) for r in layer.ffn)
        torch.testing.assert_close(layer(x), x2, rtol=0, atol=1e-12)
        for a, f in zip(layer.mhsa[1:], layer.ffn[1:], strict=True):  # it is not eq. (1) in another order
            x2 = x2 + mhsa(x2, a)
            x2 = x2 + ffn(x2, f)
            assert (layer(x) - x2).abs().max() > 1e-2


@pytest.mark.check
def test_the_whole_model_is_stem_positions_layers_norm_and_head():
    model = filled(ViT(small("W64-3x2/4", layer_scale=1e-4)))
    images = noise(2, 3, 16, 16)
    patches = images.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).reshape(2, 16, 48)
    with torch.no_grad():
        x = patches @ model.stem[0].weight.flatten(1).T + model.stem[0].bias + model.pos_embed
        x = torch.cat([model.cls_token.expand(2, 1, 64), x], dim=1)  # no position for the class token
        for layer in model.layers:
            x = x + sum(mhsa(x, r) for r in layer.mhsa)
            x = x + sum(ffn(x, r) for r in layer.ffn)
        logits = layer_norm(x, model.norm)[:, 0] @ model.head.weight.T + model.head.bias
        torch.testing.assert_close(model(images), logits, rtol=0, atol=1e-11)


def test_mean_pooling_leaves_the_class_token_out():
    model = filled(ViT(small(pool="mean")))
    x = noise(2, 17, 64)
    assert torch.equal(model.pool(x), x[:, 1:].mean(1))
    assert torch.equal(filled(ViT(small())).pool(x), x[:, 0])


# --- against timm ---


@torch.no_grad()
def copy_branch(ours_mhsa: nn.Module, ours_ffn: nn.Module, norm1, attn, ls1, norm2, mlp, ls2) -> None:
    pairs = [
        (ours_mhsa.norm, norm1), (ours_mhsa.f.qkv, attn.qkv), (ours_mhsa.f.proj, attn.proj),
        (ours_ffn.norm, norm2), (ours_ffn.f.fc1, mlp.fc1), (ours_ffn.f.fc2, mlp.fc2),
    ]  # fmt: skip
    for ours, theirs in pairs:
        ours.load_state_dict(theirs.state_dict())
    for ours, theirs in ((ours_mhsa.gamma, ls1), (ours_ffn.gamma, ls2)):
        assert (ours is None) == isinstance(theirs, nn.Identity)
        if ours is not None:
            ours.copy_(theirs.gamma)


@pytest.mark.parametrize("layer_scale", [None, 1e-5])
@pytest.mark.parametrize("branches", [2, 3])
@pytest.mark.check
def test_a_parallel_layer_equals_timms_with_the_same_weights(branches, layer_scale):
    norm = partial(nn.LayerNorm, eps=1e-6)
    theirs = ParallelThingsBlock(64, 2, branches, qkv_bias=True, init_values=layer_scale, norm_layer=norm)
    theirs = filled(theirs)
    ours = ParallelLayer(small(f"W64-1x{branches}/4", layer_scale=layer_scale)).double().eval()
    for k, (a, f) in enumerate(zip(theirs.attns, theirs.ffns, strict=True)):
        copy_branch(ours.mhsa[k], ours.ffn[k], a.norm, a.attn, a.ls, f.norm, f.mlp, f.ls)
    x = noise(2, 17, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("layer_scale", [None, 1e-5])
def test_a_sequential_model_with_a_position_for_every_token_equals_timms(layer_scale):
    size = {"img_size": 16, "patch_size": 4, "embed_dim": 64, "depth": 12, "num_heads": 2, "num_classes": 10}
    theirs = filled(VisionTransformer(**size, init_values=layer_scale))
    ours = ViT(small("W64-12x1/4", pos="all", layer_scale=layer_scale)).double().eval()
    with torch.no_grad():
        ours.cls_token.copy_(theirs.cls_token)
        ours.pos_embed.copy_(theirs.pos_embed)
    ours.stem[0].load_state_dict(theirs.patch_embed.proj.state_dict())
    ours.norm.load_state_dict(theirs.norm.state_dict())
    ours.head.load_state_dict(theirs.head.state_dict())
    for layer, block in zip(ours.layers, theirs.blocks, strict=True):
        copy_branch(
            layer.mhsa[0], layer.ffn[0], block.norm1, block.attn, block.ls1, block.norm2, block.mlp, block.ls2
        )  # fmt: skip
    images = noise(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images), rtol=0, atol=1e-10)


# --- published sizes: paper-facts.md, section 2, patch 16, 224 pixels, 1000 classes (multiply-adds: test_cost.py) ---

# models of one size: parameters with the linear stem, + LayerScale, hMLP (batch norm), hMLP + LayerScale
PARAMETERS = {
    "Ti12": (5_717_224, 5_721_832, 5_618_824, 5_623_432),
    "Ti24 Ti12x2": (11_055_592, 11_064_808, 10_957_192, 10_966_408),
    "S12": (22_050_280, 22_059_496, 21_945_640, 21_954_856),
    "S24 S12x2": (43_343_848, 43_362_280, 43_239_208, 43_257_640),
    "S36 S18x2 S12x3 S9x4": (64_637_416, 64_665_064, 64_532_776, 64_560_424),
    "S48 S24x2": (85_930_984, 85_967_848, 85_826_344, 85_863_208),
    "S60 S30x2 S20x3 S15x4": (107_224_552, 107_270_632, 107_119_912, 107_165_992),
    "B12 B6x2": (86_566_888, 86_585_320, 86_726_248, 86_744_680),
    "B13": (93_654_760, 93_674_728, 93_814_120, 93_834_088),
    "B24 B12x2": (171_621_352, 171_658_216, 171_780_712, 171_817_576),
    "B36 B18x2 B12x3 B9x4": (256_675_816, 256_731_112, 256_835_176, 256_890_472),
    "L24 L12x2": (304_325_608, 304_374_760, 304_865_768, 304_914_920),
}
# width: parameters of the linear and of the hMLP stem (batch norm)
STEM_SIZES = {"Ti": (147_648, 49_248), "S": (295_296, 190_656), "B": (590_592, 749_952), "L": (787_456, 1_327_616)}


@pytest.mark.parametrize("names", PARAMETERS)
@pytest.mark.check
def test_parameters_are_the_papers_to_the_digit(names):
    first, *twins = names.split()
    variants = list(itertools.product(("linear", "hmlp"), (None, 1e-4)))
    with torch.device("meta"):
        assert (
            tuple(count.params(ViT(vit_config(first, stem=s, layer_scale=scale))) for s, scale in variants)
            == PARAMETERS[names]
        )
        for twin in twins:  # the same pairs, side by side
            assert count.params(ViT(vit_config(twin, stem="hmlp", layer_scale=1e-4))) == PARAMETERS[names][3], twin


@pytest.mark.parametrize("width", STEM_SIZES)
@pytest.mark.check
def test_parameters_of_the_stem_alone_are_the_papers_to_the_digit(width):
    found = [count.params(make_stem(vit_config(f"{width}12", stem=stem))) for stem in ("linear", "hmlp")]
    assert found == list(STEM_SIZES[width])


def test_parameters_of_the_convolutional_stem_for_vit_b_are_3489120():
    assert count.params(make_stem(vit_config("B12", stem="conv"))) == 3_489_120


@pytest.mark.parametrize(
    ("name", "total"),
    [("Ti12", 5_794_792), ("S12", 22_205_416), ("B12", 86_877_160), ("L24", 304_763_880)],
)
def test_parameters_at_384_pixels_are_the_papers_to_the_digit(name, total):
    with torch.device("meta"):
        assert count.params(ViT(vit_config(name, image_size=384, layer_scale=1e-4))) == total


# --- names and configurations ---


def test_b12_and_b12x1_name_the_same_model():
    assert vit_config("B12") == vit_config("B12x1") == vit_config("B12/16") == vit_config("B12x1/16")
    assert vit_config("B12").name == "B12x1/16"


@pytest.mark.parametrize("name", ["Ti12x1/16", "S18x2/16", "B9x4/16", "L24x1/14", "W64-6x2/4", "W192-12x1/8"])
def test_a_canonical_name_reads_back(name):
    image_size = 224 if "/14" in name else 32
    assert vit_config(name, image_size=image_size).name == name


def test_widths_have_the_papers_heads_and_initial_deviation():
    assert [(c.width, c.heads, c.init_std) for c in map(vit_config, ("Ti12", "S12", "B12", "L24"))] == [
        (192, 3, 0.02), (384, 6, 0.02), (768, 12, 0.02), (1024, 16, 0.02),
    ]  # fmt: skip
    assert vit_config("W192-12").heads == 6
    assert vit_config("W192-12").init_std == pytest.approx(0.04)


def test_pairs_and_tokens_are_what_the_name_says():
    config = vit_config("B18x2/16")
    assert (config.pairs, config.grid, config.tokens) == (36, 14, 197)


@pytest.mark.parametrize(
    ("name", "fields", "said"),
    [
        ("B12y2", {}, ["'B12y2'", "Ti, S, B, L", "for example B12"]),
        ("XL12", {}, ["'XL12'", "Ti, S, B, L"]),
        ("W70-12", {}, ["70", "multiples of 32"]),
        ("B0", {}, ["depth", "0"]),
        ("B12x0", {}, ["branches", "0"]),
        ("B12/0", {}, ["patch_size", "0"]),
        ("B12", {"layerscale": 1e-4}, ["'layerscale'", "did you mean 'layer_scale'?"]),
        ("B12", {"img_size": 224}, ["'img_size'", "did you mean 'image_size'?"]),
        ("B12", {"stem": "hmpl"}, ["'hmpl'", "linear, conv, hmlp, local", "did you mean 'hmlp'?"]),
        ("B12", {"stem_norm": "bm"}, ["stem_norm 'bm'", "none, bn, ln", "did you mean 'bn'?"]),
        ("B12", {"stem_act": "glu"}, ["stem_act 'glu'", "did you mean 'gelu'?"]),
        ("B12", {"pool": "avg_mean"}, ["pool 'avg_mean'", "did you mean 'mean'?"]),
        ("B12", {"pos": "patch"}, ["pos 'patch'", "did you mean 'patches'?"]),
        ("B12", {"image_size": 225}, ["225", "16", "224 and 240"]),
        ("B12", {"image_size": 10}, ["10", "nearest allowed are 16"]),
        ("B12", {"image_size": "224"}, ["image_size", "'224'"]),
        ("B12", {"heads": 7}, ["768", "7 heads"]),
        ("B12", {"layer_scale": 0}, ["layer_scale is 0", "None (off)"]),
        ("B12", {"drop_path": 1.0}, ["drop_path is 1.0"]),
        ("B12", {"head_scale": 0}, ["head_scale is 0", "positive factor"]),
        ("B12", {"key_bias": None}, ["key_bias is None", "True and False"]),
        ("B12", {"drop_path": -0.1}, ["drop_path is -0.1"]),
        ("B12/14", {"stem": "conv"}, ["14", "2, 4, 8, 16, 32, 64"]),
        ("B12/14", {"stem": "local"}, ["14", "multiples of 4"]),
        ("B12", {"stem": "local", "stem_norm": "bn"}, ["of its own"]),
        ("B12/7", {"stem": "hmlp"}, ["hMLP", "patch_size 7", "even"]),
        ("B12", {"stem_width": 64}, ["stem_width is 64", "no hidden width"]),
        ("B12", {"drop_path": float("nan")}, ["drop_path is nan"]),
    ],
)
def test_a_wrong_name_field_or_value_is_one_sentence_that_says_what_is_allowed(name, fields, said):
    with pytest.raises(UsageError) as error:
        vit_config(name, **fields)
    message = str(error.value)
    assert "\n" not in message
    assert all(part in message for part in said), message


def test_a_configuration_checks_itself():
    for make in (lambda: ViTConfig(64, 2, heads=5), lambda: replace(small(), heads=5)):
        with pytest.raises(UsageError, match="width 64 cannot be split into 5 heads"):
            make()
    with pytest.raises(UsageError, match=r"^ViT wants a ViTConfig, not 'B12': for example ViT\(vit_config\('B12'\)\)$"):
        ViT("B12")


def test_a_stem_has_its_norm_and_activation_however_the_configuration_is_made():
    named = small("W64-1/4", stem="hmlp")
    direct = replace(ViTConfig(64, 1, heads=2, patch_size=4, stem="hmlp", **SMALL), init_std=named.init_std)
    told = small("W64-1/4", stem="hmlp", stem_norm="bn", stem_act="gelu")
    replaced = [replace(small("W64-1/4", stem=stem), stem="hmlp") for stem in ("linear", "conv", "local")]
    assert all(config == named and config.norm == "bn" and config.act == "gelu" for config in (direct, told, *replaced))
    assert [type(m).__name__ for m in make_stem(direct)] == [
        *("Conv2d", "BatchNorm2d", "GELU") * 2,
        "Conv2d",
        "BatchNorm2d",
    ]
    assert [(c.norm, c.act) for c in (replace(named, stem=stem) for stem in STEMS)] == [
        ("none", "none"), ("bn", "gelu"), ("bn", "gelu"), ("none", "none"),
    ]  # fmt: skip
    other = replace(small("W64-1/4", stem="hmlp", stem_norm="ln"), stem="conv")  # what was asked for stays
    assert (other.norm, other.act) == ("ln", "gelu")


def test_the_hidden_width_of_the_hmlp_stem_is_a_quarter_unless_told_otherwise():
    widths = [
        [m.out_channels for m in make_stem(small(stem="hmlp", stem_width=w)) if isinstance(m, nn.Conv2d)]
        for w in (None, 64)
    ]
    assert widths == [[16, 16, 64], [64, 64, 64]]


class Means(Stem):
    """A stem that the paper does not have: each patch's mean, then a map with a table of its own."""

    def __init__(self, config):
        super().__init__(
            nn.AvgPool2d(config.patch_size), nn.Conv2d(config.in_chans, config.width, 1), *norm(config, config.width)
        )
        self.scale = nn.Parameter(torch.empty(config.width))

    def forward(self, images):
        return super().forward(images) * self.scale


def test_a_stem_is_added_by_one_entry_of_the_table(monkeypatch, tmp_path):
    refuses = lambda config: "means want patches of 4" if config.patch_size != 4 else None  # noqa: E731
    monkeypatch.setitem(STEMS, "means", Kind(Means, norm="ln", refuses=refuses))
    config = small(stem="means")
    vit, again = ViT(config, seed=1), ViT(config, seed=1)
    assert same(vit.state_dict(), again.state_dict()) and vit.stem.scale.any()
    assert vit(torch.ones(2, 3, 16, 16)).shape == (2, 10) and isinstance(vit.stem[2], nn.LayerNorm)
    save(vit, tmp_path / "means.safetensors")
    assert same(load(tmp_path / "means.safetensors").state_dict(), vit.state_dict())
    with pytest.raises(UsageError, match="means want patches of 4"):
        replace(config, patch_size=8)


def test_images_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"\(1, 3, 20, 20\).*\(B, 3, 16, 16\)"):
        ViT(small())(torch.zeros(1, 3, 20, 20))


# --- initial values ---


def initial(config: ViTConfig, seed: int = 0) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """The tensors of each (MHSA, FFN) pair in order, and those outside of the layers."""
    model = ViT(config, seed)
    branches = [(layer.mhsa[k], layer.ffn[k]) for layer in model.layers for k in range(config.branches)]
    pairs = [
        {f"{part}.{name}": tensor for part, r in zip(("mhsa", "ffn"), pair, strict=True) for name, tensor in r.state_dict().items()}
        for pair in branches
    ]  # fmt: skip
    rest = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("layers.")}
    return pairs, rest


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_models_of_12_pairs_start_from_identical_tensors():
    names = ("W64-12x1/4", "W64-6x2/4", "W64-4x3/4", "W64-3x4/4")
    models = [initial(small(name, layer_scale=1e-4)) for name in names]
    for (pairs_a, rest_a), (pairs_b, rest_b) in itertools.combinations(models, 2):
        assert len(pairs_a) == len(pairs_b) == 12
        assert all(same(a, b) for a, b in zip(pairs_a, pairs_b, strict=True))
        assert same(rest_a, rest_b)


def test_deep_layers_start_smaller_by_the_root_of_twice_their_number():
    plain, rest = initial(small("W64-12x1/4"))
    shrunk, same_rest = initial(small("W64-12x1/4", shrink_deep=True))
    assert same(rest, same_rest)
    for number, (a, b) in enumerate(zip(plain, shrunk, strict=True), start=1):
        scaled = {"mhsa.f.proj.weight", "ffn.f.fc2.weight"}
        assert all(torch.equal(b[name], a[name] / math.sqrt(2 * number)) for name in scaled)
        assert all(torch.equal(b[name], a[name]) for name in a.keys() - scaled)
    twin, _ = initial(small("W64-6x2/4", shrink_deep=True))
    assert all(same(a, b) for a, b in zip(shrunk, twin, strict=True))


def test_the_heads_scale_is_a_factor_on_its_initial_weights_alone():
    plain, scaled = (ViT(small(head_scale=scale)).state_dict() for scale in (1.0, 0.001))
    assert torch.equal(scaled["head.weight"], 0.001 * plain["head.weight"]) and not scaled["head.bias"].any()
    assert all(torch.equal(scaled[name], plain[name]) for name in plain.keys() - {"head.weight"})


def test_without_key_bias_a_model_has_a_width_less_a_pair_and_gives_the_same_logits():
    """A key's bias adds the same to all logits of a query, which softmax ignores."""
    with_bias, without = (ViT(small("W64-3x2/4", key_bias=key_bias)) for key_bias in (True, False))
    assert count.params(with_bias) - count.params(without) == 6 * 64
    assert not any("qkv.bias" in name for name in without.state_dict())
    with_bias, images = filled(with_bias), noise(2, 3, 16, 16)
    state = with_bias.state_dict()
    for name in [name for name in state if "qkv.bias" in name]:
        q, _, v = state.pop(name).chunk(3)
        state |= {name.replace("qkv.bias", "q_bias"): q, name.replace("qkv.bias", "v_bias"): v}
    without.double().eval().load_state_dict(state)
    with torch.no_grad():
        torch.testing.assert_close(without(images), with_bias(images), rtol=0, atol=1e-12)
        for name, p in without.named_parameters():
            assert not ("q_bias" in name or "v_bias" in name) or p.ndim == 1  # so that weight decay spares them


def test_no_two_linear_layers_start_alike_and_no_two_seeds():
    pairs, rest = initial(small("W64-6x2/4"))
    weights = [pair[name] for pair in pairs for name in ("mhsa.f.qkv.weight", "mhsa.f.proj.weight", "ffn.f.fc1.weight")]
    assert len({tuple(weight.flatten()[:8].tolist()) for weight in weights}) == 36
    others, other_rest = initial(small("W64-6x2/4"), seed=1)
    assert not any(
        torch.equal(a["ffn.f.fc2.weight"], b["ffn.f.fc2.weight"]) for a, b in zip(pairs, others, strict=True)
    )
    assert not any(torch.equal(rest[name], other_rest[name]) for name in ("head.weight", "pos_embed", "stem.0.weight"))


def test_models_with_different_stems_start_from_identical_blocks():
    arms = [{}, {"stem": "conv"}, {"stem": "hmlp"}, {"stem": "hmlp", "stem_norm": "ln"}, {"stem": "local"}]
    models = [initial(small(**arm)) for arm in arms]
    for (pairs_a, rest_a), (pairs_b, rest_b) in itertools.combinations(models, 2):
        assert all(same(a, b) for a, b in zip(pairs_a, pairs_b, strict=True))
        assert all(torch.equal(rest_a[name], rest_b[name]) for name in rest_a if not name.startswith("stem."))


@pytest.mark.parametrize("name", ["S1", "W128-1x2/4"])
def test_linear_layers_start_at_the_nominal_deviation(name):
    config = vit_config(name, **({} if name == "S1" else SMALL))
    model = ViT(config)
    linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and m.weight.numel() > 10_000}
    assert len(linear) >= 4 * config.pairs
    for n, module in linear.items():
        assert module.weight.std().item() == pytest.approx(config.init_std, rel=0.02), n
        assert not module.bias.any(), n
    assert model.pos_embed.std().item() == pytest.approx(config.init_std, rel=0.05)


def test_stem_convolutions_start_as_pytorch_starts_them():
    for stem in ("linear", "conv", "hmlp", "local"):
        for module in ViT(vit_config("S1", stem=stem)).stem:
            if isinstance(module, nn.Conv2d):  # uniform between +- 1 / sqrt(fan in)
                bound = 1 / math.sqrt(module.weight[0].numel())
                assert 0.98 * bound < module.weight.abs().max() <= bound
                assert module.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03)
                assert module.bias is None or 0.5 * bound < module.bias.abs().max() <= bound


# --- stems ---

TIGHT = [(arm, train) for arm in ("linear", "hmlp-ln", "local") for train in (True, False)] + [("hmlp-bn", False)]
LEAKY = [("hmlp-bn", True), ("conv", True), ("conv", False)]


def filled_stem(arm: str, train: bool, patch: int = 16) -> nn.Module:
    return filled(make_stem(small(f"W64-1/{patch}", image_size=4 * patch, **STEM_ARMS[arm]))).train(train)


def moved(stem: nn.Module, images: Tensor, others: Tensor) -> np.ndarray:
    """How far each token moves between two images: (B, N), the largest difference over the width."""
    with torch.no_grad():
        return (stem(images) - stem(others)).abs().amax(-1).numpy()


@pytest.mark.parametrize("patch", [4, 16])
@pytest.mark.parametrize(("arm", "train"), TIGHT)
def test_a_patch_reaches_its_own_token_only(arm, train, patch):
    images = noise(2, 3, 4 * patch, 4 * patch)
    others = images.clone()
    others[0, :, patch : 2 * patch, 2 * patch : 3 * patch] += 1  # row 1, column 2: token 6
    distance = moved(filled_stem(arm, train, patch), images, others)
    assert distance[0, 6] > 1e-3
    distance[0, 6] = 0
    assert distance.max() < 1e-12


@pytest.mark.parametrize("patch", [4, 16])
@pytest.mark.parametrize(("arm", "train"), LEAKY)
def test_a_patch_reaches_other_tokens_through_overlap_or_batch_statistics(arm, train, patch):
    images = noise(2, 3, 4 * patch, 4 * patch)
    others = images.clone()
    others[0, :, patch : 2 * patch, 2 * patch : 3 * patch] += 1
    distance = moved(filled_stem(arm, train, patch), images, others)
    distance[0, 6] = 0
    assert distance[0].max() > 1e-4
    assert (distance[1].max() > 1e-4) == train  # only batch statistics reach the other image


@pytest.mark.parametrize(("arm", "train", "commutes"), [(*a, True) for a in TIGHT] + [(*a, False) for a in LEAKY])
@pytest.mark.check
def test_masking_commutes_with_the_stem_unless_patches_overlap_or_share_statistics(arm, train, commutes):
    images = noise(2, 3, 64, 64)
    mask = noise(2, 16, seed=3) > 0  # True = masked
    assert 0 < mask.sum() < mask.numel()
    pixels = mask.view(2, 1, 4, 1, 4, 1).expand(2, 3, 4, 16, 4, 16).reshape(2, 3, 64, 64)
    distance = moved(filled_stem(arm, train), images, images.masked_fill(pixels, 0.0))[~mask.numpy()]
    assert (distance.max() < 1e-12) if commutes else (distance.max() > 1e-4)


@pytest.mark.parametrize(
    ("patch", "kernels"),
    [(2, (1, 1, 2)), (4, (1, 2, 2)), (6, (3, 1, 2)), (8, (2, 2, 2)), (10, (5, 1, 2)), (12, (3, 2, 2)), (14, (7, 1, 2)),
     (16, (4, 2, 2)), (28, (7, 2, 2)), (32, (8, 2, 2)), (40, (10, 2, 2))],
)  # fmt: skip
def test_the_hmlp_stem_gives_one_token_a_patch(patch, kernels):
    assert hmlp_kernels(patch) == kernels and math.prod(kernels) == patch
    config = vit_config(f"W64-1/{patch}", stem="hmlp", image_size=3 * patch)
    convolutions = [m for m in make_stem(config) if isinstance(m, nn.Conv2d)]
    assert [m.kernel_size for m in convolutions] == [m.stride for m in convolutions]
    assert [m.kernel_size[0] for m in convolutions] == list(kernels)
    assert [m.out_channels for m in convolutions] == [16, 16, 64]
    assert make_stem(config)(torch.zeros(2, 3, 3 * patch, 3 * patch)).shape == (2, 9, 64)


def test_the_hmlp_stem_has_three_norms_two_gelus_and_ends_in_a_norm():
    kinds = [type(m).__name__ for m in make_stem(vit_config("B12", stem="hmlp"))]
    assert kinds == [*("Conv2d", "BatchNorm2d", "GELU") * 2, "Conv2d", "BatchNorm2d"]
    kinds = [type(m).__name__ for m in make_stem(vit_config("B12", stem="hmlp", stem_norm="ln"))]
    assert kinds == [*("Conv2d", "ChannelNorm", "GELU") * 2, "Conv2d", "ChannelNorm"]


def test_the_channel_norm_is_a_layer_norm_over_channels():
    stem = filled(make_stem(small(stem="hmlp", stem_norm="ln")))
    x = noise(2, 16, 4, 4)
    by_hand = layer_norm(x.permute(0, 2, 3, 1), stem[1]).permute(0, 3, 1, 2)
    torch.testing.assert_close(stem[1](x), by_hand, rtol=0, atol=1e-12)


def test_the_local_stem_is_four_layers_inside_of_each_patch_then_one_linear_map():
    stem = filled(make_stem(small(stem="local")))
    images = noise(1, 3, 16, 16)
    patch = images[:, :, 4:8, 8:12]  # row 1, column 2: token 6
    with torch.no_grad():
        x = patch.flatten(2).transpose(1, 2) @ stem.patch.weight.flatten(1).T + stem.patch.bias + stem.positions
        for layer in stem.layers:
            for r, f, norm in ((mhsa, layer, layer.norm1), (ffn, layer, layer.norm2)):
                x = x + r(x, SimpleNamespace(f=f, norm=norm, gamma=None))
        token = layer_norm(x.flatten(1), stem.norm) @ stem.proj.weight.T + stem.proj.bias
        torch.testing.assert_close(stem(images)[:, 6], token, rtol=0, atol=1e-12)


def test_the_local_stem_costs_vit_b_what_table_7_prints_within_a_fifth_of_a_percent():
    config = vit_config("B12", stem="local")
    width, inner = 96, 196 * 16
    own = inner * 48 * width + 4 * inner * (12 * width**2 + 2 * 16 * width) + 196 * 16 * width * 768
    found, linear = count.macs(config), count.macs(vit_config("B12"))
    assert found.matmul - linear.matmul == own - 196 * 768 * 768
    assert found.paper == pytest.approx(19.12e9, rel=2e-3)
    with torch.device("meta"):
        roles = count.params_by_role(ViT(config))
    assert roles["stem"] == count.params(make_stem(config)) == 1_637_088
    assert roles["mhsa"] == 12 * (4 * 768**2 + 4 * 768)  # the stem's attention is the stem's


@pytest.mark.parametrize("patch", [4, 16])
@pytest.mark.parametrize("arm", STEM_ARMS)
def test_every_stem_gives_grid_squared_tokens_in_row_major_order(arm, patch):
    stem = filled_stem(arm, False, patch)
    images = noise(2, 3, 4 * patch, 4 * patch)
    assert stem(images).shape == (2, 16, 64)
    others = images.clone()
    others[:, :, 3 * patch :, :patch] += 1  # the last row's first patch
    assert moved(stem, images, others).argmax(1).tolist() == [12, 12]


# --- stochastic depth ---


def test_a_result_does_not_depend_on_who_else_is_in_the_batch():
    config = small("W64-3x2/4", drop_path=0.5, layer_scale=1e-4, stem="hmlp", stem_norm="ln")
    model = filled(ViT(config)).train()
    images = noise(6, 3, 16, 16)
    draws = torch.rand(config.pairs, 2, 6, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        together = model(images, draws)
        for chosen in ([3], [5, 0], [1, 2, 3, 4]):
            torch.testing.assert_close(model(images[chosen], draws[..., chosen]), together[chosen], rtol=0, atol=1e-11)
        assert (model(images, draws.roll(1, -1)) - together).abs().max() > 1e-3


def test_given_draws_drop_each_branch_by_itself_and_scale_the_kept_ones():
    rate = 0.3
    layer = filled(ParallelLayer(small("W64-1x2/4", drop_path=rate, layer_scale=1e-4))).train()
    x = noise(3, 17, 64)
    draws = torch.tensor([[[0.1, 0.9, 0.3], [0.9, 0.1, 0.2]], [[0.9, 0.2, 0.9], [0.29, 0.3, 0.9]]])
    keep = (draws >= rate).double()[..., None, None] / (1 - rate)
    with torch.no_grad():
        x1 = x + sum(keep[k, 0] * mhsa(x, r) for k, r in enumerate(layer.mhsa))
        x2 = x1 + sum(keep[k, 1] * ffn(x1, r) for k, r in enumerate(layer.ffn))
        torch.testing.assert_close(layer(x, draws), x2, rtol=0, atol=1e-12)


def test_branches_are_dropped_independently_at_the_rate_where_no_draws_are_given():
    rate, B = 0.25, 8000
    layer = ParallelLayer(small("W64-1x2/4", drop_path=rate)).train()
    with torch.no_grad():  # each residual writes 1 into a column of its own: what comes out is what was kept
        for column, r in enumerate([*layer.mhsa, *layer.ffn]):
            last = r.f.proj if hasattr(r.f, "proj") else r.f.fc2
            last.weight.zero_()
            last.bias.copy_(torch.eye(64)[column])
        torch.manual_seed(0)
        kept = layer(torch.zeros(B, 1, 64))[:, 0, :4]
    assert set(kept.unique().tolist()) == {0.0, torch.tensor(1 / (1 - rate)).item()}
    assert (kept > 0).double().mean(0).tolist() == pytest.approx([1 - rate] * 4, abs=0.02)
    correlation = np.corrcoef(kept.numpy().T)
    assert np.abs(correlation - np.eye(4)).max() < 0.05


def test_each_layer_gets_its_own_draws():
    config = small("W64-3x2/4", drop_path=0.5)
    model = filled(ViT(config)).train()
    images, kept = noise(1, 3, 16, 16), torch.ones(config.pairs, 2, 1)
    with torch.no_grad():
        results = [model(images, kept)]
        for pair, part in itertools.product(range(config.pairs), range(2)):
            draws = kept.clone()
            draws[pair, part] = 0
            results.append(model(images, draws))
    for a, b in itertools.combinations(results, 2):
        assert (a - b).abs().max() > 1e-9


def test_eval_mode_drops_nothing():
    config = small(drop_path=0.9)
    model = filled(ViT(config))
    plain = filled(ViT(replace(config, drop_path=0.0)))
    images = noise(4, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(model(images), plain(images))
        assert torch.equal(model(images, torch.zeros(config.pairs, 2, 4)), plain(images))


# --- positions ---


@pytest.mark.parametrize("extra", [0, 1])
def test_positions_of_the_same_grid_stay_as_they_are(extra):
    table = noise(1, extra + 16, 8)
    assert torch.equal(resize_positions(table, 4), table)


@pytest.mark.parametrize("extra", [0, 1])
@pytest.mark.parametrize("grid", [2, 5, 7])
def test_resized_positions_keep_the_class_token_and_constants(extra, grid):
    table = noise(1, extra + 16, 8)
    resized = resize_positions(table, grid)
    assert resized.shape == (1, extra + grid * grid, 8)
    assert torch.equal(resized[:, :extra], table[:, :extra])
    constant = table[:, :1].expand(1, extra + 16, 8)
    torch.testing.assert_close(resize_positions(constant, grid), table[:, :1].expand_as(resized), rtol=0, atol=1e-12)


def test_positions_are_resized_as_the_released_code_does_it():
    table = noise(1, 16, 8)
    by_hand = F.interpolate(table.transpose(1, 2).view(1, 8, 4, 4), (6, 6), mode="bicubic", align_corners=False)
    assert torch.equal(resize_positions(table, 6), by_hand.flatten(2).transpose(1, 2))


def test_positions_that_are_no_grid_are_refused():
    with pytest.raises(ValueError, match="18 positions"):
        resize_positions(torch.zeros(1, 18, 8), 5)


def test_a_model_with_relative_positions_runs_and_trains_its_table():
    model = ViT(small(pos="relative", pool="mean", layer_scale=0.1))
    assert model.pos_embed is None
    model(torch.ones(2, 3, 16, 16)).square().mean().backward()
    assert model.relative.table.grad.abs().sum() > 0


def test_relative_positions_depend_on_the_offset_alone():
    bias = RelativeBias(small(pos="relative"))
    with torch.no_grad():
        bias.table.copy_(torch.arange(bias.table.numel()).view_as(bias.table))
        entries = bias()
    assert entries.shape == (2, 17, 17)
    offset = {}
    for i, j in itertools.product(range(16), repeat=2):
        offset.setdefault((i // 4 - j // 4, i % 4 - j % 4), set()).add(entries[0, i + 1, j + 1].item())
    assert len(offset) == 49
    assert all(len(values) == 1 for values in offset.values())
    own = [{entries[0, 0, 0].item()}, set(entries[0, 0, 1:].tolist()), set(entries[0, 1:, 0].tolist())]
    assert all(len(values) == 1 for values in own)  # the class token: to itself, to a patch, from a patch
    assert len(set.union(*offset.values(), *own)) == 49 + 3


def test_relative_positions_are_added_to_the_logits():
    layer = filled(ParallelLayer(small("W64-1/4")))
    x, bias = noise(2, 17, 64), noise(2, 17, 17)
    r = layer.mhsa[0]
    with torch.no_grad():
        q, k, v = r.f.qkv(r.norm(x)).view(2, 17, 3, 2, 32).unbind(2)
        weights = (torch.einsum("bnhe,bmhe->bhnm", q, k) / math.sqrt(32) + bias).softmax(-1)
        y = r.f.proj(torch.einsum("bhnm,bmhe->bnhe", weights, v).flatten(2))
        torch.testing.assert_close(r(x, reads=Reads(relative=bias)), y, rtol=0, atol=1e-12)


# --- executions: seq, par, fused and timm's are one function ---

CASES = {
    "2 branches": {"name": "W64-3x2/4"},
    "3 branches, LayerScale": {"name": "W64-2x3/4", "layer_scale": 0.3},
    "4 branches, drop-path": {"name": "W64-1x4/4", "drop_path": 0.4, "layer_scale": 0.1},
    "relative positions": {"name": "W64-2x2/4", "pos": "relative"},
    "mean pooling": {"name": "W64-2x2/4", "pool": "mean", "pos": "all"},
    "no key bias": {"name": "W64-2x2/4", "key_bias": False},
}


def model(name: str, dtype: torch.dtype = torch.float64, **fields: object) -> ViT:
    """Every tensor random, so that no norm, gamma or bias is at a value that hides a mistake."""
    vit = ViT(vit_config(name, image_size=16, in_chans=1, num_classes=7, **fields), seed=0)
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in vit.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=random))
    return vit.to(dtype)


def images(count: int = 5, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(count, 1, 16, 16, generator=torch.Generator().manual_seed(1), dtype=dtype)


@pytest.fixture(params=[(case, name) for case in CASES for name in ("par",)], ids=" ".join)
def pair(request):
    """One model twice: processed branch after branch, and another way."""
    case, name = request.param
    seq = model(**CASES[case])
    return seq, set_execution(copy.deepcopy(seq), name)


def test_every_execution_gives_the_logits_and_gradients_of_one_after_the_other(pair):
    draws = torch.rand(pair[0].config.pairs, 2, 5, generator=torch.Generator().manual_seed(2))
    logits = [vit.train()(images(), draws) for vit in pair]
    torch.testing.assert_close(*logits, rtol=0, atol=1e-11)
    for y in logits:
        y.square().sum().backward()
    for (name, p), q in zip(pair[0].named_parameters(), pair[1].parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


def test_an_optimizer_that_looks_at_each_tensor_takes_the_same_steps(pair):
    """LAMB's trust ratio is per tensor: stacked branches would share one."""
    for vit in pair:
        optimizer = create_optimizer_v2(vit.train(), "lamb", lr=1e-2, weight_decay=0.02)
        for step in range(3):
            draws = torch.rand(vit.config.pairs, 2, 5, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            F.cross_entropy(vit(images(), draws), torch.arange(5)).backward()
            optimizer.step()
    for p, q in zip(pair[0].parameters(), pair[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-9)


def test_drop_path_without_given_draws_is_the_same_for_both_at_one_torch_seed():
    seq = model("W64-2x3/4", drop_path=0.5).train()
    par = set_execution(copy.deepcopy(seq), "par")
    results = []
    for vit in (seq, par):
        torch.manual_seed(11)
        results.append(vit(images()))
    torch.testing.assert_close(*results, rtol=0, atol=1e-11)
    assert (seq(images()) - results[0]).abs().max() > 1e-3  # it does drop


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2**-5)]
)
@pytest.mark.parametrize("case", CASES)
def test_a_fused_model_gives_the_same_logits(case, dtype, tolerance):
    vit = model(dtype=dtype, **CASES[case]).eval()
    with torch.no_grad():
        expected, found = vit(images(dtype=dtype)), fuse(vit)(images(dtype=dtype))
    scale = expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * scale)


def test_a_fused_model_is_a_plain_vit_with_wider_layers_and_leaves_the_original_as_it_is():
    vit = model("W64-3x2/4", dtype=torch.float32, layer_scale=0.1).train()
    before = {name: tensor.clone() for name, tensor in vit.state_dict().items()}
    fused = fuse(vit)
    layer = fused.layers[0]
    assert type(fused) is ViT and len(layer.mhsa) == len(layer.ffn) == 1
    assert fused.config.name == "W64-3x1/4 with 4 heads and FFN 512"
    assert (layer.mhsa[0].f.heads, layer.mhsa[0].f.qkv.weight.shape) == (4, (3 * 128, 64))
    assert layer.ffn[0].f.fc1.weight.shape == (2 * 256, 64)
    assert layer.mhsa[0].gamma is None and (layer.ffn[0].norm.weight == 1).all() and (layer.ffn[0].norm.bias == 0).all()
    assert vit.training and all(torch.equal(before[name], tensor) for name, tensor in vit.state_dict().items())
    assert not fused.training and not any(p.requires_grad for p in fused.parameters())
    assert count.macs(fused).matmul == count.macs(vit).matmul


def test_a_fused_model_travels_as_a_file_and_as_a_plain_timm_model(tmp_path):
    vit = model("W64-3x2/4", layer_scale=0.1).eval()
    fused = fuse(vit)
    save(fused.float(), tmp_path / "fused.safetensors")
    again = load(tmp_path / "fused.safetensors").eval()
    assert again.config == fused.config and all(
        torch.equal(a, b) for a, b in zip(again.parameters(), fused.parameters(), strict=True)
    )
    theirs = to_timm(again.double())
    assert [type(block).__name__ for block in theirs.blocks] == ["Block"] * 3
    torch.testing.assert_close(theirs(images()), again(images()), rtol=0, atol=1e-10)


@pytest.mark.parametrize("case", ["2 branches", "3 branches, LayerScale", "mean pooling", "no key bias"])
def test_timms_model_with_our_weights_gives_our_logits(case):
    vit = model(**CASES[case]).eval()
    theirs = to_timm(vit)
    keys = 0 if vit.config.key_bias else vit.config.pairs * vit.config.width  # timm's have a bias, of zero then
    assert sum(p.numel() for p in theirs.parameters()) == count.params(vit) + keys
    torch.testing.assert_close(theirs(images()), vit(images()), rtol=0, atol=1e-10)


def test_what_timm_cannot_hold_and_what_is_no_model_file_is_refused(tmp_path):
    with pytest.raises(UsageError, match="timm has no such model: stem hmlp"):
        to_timm(model("W64-2x2/4", stem="hmlp"))
    (tmp_path / "junk").write_bytes(b"junk")
    with pytest.raises(UsageError, match="cannot be read as a safetensors file"):
        load(tmp_path / "junk")


@pytest.mark.parametrize("name", ["seq", "par"])
@pytest.mark.parametrize("case", ["2 branches", "relative positions"])
def test_tokens_that_nobody_reads_are_skipped_without_changing_logits_or_gradients(case, name):
    vit = set_execution(model(**CASES[case]), name).train()
    whole = copy.deepcopy(vit)
    whole.skip_unread = False
    y, z = vit(images()), whole(images())
    torch.testing.assert_close(y, z, rtol=0, atol=1e-11)
    for logits in (y, z):
        logits.square().sum().backward()
    for p, q in zip(vit.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-10)
    rows = torch.tensor([[3, 9], [0, 1], [16, 2], [5, 5], [7, 8]])
    some, every = vit.encode(vit.embed(images()), rows=rows), vit.encode(vit.embed(images()))
    torch.testing.assert_close(some, every[torch.arange(5)[:, None], rows], rtol=0, atol=1e-11)
    assert count.saved_bytes(vit, images(), torch.sum) < count.saved_bytes(whole, images(), torch.sum)


def test_an_unknown_execution_is_refused():
    with pytest.raises(UsageError, match="unknown execution 'parallel': allowed are seq, par; did you mean 'par'"):
        set_execution(model("W64-2x2/4"), "parallel")


# --- modules are called unless they are plain, and nothing is kept ---


class Adapter(nn.Module):
    """LoRA as peft puts it in the place of a Linear, with the two properties that peft's layers have."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base_layer = base
        self.a, self.b = nn.Linear(base.in_features, 4, bias=False), nn.Linear(4, base.out_features, bias=False)
        self.double()

    weight = property(lambda self: self.base_layer.weight)
    bias = property(lambda self: self.base_layer.bias)

    def forward(self, x):
        return self.base_layer(x) + self.b(self.a(x))


def adapted(f: nn.Module, name: str) -> None:
    setattr(f, name, Adapter(getattr(f, name)))


def hooked(f: nn.Module, name: str) -> None:
    getattr(f, name).register_forward_hook(lambda module, args, out: out + module.weight[:, 0])


def pre_hooked(f: nn.Module, name: str) -> None:
    getattr(f, name).register_forward_pre_hook(lambda module, args: (args[0] * 1.1,))


def weight_normed(f: nn.Module, name: str) -> None:
    with pytest.warns(FutureWarning, match="weight_norm"):
        nn.utils.weight_norm(getattr(f, name))
    with torch.no_grad():
        getattr(f, name).weight_g.mul_(1.3)


def parametrized(f: nn.Module, name: str) -> None:
    nn.utils.parametrizations.spectral_norm(getattr(f, name))


def with_another_forward(f: nn.Module, name: str) -> None:
    linear = getattr(f, name)
    linear.forward = lambda x: 1.2 * F.linear(x, linear.weight, linear.bias)


CALLED = [adapted, hooked, pre_hooked, weight_normed, parametrized, with_another_forward]
MATRICES = [("mhsa", "qkv"), ("mhsa", "proj"), ("ffn", "fc1"), ("ffn", "fc2")]


@pytest.mark.parametrize("key_bias", [True, False])
@pytest.mark.parametrize("change", CALLED)
def test_what_is_put_on_a_matrix_is_called_in_every_execution_and_never_fused_away(change, key_bias):
    plain = model("W64-1x2/4", key_bias=key_bias).eval()
    before = plain(images()).detach()
    for part, name in MATRICES:
        seq = copy.deepcopy(plain)
        change(getattr(seq.layers[0], part)[1].f, name)
        seq.eval()
        logits = seq(images())
        assert (logits - before).abs().max() > 1e-4, name
        par = set_execution(seq, "par")
        torch.testing.assert_close(par(images()), logits, rtol=0, atol=1e-11)
        par(images()).square().sum().backward()
        assert all(p.grad is not None and p.grad.any() for p in getattr(par.layers[0], part)[1].f.parameters()), name
        with pytest.raises(
            UsageError, match=rf"cannot be fused: layers\.0\.{part}\.1\.f\.{name} is an adapter"
        ) as refusal:
            fuse(par)
        assert "\n" not in str(refusal.value)


def test_hooks_on_all_modules_and_on_a_whole_branch_are_called_too():
    par = set_execution(model("W64-1x2/4").eval(), "par")
    called = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: called.append(type(module).__name__))
    with handle:
        par(images())
    assert [called.count(name) for name in ("MHSA", "FFN", "Linear")] == [2, 2, 2 * 4 + 1]
    before = par(images())
    par.layers[0].ffn[1].register_forward_hook(lambda module, args, out: 2 * out)
    assert (par(images()) - before).abs().max() > 1e-3


@pytest.mark.parametrize("execution", ["seq", "par"])
@pytest.mark.parametrize("fields", [{}, {"stem": "local"}, {"pos": "relative", "pool": "mean"}], ids=str)
def test_a_dynamically_quantized_model_runs(fields, execution):
    whole = set_execution(model("W64-1x2/4", torch.float32, **fields).eval(), execution)
    small_ints = torch.ao.quantization.quantize_dynamic(whole, {nn.Linear})
    with torch.no_grad():
        a, b = whole(images(dtype=torch.float32)), small_ints(images(dtype=torch.float32))
    assert 0 < (a - b).abs().max() < 0.1 * a.abs().max()


def changed_in_place(vit):
    with torch.no_grad():
        vit.layers[1].ffn[0].f.fc1.weight.mul_(1.5)


def changed_through_data(vit):
    """As peft merges an adapter: PyTorch's version counter does not see it."""
    vit.layers[1].mhsa[0].f.qkv.weight.data += 0.5


def loaded(vit):
    vit.load_state_dict({name: 1.1 * tensor for name, tensor in vit.state_dict().items()})


def assigned(vit):
    vit.load_state_dict({name: 1.1 * tensor for name, tensor in vit.state_dict().items()}, assign=True)


def replaced_parameter(vit):
    vit.layers[0].mhsa[1].f.proj.weight = nn.Parameter(torch.ones(64, 64).double())


def replaced_norm(vit):
    vit.layers[0].mhsa[1].norm = nn.LayerNorm(64, eps=1e-6).double()


def another_norm(vit):
    vit.layers[0].mhsa[1].norm = nn.LayerNorm(64, eps=1e-2).double()


def appended_branches(vit):
    vit.layers[0].mhsa.append(copy.deepcopy(vit.layers[1].mhsa[0]))
    vit.layers[0].ffn.append(copy.deepcopy(vit.layers[1].ffn[0]))


def appended_another_branch(vit):
    vit.layers[0].mhsa.append(filled(ParallelLayer(small("W64-1x1/4", heads=4))).mhsa[0])


def replaced_without_bias(vit):
    for branch in vit.layers[0].ffn:
        branch.f.fc2 = nn.Linear(256, 64, bias=False).double()


CHANGES = [changed_in_place, changed_through_data, loaded, assigned, replaced_parameter, replaced_norm, another_norm,
           appended_branches, appended_another_branch, replaced_without_bias]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_par_sees_every_change_of_a_weight_at_the_next_call(change):
    par = set_execution(model("W64-2x2/4").eval(), "par")
    with torch.no_grad():
        before = par(images())
        change(par)
        after = par(images())
        torch.testing.assert_close(after, set_execution(par, "seq")(images()), rtol=0, atol=1e-11)
    assert (after - before).abs().max() > 1e-6


def test_par_reads_the_tensors_that_it_is_called_with():
    par, other = (set_execution(model("W64-2x2/4").eval(), "par") for _ in range(2))
    changed_in_place(other)
    state = dict(other.named_parameters())
    assert torch.equal(torch.func.functional_call(par, state, (images(),)), other(images()))


def test_par_agrees_with_seq_under_autocast():
    seq = model("W64-2x2/4", torch.float32).eval()
    par = set_execution(copy.deepcopy(seq), "par")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        a, b = (vit(images(dtype=torch.float32)).float() for vit in (seq, par))
    torch.testing.assert_close(a, b, rtol=0, atol=2**-5 * a.abs().max().item())


def test_a_model_whose_branches_are_not_those_of_its_configuration_is_not_fused():
    vit = model("W64-2x2/4")
    appended_branches(vit)
    with pytest.raises(
        UsageError, match=r"does not fit its configuration W64-2x2/4: layers\.0\.ffn\.2.*nothing was fused"
    ):
        fuse(vit)


class CosineHead(nn.Linear):
    def forward(self, x):
        return F.linear(F.normalize(x), F.normalize(self.weight))


def another_class(vit):
    head, vit.head = vit.head, CosineHead(64, 7).double()
    vit.head.load_state_dict(head.state_dict())


def another_eps(vit):
    vit.norm.eps = 1.0


def other_heads(vit):
    for branch in vit.layers[0].mhsa:
        branch.f.heads = 1


def quantized(vit):
    vit.head = torch.ao.nn.quantized.dynamic.Linear(64, 7)


LOST = {  # what no tensor says, and what is said of it
    "a hook on the head": (
        lambda vit: vit.head.register_forward_hook(lambda *_: _[2] * 2),
        "head is .* one with hooks",
    ),
    "a hook on a layer": (lambda vit: vit.layers[1].register_forward_hook(lambda *_: _[2] * 2), "layers.1 is .* hooks"),
    "another forward": (lambda vit: setattr(vit.stem[0], "forward", lambda x: 0 * x), "stem.0 is .* one with hooks"),
    "another class": (another_class, "head is .* of another class .*CosineHead"),
    "another eps": (another_eps, "the settings of norm are not those of W64-2x2/4"),
    "other heads": (other_heads, r"the settings of layers\.0\.mhsa\.0\.f are not"),
    "a quantized head": (quantized, "head is an adapter, a quantized layer"),
}


@pytest.mark.parametrize("what", LOST)
def test_what_no_tensor_says_is_refused_and_not_lost_on_the_way(what, tmp_path):
    vit, (change, said) = model("W64-2x2/4").eval(), LOST[what]
    change(vit)
    for done in (fuse, partial(regroup, branches=1), to_timm):
        with pytest.raises(UsageError, match=f"this model cannot be .*: {said}"):
            done(vit)
    if "hook" in what or "forward" in what:  # a file has weights and a configuration, and tools put hooks on models
        save(vit, tmp_path / "vit.safetensors")
    else:
        with pytest.raises(UsageError, match=f"this model cannot be saved: {said}"):
            save(vit, tmp_path / "vit.safetensors")


def test_a_model_on_several_gpus_is_still_that_of_its_configuration(tmp_path):
    vit = nn.SyncBatchNorm.convert_sync_batchnorm(model("W64-1x2/4", torch.float32, stem="hmlp").eval())
    save(vit, tmp_path / "vit.safetensors")
    there, x = load(tmp_path / "vit.safetensors").eval(), images(dtype=torch.float32)
    torch.testing.assert_close(fuse(vit)(x), there(x), rtol=0, atol=1e-4)


def test_a_bias_that_is_missing_beside_those_of_q_and_v_is_noticed():
    par = set_execution(model("W64-1x2/4", key_bias=False).eval(), "par")
    for branch in par.layers[0].mhsa:
        branch.f.proj.bias = None
    with torch.no_grad():
        torch.testing.assert_close(par(images()), set_execution(par, "seq")(images()), rtol=0, atol=1e-11)
    with pytest.raises(UsageError, match=r"layers\.0\.mhsa\.0\.f\.proj\.bias \(missing"):
        fuse(par)


def test_each_residual_function_has_a_rate_of_its_own_in_every_execution():
    vit = model("W64-1x2/4").train()
    plain = vit(images())
    for branch in vit.layers[0].ffn:
        branch.drop_path = 0.5
    draws = torch.full((2, 2, 5), 0.25)  # below the FFNs' rate alone
    dropped = vit(images(), draws)
    torch.testing.assert_close(set_execution(vit, "par")(images(), draws), dropped, rtol=0, atol=1e-11)
    assert (dropped - plain).abs().max() > 1e-3
    with torch.no_grad():
        for branch in vit.layers[0].ffn:
            branch.f.fc2.weight.zero_()
            branch.f.fc2.bias.zero_()
    torch.testing.assert_close(dropped, vit.eval()(images()), rtol=0, atol=1e-11)


# --- any batch size, none included ---

READ = [{"pool": "cls"}, {"pool": "mean", "pos": "all"}, {"pool": "cls", "pos": "relative"}]


EXECUTED = ("seq", "par", "fused")
# every stem in every execution, every reading in every execution
TRACED = [(arm, how, READ[(i + j) % 3]) for i, arm in enumerate(STEM_ARMS) for j, how in enumerate(EXECUTED)]


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(("arm", "execution", "read"), TRACED)
def test_a_traced_model_takes_any_batch_size(arm, execution, read):
    vit = model("W64-1x2/4", torch.float32, **STEM_ARMS[arm], **read).eval()
    vit = fuse(vit) if execution == "fused" else set_execution(vit, execution)
    with torch.no_grad():
        traced = torch.jit.trace(vit, images(3, torch.float32), check_trace=False)
        for batch in (1, 5):
            x = images(batch, torch.float32)
            torch.testing.assert_close(traced(x), vit(x), rtol=0, atol=1e-5)
        assert vit(images(0, torch.float32)).shape == (0, 7)


EXPORTED = [("conv", "fused", 1), ("local", "par", 2)]


@pytest.mark.parametrize(("arm", "execution", "read"), EXPORTED)
def test_an_exported_model_takes_any_batch_size(arm, execution, read):
    vit = model("W64-1x2/4", torch.float32, **STEM_ARMS[arm], **READ[read]).eval()
    vit = fuse(vit) if execution == "fused" else set_execution(vit, execution)
    sizes = ({0: torch.export.Dim("batch", min=1, max=64)},)
    exported = torch.export.export(vit, (images(3, torch.float32),), dynamic_shapes=sizes).module()
    for batch in (1, 5):
        torch.testing.assert_close(exported(images(batch, torch.float32)), vit(images(batch, torch.float32)))


def test_a_model_goes_to_onnx_with_a_free_batch_size(tmp_path):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is not here: pip install 'vitlib[export]'")
    import onnxruntime

    vit = set_execution(model("W64-1x2/4", torch.float32, stem="hmlp", pos="relative").eval(), "par")
    path, sizes = tmp_path / "model.onnx", ({0: torch.export.Dim("batch")},)
    torch.onnx.export(vit, (images(3, torch.float32),), path, dynamo=True, dynamic_shapes=sizes, verbose=False)
    session = onnxruntime.InferenceSession(path)
    for batch in (1, 5):
        x = images(batch, torch.float32)
        (logits,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), vit(x).detach(), rtol=0, atol=1e-4)


# --- the room itself ---


def test_every_layer_norm_has_the_released_codes_epsilon():
    model = ViT(small(stem="hmlp", stem_norm="ln"))
    assert EPS == 1e-6
    assert {m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)} == {EPS}
    assert {m.eps for m in ViT(small(stem="hmlp")).modules() if isinstance(m, nn.BatchNorm2d)} == {1e-5}


def test_the_model_room_imports_without_timm_and_counting_without_what_lab_brings():
    alone = ("timm", "torchvision", "pyarrow", "PIL", "safetensors")
    heavy = ("pandas", "datasets", "matplotlib", "seaborn", "scipy", "statsmodels", "papermill")
    code = f"""
import sys
sys.modules.update(dict.fromkeys({(*alone, *heavy)}))
import torch
from vitlib.model import ViT, vit_config
print(ViT(vit_config("W64-2x2/4", image_size=16, num_classes=10))(torch.zeros(2, 3, 16, 16)).shape)
for name in {alone}:
    del sys.modules[name]
import lab.cost.count
"""
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "torch.Size([2, 10])" in done.stdout


@pytest.mark.parametrize(("width", "ffn"), [(32, 61), (224, 61)])
def test_timms_model_has_the_ffn_width_of_ours_whatever_it_is(width, ffn):
    model = ViT(vit_config(f"W{width}-1x1/4", image_size=8, num_classes=2, ffn_width=ffn))
    assert to_timm(model).blocks[0].mlp.fc1.out_features == ffn


def test_a_timm_model_without_pooling_is_refused():
    import timm

    model = timm.create_model("vit_tiny_patch16_224", img_size=32, global_pool="", num_classes=3)
    with pytest.raises(UsageError, match="its pooling is none"):
        from_timm(model)


def test_a_convolutional_stem_whose_first_map_would_be_empty_is_refused():
    with pytest.raises(UsageError, match="its first map is empty"):
        ViTConfig(8, 1, heads=1, patch_size=64, image_size=64, stem="conv")


@pytest.mark.parametrize(("stem", "reach"), [("linear", 0), ("hmlp", 0), ("local", 0), ("conv", 1)])
def test_leakage_says_which_visible_tokens_a_stem_changes(stem, reach):
    config = vit_config("W64-1/8", image_size=40, stem=stem, num_classes=0)
    model = ViT(config).stem.train()
    leaks = leakage(model, 8)
    place = torch.arange(25)
    # the convolutional stem's kernels look up and to the left: a patch reaches those below and to the right of it
    down, right = (place[None] // 5 - place[:, None] // 5), (place[None] % 5 - place[:, None] % 5)
    near = (down >= 0) & (down <= reach) & (right >= 0) & (right <= reach) & ((down > 0) | (right > 0))
    assert torch.equal(leaks, near) and model.training


def test_leakage_of_a_stem_without_parameters_is_measured_too():
    class Pixels(nn.Module):
        def forward(self, x):
            return F.unfold(x, 4, stride=4).transpose(1, 2)

    assert not leakage(Pixels(), 4).any()


def test_every_stem_takes_images_that_are_not_square():
    for name in STEMS:
        stem = filled(make_stem(small("W64-1/4", stem=name)))
        image = noise(1, 3, 8, 12)
        tokens = stem(image)
        assert tokens.shape == (1, 6, 64)
        if name != "conv":  # whose patches are not apart: the first row alone
            torch.testing.assert_close(stem(image[:, :, :4]), tokens[:, :3], rtol=0, atol=1e-12)
