"""Checkpoints of DeiT, DeiT III and timm become our ViT with the same logits, and timm's layout is written back."""

import argparse
import collections
import dataclasses
import json
import pickle
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm.layers import DiffAttention
from timm.models.vision_transformer import (
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
    VisionTransformer,
)
from torch import nn

from vitlib.errors import UsageError
from vitlib.model import ViT, fuse, resize_positions, set_execution, vit_config
from vitlib.model.weights import (
    find_names,
    from_timm,
    load,
    read_checkpoint,
    save,
    their_name,
    timm_state,
    to_timm,
)
from vitlib.train.finetune import at_image_size, freeze, start_from

torch.set_num_threads(1)
SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 64, "depth": 2, "num_heads": 2, "num_classes": 7}
PARALLEL = {"block_fn": partial(ParallelThingsBlock, num_parallel=3)}
MODELS = {
    "plain": {},
    "LayerScale": {"init_values": 1e-5},
    "DeiT III: LayerScale, no position for the class token": {"init_values": 1e-6, "no_embed_class": True},
    "class token behind fc_norm": {"fc_norm": True},
    "mean": {"global_pool": "avg", "fc_norm": False},
    "two branches": {"block_fn": ParallelThingsBlock},
    "three branches, LayerScale": {"init_values": 1e-5, **PARALLEL},
    "one channel, narrow FFN, no head": {"in_chans": 1, "mlp_ratio": 2, "num_classes": 0},
}


def filled(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every tensor random, so that no norm, gamma or bias is at a value that hides a mistake."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=random) + (p.ndim == 1))
    return model.eval()


def noise(*shape: int, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


def small(**options) -> VisionTransformer:
    return filled(VisionTransformer(**SMALL | options))


@torch.no_grad()
def assert_same_logits(ours: nn.Module, theirs: nn.Module, channels: int = 3, size: int = 16) -> None:
    """To 1e-5 of logits of size one in float32, and to rounding in float64, where an eps of 1e-5 would show."""
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-11)):
        x = noise(2, channels, size, size, dtype=dtype)
        torch.testing.assert_close(ours.to(dtype)(x), theirs.to(dtype)(x), rtol=tolerance, atol=tolerance)


