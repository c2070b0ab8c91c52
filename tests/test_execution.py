"""`par` and `fuse` are the same function as `seq`: logits, gradients, optimizer steps, stochastic depth."""

import copy

import pytest
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2

from vitlib.errors import UsageError
from vitlib.lab import measure
from vitlib.model import ViT, fuse, set_execution, vit_config

torch.set_num_threads(1)
CASES = {
    "2 branches": {"name": "W64-3x2/4"},
    "3 branches, LayerScale": {"name": "W64-2x3/4", "layer_scale": 0.3},
    "4 branches, drop-path": {"name": "W64-1x4/4", "drop_path": 0.4, "layer_scale": 0.1},
    "relative positions": {"name": "W64-2x2/4", "pos": "relative"},
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


@pytest.fixture(params=CASES)
def pair(request):
    """One model twice: processed branch after branch, and at once."""
    seq = model(**CASES[request.param])
    return seq, set_execution(copy.deepcopy(seq), "par")


def test_at_once_gives_the_logits_and_gradients_of_one_after_the_other(pair):
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
    ("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-4), (torch.bfloat16, 0.25)]
)
@pytest.mark.parametrize("case", CASES)
def test_a_fused_model_gives_the_same_logits(case, dtype, tolerance):
    vit = model(dtype=dtype, **CASES[case]).eval()
    with torch.no_grad():
        expected, found = vit(images(dtype=dtype)), fuse(vit)(images(dtype=dtype))
    scale = expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * scale)


def test_a_fused_model_is_a_vit_with_wider_layers_and_leaves_the_original_as_it_is():
    vit = model("W64-3x2/4", dtype=torch.float32, layer_scale=0.1).train()
    before = {name: tensor.clone() for name, tensor in vit.state_dict().items()}
    fused = fuse(vit)
    layer = fused.layers[0]
    assert (layer.mhsa.heads, layer.mhsa.qkv.weight.shape) == (4, (3 * 128, 64))
    assert layer.ffn.fc1.weight.shape == (2 * 256, 64)
    assert vit.training and all(torch.equal(before[name], tensor) for name, tensor in vit.state_dict().items())
    assert measure.macs(fused).matmul == measure.macs(vit).matmul
    with pytest.raises(UsageError, match="a fused model is for inference"):
        fused.train()(images(dtype=torch.float32))


def test_an_unknown_execution_is_refused():
    with pytest.raises(UsageError, match="unknown execution 'parallel': allowed are seq, par; did you mean 'par'"):
        set_execution(model("W64-2x2/4"), "parallel")
