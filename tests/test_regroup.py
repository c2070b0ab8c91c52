"""Regrouping trained weights, and the commutation gap: identities in float64."""

import pytest
import torch

from vitlib.errors import UsageError
from vitlib.model import ViT, commutation_gap, regroup, vit_config
from vitlib.model.regroup import regrouped

pytestmark = pytest.mark.check
FORM = {"image_size": 16, "in_chans": 1, "num_classes": 10}


def trained(name: str = "W32-12x1/4", **fields) -> ViT:
    """Weights that are not a start: every tensor random, norms and LayerScale too."""
    model = ViT(vit_config(name, **FORM, **fields)).double().eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.1
    return model


@pytest.fixture
def images():
    return torch.randn(3, 1, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("branches", [1, 2, 3, 4, 6, 12])
def test_regrouping_there_and_back_is_the_same_model_and_pairs_keep_their_order(branches, images):
    model = trained(layer_scale=0.1)
    there = regroup(model, branches)
    assert (there.config.depth, there.config.branches) == (12 // branches, branches)
    assert torch.equal(regroup(there, 1)(images), model(images))
    for pair in range(12):
        layer, branch = divmod(pair, branches)
        ours, theirs = there.layers[layer].ffn[branch], model.layers[pair].ffn[0]
        assert torch.equal(ours.f.fc1.weight, theirs.f.fc1.weight) and ours.f.fc1.weight is not theirs.f.fc1.weight
    assert regrouped(model.state_dict(), branches).keys() == there.state_dict().keys()
    again = ViT(there.config).double().eval()
    again.load_state_dict(regrouped(model.state_dict(), branches))
    assert torch.equal(again(images), there(images))


def test_two_branches_are_equation_2_of_the_two_layers(images):
    model = trained("W32-2x1/4")
    one, two = model.layers
    x = torch.cat([model.cls_token.expand(3, -1, -1), model.embed(images) + model.pos_embed], dim=1)
    x = x + one.mhsa[0](x) + two.mhsa[0](x)
    x = x + one.ffn[0](x) + two.ffn[0](x)
    assert torch.allclose(regroup(model, 2)(images), model.head(model.norm(x)[:, 0]), rtol=0, atol=1e-12)


def test_the_gap_is_what_a_function_hears_in_sequence_against_side_by_side(images):
    model = trained("W32-3x1/4")
    x, parts = torch.cat([model.cls_token.expand(3, -1, -1), model.embed(images) + model.pos_embed], dim=1), []
    for layer in model.layers:
        read = {"mhsa": x}
        x = x + layer.mhsa[0](x)
        read["ffn"] = x
        x = x + layer.ffn[0](x)
        parts.append(read)
    gaps = commutation_gap(model, images)
    for part, found in gaps.items():
        for i, gap in enumerate(found, start=1):
            r = getattr(model.layers[i], part)[0]
            there = r(parts[i - 1][part])
            assert gap == pytest.approx(((r(parts[i][part]) - there).norm() / there.norm()).item(), rel=1e-10)


def test_without_residuals_nothing_changes_and_the_gap_is_0(images):
    model = trained("W32-4x1/4", layer_scale=0.1)
    for layer in model.layers:
        layer.mhsa[0].gamma.data.zero_()
        layer.ffn[0].gamma.data.zero_()
    assert torch.equal(regroup(model, 4)(images), model(images))
    model = trained("W32-4x1/4", layer_scale=0.1)
    small = [commutation_gap(scaled(model, s), images)["ffn"].mean() for s in (1.0, 0.1, 0.01)]
    assert small[0] > small[1] > small[2]


def scaled(model: ViT, factor: float) -> ViT:
    model = regroup(model, 1)
    for layer in model.layers:
        layer.mhsa[0].gamma.data *= factor
        layer.ffn[0].gamma.data *= factor
    return model


def test_a_mode_and_an_execution_stay_and_the_model_itself_is_left_alone(images):
    model = trained("W32-2x2/4").train()
    model.layers[0].execution = "par"
    there = regroup(model, 4)
    assert there.training and there.layers[0].execution == "par" and model.config.branches == 2
    model.eval()
    before = model(images)
    commutation_gap(regroup(model, 1), images)
    assert torch.equal(model(images), before)


@pytest.mark.parametrize("branches", [0, -1, 5, 24, 2.0, "2"])
def test_pairs_that_cannot_be_shared_equally_are_refused(branches):
    with pytest.raises(UsageError, match="12 pairs cannot be regrouped"):
        regroup(ViT(vit_config("W32-12x1/4", **FORM)), branches)


def test_the_gap_of_a_parallel_model_is_refused(images):
    with pytest.raises(UsageError, match="regroup"):
        commutation_gap(trained("W32-2x2/4"), images)