def same_tensors(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- our files ---


def our_models() -> dict[str, nn.Module]:
    relative = vit_config("W64-2x2/4", image_size=16, num_classes=7, pos="relative", stem="hmlp", stem_width=8)
    parallel = vit_config("W64-1x3/4", image_size=16, num_classes=0, key_bias=False, stem="local", layer_scale=0.1)
    return {
        "relative positions, hMLP": ViT(relative),
        "no head, three branches": ViT(parallel),
        "fused": fuse(ViT(vit_config("W64-1x2/4", image_size=16, pos="relative"))),
    }


@pytest.mark.parametrize("what", ["relative positions, hMLP", "no head, three branches", "fused"])
def test_every_model_of_ours_is_loaded_as_it_was_saved(what, tmp_path):
    model = our_models()[what].eval()
    save(model, tmp_path / "ours.safetensors")
    again = load(tmp_path / "ours.safetensors").eval()
    assert type(again) is type(model) and again.config == model.config
    assert same_tensors(again.state_dict(), model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(again(noise(2, 3, 16, 16)), model(noise(2, 3, 16, 16)))


def test_what_is_no_model_of_ours_is_not_saved(tmp_path):
    with pytest.raises(UsageError, match=r"^Linear cannot be saved: allowed is a ViT$"):
        save(nn.Linear(2, 2), tmp_path / "no.safetensors")
    changed = ViT(vit_config("W64-1x2/4", image_size=16))
    changed.layers[0].ffn.append(changed.layers[0].ffn[0])
    with pytest.raises(
        UsageError, match=r"does not fit its configuration W64-1x2/4: layers\.0\.ffn\.2.*nothing was saved"
    ):
        save(changed, tmp_path / "no.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_file_of_another_kind_or_configuration_is_refused(tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors", {"vitlib": "{}", "kind": "video"})
    with pytest.raises(UsageError, match=r"holds a model of kind 'video': allowed is 'vit'$"):
        load(tmp_path / "other.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors", {"vitlib": '{"widht": 64}'})
    with pytest.raises(UsageError, match="names a configuration that cannot be read"):
        load(tmp_path / "other.safetensors")


@pytest.mark.parametrize("pos", ["relative", "patches"])
def test_a_model_made_on_the_meta_device_gives_right_logits_once_it_is_filled(pos):
    model = filled(ViT(vit_config("W64-1x2/4", image_size=16, pos=pos)))
    with torch.device("meta"):
        assigned, emptied = ViT(model.config), ViT(model.config).to_empty(device="cpu")
    assigned.load_state_dict(model.state_dict(), assign=True)
    emptied.load_state_dict(model.state_dict())
    with torch.no_grad():
        for again in (assigned.eval(), emptied.eval()):
            assert torch.equal(again(noise(2, 3, 16, 16)), model(noise(2, 3, 16, 16)))


# --- from timm, and back ---


@pytest.mark.parametrize("case", MODELS)
def test_timms_model_becomes_ours_with_the_same_logits_and_goes_back_tensor_by_tensor(case):
    theirs = small(**MODELS[case])
    before = {name.replace("fc_norm", "norm"): t.clone() for name, t in theirs.state_dict().items()}
    ours = from_timm(theirs)
    assert ours.config.branches == {"two": 2, "three": 3}.get(case.split()[0], 1)
    assert ours.config.layer_scale == MODELS[case].get("init_values")
    assert same_tensors(before, to_timm(ours).state_dict()) and same_tensors(before, timm_state(ours))
    assert_same_logits(ours, theirs, theirs.in_chans)


@pytest.mark.parametrize("name", ["vit_small_patch16_18x2_224", "deit3_small_patch16_224", "deit_small_patch16_224"])
def test_timms_registered_models_of_the_paper_and_of_deit_are_read(name):
    theirs = filled(timm.create_model(name, img_size=32, depth=2, num_classes=5))
    ours = from_timm(theirs)
    c = ours.config
    assert (c.name, c.heads, c.pos, c.layer_scale) == {
        "vit_small_patch16_18x2_224": ("S2x2/16", 6, "all", 1e-5),
        "deit3_small_patch16_224": ("S2x1/16", 6, "patches", 1e-6),
        "deit_small_patch16_224": ("S2x1/16", 6, "all", None),
    }[name]
    assert_same_logits(ours, theirs, size=32)
    assert same_tensors(to_timm(ours).state_dict(), theirs.state_dict())


def test_a_model_keeps_its_mode_and_precision_and_shares_no_memory_with_timms():
    theirs = small().half().train()
    ours = from_timm(theirs)
    assert ours.training and ours.head.weight.dtype == torch.float16 and ours.head.weight.requires_grad
    with torch.no_grad():
        ours.head.weight.zero_()
    assert theirs.head.weight.any()
    assert not from_timm(theirs.eval()).training


def test_a_fused_model_comes_back_from_timm_with_its_heads_and_widths():
    fused = fuse(filled(ViT(vit_config("W64-2x2/4", image_size=16, num_classes=7))))
    again = from_timm(to_timm(fused))
    assert again.config == fused.config.__class__(**vars(fused.config) | {"init_std": 0.02})
    assert same_tensors(again.state_dict(), fused.state_dict())


REFUSED = {
    "eps is 1e-05": {"norm_layer": nn.LayerNorm},
    "activation is GELU(approximate='tanh')": {"act_layer": partial(nn.GELU, approximate="tanh")},
    "pooling is avg, then fc_norm": {"global_pool": "avg"},
    "pooling is max": {"global_pool": "max"},
    "pool_include_prefix is True": {"global_pool": "avg", "fc_norm": False, "pool_include_prefix": True},
    "attention is DiffAttention": {"attn_layer": DiffAttention},
    "blocks is ResPostBlock": {"block_fn": ResPostBlock},
    "blocks is ParallelScalingBlock": {"block_fn": ParallelScalingBlock},
    "image size is (18, 18), allowed is (16, 16)": {"img_size": 18},
    "image size is (8, 32)": {"img_size": (8, 32)},
    "q_norm.weight (32, not known)": {"qk_norm": True},
    "has register tokens (reg_token), which this ViT has not": {"reg_tokens": 1, "no_embed_class": True},
    "blocks.0.attn.qkv.bias (missing, not 192)": {"qkv_bias": False},
    "cls_token is missing": {"class_token": False, "global_pool": "avg", "fc_norm": False},
    "norm.weight (missing, not 64)": {"final_norm": False},
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_our_model_has_not_is_refused_in_one_sentence(why):
    with pytest.raises(UsageError, match=re.escape(why)) as refusal:
        from_timm(VisionTransformer(**SMALL | REFUSED[why]))
    assert "\n" not in str(refusal.value)


def test_other_classes_and_distilled_models_are_refused():
    hybrid = timm.create_model("vit_tiny_r_s16_p8_224", depth=1)
    for other, name in ((timm.create_model("resnet10t"), "ResNet"), (hybrid, "VisionTransformer")):
        with pytest.raises(UsageError, match=f"timm's {name} cannot be read: allowed is .* with its linear stem"):
            from_timm(other)
    distilled = timm.create_model("deit_tiny_distilled_patch16_224", img_size=32, depth=1)
    with pytest.raises(UsageError, match="is a distilled model"):
        from_timm(distilled)


def test_a_file_in_timms_layout_loads_into_timms_model(tmp_path):
    ours = filled(ViT(vit_config("W64-2x2/4", image_size=16, num_classes=7, layer_scale=0.1)))
    save_file(timm_state(ours), tmp_path / "timm.safetensors")
    theirs = VisionTransformer(**SMALL, init_values=1e-5, no_embed_class=True, block_fn=ParallelThingsBlock).eval()
    timm.models.load_checkpoint(theirs, str(tmp_path / "timm.safetensors"))
    assert_same_logits(ours, theirs)
    with pytest.raises(UsageError, match="timm has no such model: stem hmlp"):
        timm_state(ViT(vit_config("W64-2x2/4", image_size=16, stem="hmlp")))


# --- DeiT's layouts ---


class DeiT(nn.Module):
    """The released code's parameter names, written out, with eq. (1) or (2) over them: (B, 3, 16, 16) -> (B, 7)."""

    def __init__(self, two: bool = False, scale: bool = True, positions: int = 16, width: int = 64, depth: int = 2):
        super().__init__()
        norm = partial(nn.LayerNorm, width, eps=1e-6)
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, 4, 4)})
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty(1, positions, width))
        self.blocks = nn.ModuleList()
        for _ in range(depth):
            block = nn.Module()
            for tail, inner in (("", ""), ("1", "_1"))[: 1 + two]:
                for part, first, last, wide in (("attn", "qkv", "proj", 3), ("mlp", "fc1", "fc2", 4)):
                    back = width if part == "attn" else 4 * width
                    f = {first: nn.Linear(width, wide * width), last: nn.Linear(back, width)}
                    block.add_module(f"{part}{tail}", nn.ModuleDict(f))
                    number = 1 if part == "attn" else 2
                    block.add_module(f"norm{number}{tail}", norm())
                    if scale:
                        block.register_parameter(f"gamma_{number}{inner}", nn.Parameter(torch.empty(width)))
            self.blocks.append(block)
        self.norm, self.head = norm(), nn.Linear(width, 7)

    def forward(self, x):
        x = self.patch_embed["proj"](x).flatten(2).mT
        cls = self.cls_token.expand(len(x), -1, -1)
        if self.pos_embed.shape[1] == x.shape[1]:
            x = torch.cat([cls, x + self.pos_embed], 1)
        else:
            x = torch.cat([cls, x], 1) + self.pos_embed
        for b in self.blocks:
            two = hasattr(b, "attn1")
            g = [getattr(b, name, 1.0) for name in ("gamma_1", "gamma_1_1", "gamma_2", "gamma_2_1")]
            heard = g[0] * self.attention(b.attn, b.norm1(x))
            x = x + heard + (g[1] * self.attention(b.attn1, b.norm11(x)) if two else 0)
            made = g[2] * self.mlp(b.mlp, b.norm2(x))
            x = x + made + (g[3] * self.mlp(b.mlp1, b.norm21(x)) if two else 0)
        return self.head(self.norm(x)[:, 0])

    def attention(self, f, x, heads=2):
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in f["qkv"](x).chunk(3, -1))
        heard = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v
        return f["proj"](heard.transpose(1, 2).flatten(2))

    def mlp(self, f, x):
        return f["fc2"](nn.functional.gelu(f["fc1"](x)))


