"""Every execution is the same function: logits, gradients, optimizer steps, stochastic depth, what is read."""

import copy

import pytest
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2

from lab.cost import count
from vitlib.errors import UsageError
from vitlib.model import ViT, fuse, set_execution, vit_config
from vitlib.model.weights import load, save, to_timm

torch.set_num_threads(1)
CASES = {
    "2 branches": {"name": "W64-3x2/4"},
    "3 branches, LayerScale": {"name": "W64-2x3/4", "layer_scale": 0.3},
    "4 branches, drop-path": {"name": "W64-1x4/4", "drop_path": 0.4, "layer_scale": 0.1},
    "relative positions": {"name": "W64-2x2/4", "pos": "relative"},
    "mean pooling": {"name": "W64-2x2/4", "pool": "mean", "pos": "all"},
    "no key bias": {"name": "W64-2x2/4", "key_bias": False},
}


def model(name, dtype=torch.float64, **fields) -> ViT:
    """Every tensor random, so that no norm, gamma or bias is at a value that hides a mistake."""
    vit = ViT(vit_config(name, image_size=16, in_chans=1, num_classes=7, **fields), seed=0)
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in vit.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=random))
    return vit.to(dtype)


def images(count=5, dtype=torch.float64):
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