def deit(**options) -> DeiT:
    return filled(DeiT(**options))


DEITS = {
    "DeiT": {"scale": False, "positions": 17},
    "DeiT III": {},
    "x2": {"two": True, "scale": False},
    "x2, LayerScale": {"two": True},
}


@pytest.mark.parametrize("case", DEITS)
def test_a_checkpoint_in_deits_layout_becomes_ours_with_the_same_logits(case, tmp_path):
    theirs = deit(**DEITS[case])
    torch.save({"model": theirs.state_dict()}, tmp_path / "deit.pth")
    ours = read_checkpoint(tmp_path / "deit.pth", heads=2).eval()
    c = ours.config
    assert (c.branches, c.pos) == (2 if "x2" in case else 1, "all" if case == "DeiT" else "patches")
    assert c.layer_scale == (1e-4 if DEITS[case].get("scale", True) else None)
    assert (c.width, c.depth, c.heads, c.patch_size, c.image_size, c.num_classes) == (64, 2, 2, 4, 16, 7)
    assert_same_logits(ours, theirs)


@pytest.mark.parametrize("case", DEITS)
def test_each_of_deits_tensors_is_used_once(case):
    state = deit(**DEITS[case]).state_dict()
    names, branches = find_names(state)
    scale = 1.0 if DEITS[case].get("scale", True) else None
    ours = ViT(vit_config(f"W64-2x{branches}/4", image_size=16, num_classes=7, layer_scale=scale))
    assert sorted(their_name(name, names) for name in ours.state_dict()) == sorted(state)


def test_each_kind_of_file_gives_the_same_model(tmp_path):
    state = deit(two=True).state_dict()
    for name in ("bare.pth", "bare.pt", "bare.bin"):
        torch.save(state, tmp_path / name)
    save_file(state, tmp_path / "deit.safetensors")
    other = deit(two=True, depth=1).state_dict()
    torch.save({"model": state, "model_ema": other, "epoch": 3, "args": argparse.Namespace(lr=1)}, tmp_path / "run.pth")
    save_file(timm_state(read_checkpoint(tmp_path / "bare.pth", heads=2)), tmp_path / "timm.safetensors")
    read = [read_checkpoint(path, heads=2) for path in sorted(tmp_path.iterdir())]
    assert len(read) == 6 and all(same_tensors(read[0].state_dict(), vit.state_dict()) for vit in read)
    assert read_checkpoint(tmp_path / "run.pth", heads=2, key="model_ema").config.depth == 1
    assert load_file(tmp_path / "timm.safetensors")["blocks.1.attns.1.ls.gamma"].equal(state["blocks.1.gamma_1_1"])


def test_heads_are_known_at_the_papers_widths_alone(tmp_path):
    torch.save(deit(width=192, depth=1).state_dict(), tmp_path / "Ti.pth")
    assert read_checkpoint(tmp_path / "Ti.pth").config.name == "Ti1x1/4"
    assert read_checkpoint(tmp_path / "Ti.pth", heads=6).config.heads == 6
    torch.save(deit().state_dict(), tmp_path / "64.pth")
    with pytest.raises(UsageError, match=r"width 64, .*heads are known at 192, 384, 768, 1024 alone, give heads"):
        read_checkpoint(tmp_path / "64.pth")
    save_file(timm_state(fuse(filled(ViT(vit_config("Ti1x2/4", image_size=16))))), tmp_path / "fused.safetensors")
    with pytest.raises(UsageError, match=r"width 192, attention 384: .*give heads"):
        read_checkpoint(tmp_path / "fused.safetensors")
    assert read_checkpoint(tmp_path / "fused.safetensors", heads=6).config.inner == 384


def test_a_file_does_not_show_what_the_head_reads(tmp_path):
    theirs = small(global_pool="avg", fc_norm=False)
    save_file(theirs.state_dict(), tmp_path / "mean.safetensors")
    assert_same_logits(read_checkpoint(tmp_path / "mean.safetensors", heads=2, pool="mean").eval(), theirs)
    assert read_checkpoint(tmp_path / "mean.safetensors", heads=2).config.pool == "cls"
    save_file(small(global_pool="avg").state_dict(), tmp_path / "behind.safetensors")
    with pytest.raises(UsageError, match=r"fc_norm\.weight \(64, not known\), .*norm\.weight \(missing, not 64\)"):
        read_checkpoint(tmp_path / "behind.safetensors", heads=2, pool="mean")


PREFIXED = {"DistributedDataParallel": "module.", "torch.compile": "_orig_mod.", "both": "module._orig_mod."}


@pytest.mark.parametrize("program", PREFIXED)
def test_what_a_training_program_puts_before_the_names_goes(program, tmp_path):
    state = deit().state_dict()
    torch.save({"model": {PREFIXED[program] + name: t for name, t in state.items()}}, tmp_path / "run.PTH")
    torch.save(state, tmp_path / "bare.pth.tar")
    read = [read_checkpoint(tmp_path / name, heads=2).state_dict() for name in ("run.PTH", "bare.pth.tar")]
    assert same_tensors(*read)


BESIDE = {
    "a path": argparse.Namespace(output_dir=Path("/x")),
    "numbers of numpy": {"top1": np.float64(77.1), "epoch": np.int64(3)},
    "a dictionary with a default": collections.defaultdict(dict),
    "the version of torch": torch.__version__,
}


@pytest.mark.parametrize("what", BESIDE)
def test_values_beside_the_tensors_are_harmless(what, tmp_path):
    torch.save({"state_dict": deit().state_dict(), "beside": BESIDE[what]}, tmp_path / "run.pth")
    assert read_checkpoint(tmp_path / "run.pth", heads=2, key="state_dict").config.depth == 2


def test_a_file_without_checksums_is_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(deit().state_dict(), tmp_path / "deit.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    assert read_checkpoint(tmp_path / "deit.pth", heads=2).config.depth == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_half_precision_is_read_as_float32(dtype, tmp_path):
    half = {name: t.to(dtype) for name, t in deit().state_dict().items()}
    torch.save(half, tmp_path / "half.pth")
    trunk = read_checkpoint(tmp_path / "half.pth", heads=2)
    assert trunk(noise(1, 3, 16, 16)).dtype == torch.float32
    larger = start_from(trunk.state_dict(), at_image_size(trunk.config, 24), 0)
    assert torch.equal(larger.pos_embed, resize_positions(half["pos_embed"].float(), 6))
    if dtype == torch.float8_e4m3fn:  # nothing is computed in it
        return
    table = resize_positions(half["pos_embed"], 6)  # in float32 inside
    assert table.dtype == dtype and torch.equal(table, larger.pos_embed.to(dtype))


# --- what does not fit ---


def test_a_checkpoint_that_does_not_fit_lists_the_keys_that_differ(tmp_path):
    state = deit(two=True).state_dict()
    del state["blocks.1.norm21.bias"], state["norm.weight"]
    state |= {"blocks.0.attn1.proj.weight": torch.zeros(64, 32), "extra": torch.zeros(3)}
    state["head.weight"] = torch.zeros(7, 64, dtype=torch.int8)
    torch.save(state, tmp_path / "odd.pth")
    with pytest.raises(UsageError) as refusal:
        read_checkpoint(tmp_path / "odd.pth", heads=2)
    assert str(refusal.value) == (
        f"{tmp_path / 'odd.pth'} does not fit W64-2x2/4: blocks.0.attn1.proj.weight (64x32, not 64x64), "
        "blocks.1.norm21.bias (missing, not 64), extra (3, not known), head.weight (7x64 of int8, not 7x64), "
        "norm.weight (missing, not 64); nothing was loaded"
    )


def test_our_own_file_that_does_not_fit_lists_its_keys_too(tmp_path):
    vit = ViT(vit_config("W64-1x1/4", image_size=16, num_classes=7))
    save(vit, tmp_path / "ours.safetensors")
    with safe_open(tmp_path / "ours.safetensors", framework="pt") as file:
        metadata = file.metadata()
    vit.head = nn.Linear(64, 8)
    with pytest.raises(
        UsageError, match=r"head\.bias \(8, not 7\), head\.weight \(8x64, not 7x64\); nothing was saved"
    ):
        save(vit, tmp_path / "ours.safetensors")
    save_file(vit.state_dict(), tmp_path / "ours.safetensors", metadata)
    with pytest.raises(UsageError, match=r"head\.bias \(8, not 7\), head\.weight \(8x64, not 7x64\); nothing was"):
        load(tmp_path / "ours.safetensors")


QUERY = "vit.encoder.layer.0.attention.attention.query.weight"
STATES = {
    "distilled model (dist_token)": lambda state: state | {"dist_token": torch.zeros(1, 1, 64)},
    "distilled model (head_dist.weight)": lambda state: state | {"head_dist.weight": torch.zeros(7, 64)},
    "no ViT in DeiT's or timm's layout: cls_token, pos_embed, patch_embed": lambda state: {"x": torch.zeros(2)},
    "has 18 positions and patches of 4x4": lambda state: state | {"pos_embed": torch.zeros(1, 18, 64)},
    "has 16 positions and patches of 2x4": lambda s: s | {"patch_embed.proj.weight": torch.zeros(64, 3, 2, 4)},
    "has no tensors under key 'model': allowed are state_dict": lambda state: {"state_dict": state, "epoch": 1},
    "has head.bias twice, once as module.head.bias": lambda state: state | {"module.head.bias": torch.zeros(7)},
    "blocks.0.attention.attention.query.weight (64x64, not known)": lambda state: state | {QUERY: torch.zeros(64, 64)},
    "attention.key.weight (3x5, not known)": lambda s: (
        s | {QUERY.replace("query", k): torch.zeros(3, 5 + i) for i, k in enumerate(("key", "query", "value"))}
    ),
    "holds a list": lambda state: list(state),
    "needs pickled code (torch.nn.modules.linear.Linear)": lambda state: {"model": nn.Linear(2, 2)},
}


@pytest.mark.parametrize("why", STATES)
def test_a_file_of_something_else_is_refused_in_one_sentence(why, tmp_path):
    torch.save(STATES[why](deit().state_dict()), tmp_path / "file.pth")
    with pytest.raises(UsageError, match=re.escape(why)) as refusal:
        read_checkpoint(tmp_path / "file.pth", heads=2)
    assert str(tmp_path / "file.pth") in str(refusal.value) and "\n" not in str(refusal.value)


class Code:
    """Unpickling an instance would set `ran`."""

    ran = False

    def __reduce__(self):
        return setattr, (Code, "ran", True)


@pytest.mark.parametrize("form", ["evil.pth", "evil.npz", "evil.npy", "evil.pkl"])
def test_pickled_code_is_never_run(form, tmp_path):
    code, path = np.array([Code()], object), tmp_path / form
    if form == "evil.pth":
        torch.save({"model": Code()}, path)
    elif form == "evil.pkl":
        path.write_bytes(pickle.dumps({"model": Code()}))
    else:
        np.savez(path, model=code) if form == "evil.npz" else np.save(path, code)
    with pytest.raises(UsageError, match=r"needs pickled code \(.*setattr\), which is never run|is damaged or was not"):
        read_checkpoint(path)
    assert not Code.ran


@pytest.mark.parametrize("damage", ["empty", "cut", "text", "one bit", "old format, cut"])
def test_a_damaged_file_is_one_sentence(damage, tmp_path):
    path = tmp_path / "deit.pth"
    torch.save(deit().state_dict(), path, _use_new_zipfile_serialization="old" not in damage)
    whole = path.read_bytes()
    half = len(whole) // 2
    flipped = whole[:half] + bytes([whole[half] ^ 1]) + whole[half + 1 :]
    path.write_bytes({"empty": b"", "text": b"hello world", "one bit": flipped}.get(damage, whole[:half]))
    with pytest.raises(UsageError, match=r"is damaged or was not written by torch\.save") as refusal:
        read_checkpoint(path, heads=2)
    assert str(path) in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_damaged_or_missing_safetensors_file_is_one_sentence(tmp_path):
    save_file(deit().state_dict(), tmp_path / "deit.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "deit.safetensors").read_bytes()[:5000])
    with pytest.raises(UsageError, match=r"cut\.safetensors cannot be read as a safetensors file"):
        read_checkpoint(tmp_path / "cut.safetensors")
    with pytest.raises(UsageError, match=r"gone\.safetensors is not there: give a"):
        read_checkpoint(tmp_path / "gone.safetensors")


def test_a_models_tensors_lie_where_the_allocator_puts_them_and_not_at_the_files_offsets(tmp_path):
    for length in range(8):  # of the header, which moves the offsets
        save_file(deit().state_dict(), tmp_path / "deit.safetensors", {"x": length * "x"})
        model = read_checkpoint(tmp_path / "deit.safetensors", heads=2)
        assert {tensor.data_ptr() % 64 for tensor in model.state_dict().values()} == {0}


def test_a_name_is_read_through_timm_or_refused_in_one_sentence(monkeypatch):
    wanted = []

    def online(name, pretrained):
        wanted.append((name, pretrained))
        return small(init_values=1e-6)

    def offline(name, pretrained):
        raise OSError("no network\nretrying")

    monkeypatch.setattr(timm, "create_model", online)
    assert read_checkpoint("deit3_small_patch16_224.fb_in1k").config.layer_scale == 1e-6
    assert wanted == [("deit3_small_patch16_224.fb_in1k", True)]
    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(UsageError, match=r"weights of deit3_small_patch16_224 \(no network\): give a file$"):
        read_checkpoint("deit3_small_patch16_224")
    with pytest.raises(UsageError, match=r"^deit4 is no file .* and no model of timm: allowed are"):
        read_checkpoint("deit4")
    monkeypatch.undo()
    with pytest.raises(UsageError, match=r"No pretrained weights exist for vit_small_patch16_18x2_224.*: give a file$"):
        read_checkpoint("vit_small_patch16_18x2_224")


# --- Hugging Face's and DINOv2's layouts ---

VIT = {  # timm's name in a block -> that of Hugging Face's ViT
    "norm1": "layernorm_before", "norm2": "layernorm_after", "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense",
}  # fmt: skip
DINOV2 = {
    "attn.proj": "attention.output.dense",
    "ls1.gamma": "layer_scale1.lambda1",
    "ls2.gamma": "layer_scale2.lambda1",
}
AROUND = {
    "cls_token": "embeddings.cls_token", "pos_embed": "embeddings.position_embeddings", "norm": "layernorm",
    "patch_embed.proj": "embeddings.patch_embeddings.projection", "head": "classifier",
}  # fmt: skip


def hugging_face(model: VisionTransformer, blocks: dict[str, str], prefix: str) -> dict[str, torch.Tensor]:
    """The state of timm's `model` as transformers names it."""
    state = {}
    for name, tensor in model.state_dict().items():
        part, _, kind = name.rpartition(".")
        if name.startswith("blocks."):
            _, i, inner = name.split(".", 2)
            place = f"{prefix}encoder.layer.{i}."
            if inner.startswith("attn.qkv"):
                for one, third in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                    state[f"{place}attention.attention.{one}.{kind}"] = third
                continue
            part = inner.rpartition(".")[0]
            renamed = blocks.get(inner) or f"{blocks.get(part, part)}.{kind}"
            state[place + renamed] = tensor
        else:
            renamed = AROUND.get(name) or f"{AROUND[part]}.{kind}"
            state[renamed if part == "head" else prefix + renamed] = tensor
    return state


@pytest.mark.parametrize(("blocks", "prefix", "options"), [
    (VIT, "vit.", {}), (VIT, "", {"num_classes": 0}), (DINOV2, "dinov2.", {"init_values": 1e-5, "num_classes": 0}),
], ids=["ViT", "ViT without a head", "DINOv2"])  # fmt: skip
def test_a_checkpoint_of_hugging_face_gives_the_logits_of_its_twin_in_timm(blocks, prefix, options, tmp_path):
    theirs = small(**options)
    state = hugging_face(theirs, blocks, prefix) | {f"{prefix}embeddings.mask_token": torch.zeros(1, 1, 64)}
    state[f"{prefix}pooler.dense.weight"] = torch.zeros(64, 64)
    save_file({name: tensor.contiguous().clone() for name, tensor in state.items()}, tmp_path / "model.safetensors")
    assert_same_logits(read_checkpoint(tmp_path / "model.safetensors", heads=2), theirs)


def test_a_parallel_checkpoint_of_birder_gives_the_logits_of_its_twin_in_timm(tmp_path):
    theirs = small(init_values=1e-5, **PARALLEL)
    around = {
        "cls_token": "class_token",
        "pos_embed": "pos_embedding",
        "patch_embed.proj": "conv_proj",
        "head": "classifier",
    }
    inner = {"norm": "0", "attn.qkv": "1.qkv", "attn.proj": "1.proj", "mlp.fc1": "1.0", "mlp.fc2": "1.3", "ls": "2"}
    state = {}
    for name, tensor in theirs.state_dict().items():
        part, _, kind = name.rpartition(".")
        if match := re.fullmatch(r"blocks\.(\d+)\.(attn|ffn)s\.(\d+)\.(.+)", part):
            i, which, k, place = match.groups()
            which = {"attn": "attn_blocks", "ffn": "mlp_blocks"}[which]
            state[f"encoder.block.{i}.{which}.{k}.{inner[place]}.{kind}"] = tensor
        else:
            state[around.get(name) or f"{around.get(part, part)}.{kind}"] = tensor
    assert len(state) == len(theirs.state_dict()) and "encoder.block.1.mlp_blocks.2.1.3.weight" in state
    torch.save(state, tmp_path / "birder.pt")
    assert_same_logits(read_checkpoint(tmp_path / "birder.pt", heads=2), theirs)


def test_dinov2s_own_file_is_read_and_what_our_model_has_not_is_named(tmp_path):
    theirs = small(init_values=1e-5, num_classes=0)
    state = theirs.state_dict() | {"mask_token": torch.zeros(1, 64)}
    torch.save(state, tmp_path / "dinov2.pth")
    assert_same_logits(read_checkpoint(tmp_path / "dinov2.pth", heads=2), theirs)
    for key, part in (("register_tokens", "register tokens"), ("rope_embed.periods", "rotary positions")):
        torch.save(state | {key: torch.zeros(1, 4, 64)}, tmp_path / "other.pth")
        with pytest.raises(UsageError, match=rf"other.pth has {part} \({re.escape(key)}\), which this ViT has not"):
            read_checkpoint(tmp_path / "other.pth", heads=2)


# --- attention-only fine-tuning from a checkpoint ---


@pytest.mark.parametrize("two", [False, True])
def test_attention_only_fine_tuning_starts_from_a_checkpoint_at_a_higher_resolution(two, tmp_path):
    """Released code: --attn-only would train attn, not attn1."""
    torch.save({"model": deit(two=two).state_dict()}, tmp_path / "deit_3.pth")
    trunk = read_checkpoint(tmp_path / "deit_3.pth", heads=2)
    model = start_from(trunk.state_dict(), at_image_size(trunk.config, 24), seed=0)
    assert freeze(model, "attn") == [
        "pos_embed",
        *(f"layers.{i}.mhsa.{k}.f.{f}.{kind}" for i in range(2) for k in range(1 + two)
          for f in ("qkv", "proj") for kind in ("weight", "bias")),
        "head.weight",
        "head.bias",
    ]  # fmt: skip
    assert (trunk.pos_embed.shape, model.pos_embed.shape) == ((1, 16, 64), (1, 36, 64))
    for name, tensor in trunk.state_dict().items():
        assert name == "pos_embed" or torch.equal(tensor, model.state_dict()[name])
    model(noise(2, 3, 24, 24)).square().sum().backward()
    assert all((p.grad is not None and p.grad.any()) == p.requires_grad for p in model.parameters())


def test_a_checkpoint_of_other_classes_starts_with_a_fresh_head(tmp_path):
    torch.save({"model": deit().state_dict()}, tmp_path / "deit_3.pth")
    trunk = read_checkpoint(tmp_path / "deit_3.pth", heads=2)
    model = start_from(
        trunk.state_dict(), vit_config("W64-2", patch_size=4, image_size=24, num_classes=3, layer_scale=1.0), 0
    )
    assert model.head.weight.shape == (3, 64) and torch.equal(model.cls_token, trunk.cls_token)


# --- files from anywhere ---

ASKED = {
    "3 TB": ({"num_classes": 10**13}, "does not fit"),
    "layers without end": ({"depth": 10**9}, "asks for 1,000,000,000 pairs of functions and holds 32 tensors"),
    "a tensor that cannot be": ({"width": 32 * 10**9, "heads": 10**9}, "asks for a model that cannot be"),
    "digits without end": ({"depth": 10**400}, "pairs of functions and holds 32 tensors"),
    "a text": ({"heads": "x"}, "cannot be read (heads is 'x': allowed is a whole number from 1)"),
    "an infinite number": ({"init_std": 10**400}, "cannot be read (init_std is"),
    "not a number": ({"init_std": float("nan")}, "cannot be read (init_std is nan"),
    "a field that is none": ({"wdth": 3}, "cannot be read"),
}  # fmt: skip


def our_file(path, **changes):
    vit = ViT(vit_config("W32-2x1/4", image_size=16, num_classes=3))
    save_file(vit.state_dict(), path, {"vitlib": json.dumps(dataclasses.asdict(vit.config) | changes)})
    return vit


@pytest.mark.parametrize("what", ASKED)
def test_a_configuration_that_asks_for_more_than_the_file_holds_is_refused_before_memory_is_taken(what, tmp_path):
    changes, said = ASKED[what]
    our_file(tmp_path / "x.safetensors", **changes)
    with pytest.raises(UsageError, match=re.escape(said)) as error:
        load(tmp_path / "x.safetensors")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "null", "[]", "5", "{", "[" * 99_999, '{"width": {}}'])
def test_a_configuration_that_is_none_is_one_sentence(text, tmp_path):
    vit = our_file(tmp_path / "x.safetensors")
    save_file(vit.state_dict(), tmp_path / "x.safetensors", {"vitlib": text})
    with pytest.raises(UsageError, match="names a configuration that cannot be read"):
        load(tmp_path / "x.safetensors")


def test_values_that_are_not_finite_are_neither_saved_nor_loaded(tmp_path):
    vit = our_file(tmp_path / "x.safetensors")
    metadata = {"vitlib": json.dumps(dataclasses.asdict(vit.config))}
    for value in (float("nan"), float("-inf")):
        with torch.no_grad():
            vit.head.weight[0, 0] = value
        save_file(vit.state_dict(), tmp_path / "x.safetensors", metadata)
        with pytest.raises(UsageError, match=r"has values that are not finite: head\.weight$"):
            load(tmp_path / "x.safetensors")
        with pytest.raises(UsageError, match=r"this model has values that are not finite: head\.weight$"):
            save(vit, tmp_path / "new.safetensors")
    assert not (tmp_path / "new.safetensors").exists()
    state = deit().state_dict()
    state["norm.bias"][3] = float("nan")
    torch.save(state, tmp_path / "nan.pth")
    with pytest.raises(UsageError, match=r"nan\.pth has values that are not finite: norm\.bias$"):
        read_checkpoint(tmp_path / "nan.pth", heads=2)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16])
def test_tied_tensors_and_small_types_are_saved_and_loaded(dtype, tmp_path):
    vit = ViT(vit_config("W32-2x1/4", image_size=16, num_classes=3))
    vit.layers[1].ffn[0].f.fc1.weight = vit.layers[0].ffn[0].f.fc1.weight
    vit.to(dtype)
    save(vit, tmp_path / "x.safetensors")
    for name, tensor in load(tmp_path / "x.safetensors").state_dict().items():
        assert tensor.dtype == dtype and tensor.float().equal(vit.state_dict()[name].float())


NO_STATE = {
    "a number for a name": {1: torch.ones(2)}, "a sparse tensor": {"x": torch.eye(2).to_sparse()},
    "a tensor without values": {"x": torch.empty(2, device="meta")},
    "a quantized tensor": {"x": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)},
}  # fmt: skip


@pytest.mark.parametrize("what", NO_STATE)
def test_tensors_that_cannot_be_a_models_are_refused(what, tmp_path):
    torch.save(deit().state_dict() | NO_STATE[what], tmp_path / "x.pth")
    with pytest.raises(UsageError, match=r"has no tensors under key 'model'|is damaged or was not written"):
        read_checkpoint(tmp_path / "x.pth", heads=2)


CALLS = {
    "ViT of a name": (lambda: ViT("B12"), "ViT wants a ViTConfig, not 'B12'"),
    "freeze a name": (lambda: freeze("B12", "attn"), "a str has no parameters to train"),
    "freeze nothing": (lambda: freeze(None, "attn"), "a NoneType has no parameters to train"),
    "freeze by a number": (lambda: freeze(nn.Linear(2, 2), 3), "unknown strategy '3'"),
    "fuse a layer": (lambda: fuse(nn.Linear(2, 2)), "Linear cannot be fused: allowed is a ViT"),
    "fuse a name": (lambda: fuse("B12"), "str cannot be fused: allowed is a ViT"),
    "execution of a layer": (lambda: set_execution(nn.Linear(2, 2), "par"), "the branches of a Linear cannot be processed"),
    "start from a path": (lambda: start_from("x.pth", vit_config("W32-2")), "tensors by name, as state_dict() gives them"),
    "start from a model": (lambda: start_from(nn.Linear(2, 2), vit_config("W32-2")), "and no Linear"),
    "start from texts": (lambda: start_from({"x": "y"}, vit_config("W32-2")), "tensors by name"),
    "start at a name": (lambda: start_from({}, "B12"), "ViT wants a ViTConfig, not 'B12'"),
    "save a layer": (lambda: save(nn.Linear(2, 2), "x.safetensors"), "Linear cannot be saved: allowed is a ViT"),
}  # fmt: skip


def test_a_model_without_values_is_not_saved(tmp_path):
    with torch.device("meta"):
        vit = ViT(vit_config("W32-1x2/4", image_size=8))
    with pytest.raises(UsageError, match=r"x\.safetensors is not written: cls_token is on the meta device"):
        save(vit, tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_parallel_block_of_one_branch_is_read():
    theirs = small(block_fn=partial(ParallelThingsBlock, num_parallel=1))
    ours = from_timm(theirs)
    assert ours.config.branches == 1
    assert_same_logits(ours, theirs)


@pytest.mark.parametrize("what", CALLS)
def test_what_is_no_model_is_refused_in_one_sentence(what):
    call, said = CALLS[what]
    with pytest.raises(UsageError, match=re.escape(said)) as error:
        call()
    assert "\n" not in str(error.value)
