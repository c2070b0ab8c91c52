"""What trained models look at: attention against eq. (1) by hand, filters against gradients, predictions against tokens."""

import numpy as np
import pytest
import torch

from lab.experiments.catalogue import Experiment, Runs, notebook
from lab.experiments.profiles import Arm, profile
from lab.report import looks
from lab.runs import execute, store
from lab.runs.spec import RunSpec
from vitlib.errors import UsageError
from vitlib.model import ViT, make_stem, vit_config
from vitlib.train.dvae import DVAEConfig
from vitlib.train.recipe import Recipe
from vitlib.train.tokenizers import PatchTokens, patchify

RECIPE = Recipe(epochs=1, batch_size=50, lr=1e-2)


@pytest.fixture(autouse=True)
def run_store(monkeypatch, tmp_path):
    monkeypatch.setenv("VITLIB_RUNS", str(tmp_path / "runs"))


def runs_of(number: str, *arms: Arm) -> Runs:
    return Runs(Experiment(notebook(number), profile("smoke"), {arm.label: arm for arm in arms}), {})


def test_the_class_tokens_attention_is_the_mean_of_the_heads_softmax_and_sums_to_1():
    model = ViT(vit_config("W64-3/4", image_size=16, in_chans=1, num_classes=10, layer_scale=1e-1), seed=3).eval()
    images = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    found = looks.class_attention(model, images)
    assert found.shape == (3, 2, 17) and torch.allclose(found.sum(-1), torch.ones(3, 2))
    with torch.no_grad():
        x = model.tokens(model.embed(images))
        for layer, row in zip(model.layers, found, strict=True):
            residual = layer.mhsa[0]
            q, k, _ = residual.f.qkv(residual.norm(x)).unflatten(-1, (3, 2, 32)).permute(2, 0, 3, 1, 4)  # (B, 2, N, 32)
            assert torch.allclose(row, (q @ k.mT / 32**0.5).softmax(-1)[:, :, 0].mean(1), atol=1e-6)
            x = layer(x)


def test_a_linear_stem_answers_with_its_kernels_and_only_the_convolutional_one_to_other_patches():
    for name in ("linear", "hmlp", "conv"):
        stem = make_stem(vit_config("W32-2/8", image_size=32, in_chans=3, stem=name, stem_norm=None)).eval()
        found = looks.responses(stem, 8, 3)
        assert found.shape == (32, 3, 24, 24)
        inside = found[..., 8:16, 8:16].clone()
        found[..., 8:16, 8:16] = 0
        assert inside.abs().amax((1, 2, 3)).min() > 0 and (found.abs().max() > 0) == (name == "conv")
        if name == "linear":
            assert torch.allclose(inside, stem[0].weight)


def test_the_strongest_filters_come_first_at_a_scale_of_their_own_where_grey_is_0():
    filters = torch.arange(1.0, 13.0)[:, None, None, None] * torch.tensor([[1.0, 0.0], [-0.5, -1.0]])
    drawn = looks.strongest(filters[torch.randperm(12, generator=torch.Generator().manual_seed(0))])
    assert drawn.shape == (looks.FILTERS, 2, 2, 1)
    assert np.allclose(drawn[..., 0], [[1, 0.5], [0.25, 0]])
    first = looks.strongest(torch.cat([0.1 * torch.eye(2).expand(9, 1, 2, 2), torch.ones(1, 1, 2, 2)]))
    assert np.array_equal(first[0, ..., 0], np.ones((2, 2))) and first[1, 0, 1, 0] == 0.5


class Flat(torch.nn.Linear):
    """A stem without convolutions."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return super().forward(torch.nn.functional.unfold(images, 8, stride=8).mT)


def test_of_a_stem_without_convolutions_the_whole_stem_is_drawn_alone(monkeypatch):
    config = vit_config("W32-1/8", image_size=32, in_chans=1, num_classes=10)
    models = [ViT(config), ViT(config)]
    models[0].stem = Flat(64, 32)
    spec = RunSpec("supervised", config, "fashion-mnist", RECIPE)
    monkeypatch.setattr(looks, "here", lambda *_: {"flat": spec, "linear": spec})
    monkeypatch.setattr(execute, "trained_model", lambda _: models.pop(0))
    figure, _ = looks.filters(Runs(None, {}))
    rows = np.reshape(figure.axes, (3, looks.FILTERS))
    assert [panel.get_ylabel() for panel in rows[:, 0]] == [
        "flat\nwhole stem",
        "linear\n8x8 kernels",
        "linear\nwhole stem",
    ]
    assert [[len(panel.patches) for panel in row] for row in rows] == [8 * [1], 8 * [0], 8 * [1]]


def test_tokens_of_k_means_are_drawn_as_their_prototypes(images):
    targets = PatchTokens(images.take(np.arange(40)), 4, seed=0, vocabulary=12)
    tokens = targets.tokens[0, :5]
    assert torch.equal(patchify(targets.decode(tokens), 4), targets.prototypes[tokens])


def masked_arm() -> Arm:
    model = vit_config("W32-2/4", image_size=16, in_chans=1, num_classes=10, stem="hmlp", pool="mean")
    sizes = {"data": "fashion-mnist", "recipe": RECIPE, "seed": 1000, "images": 100}
    tokenizer = RunSpec("tokenizer", DVAEConfig(16, 4, 1, vocabulary=32, width=8), **sizes)
    parent = RunSpec("masked", model, targets="dvae", tokenizer=tokenizer, masked=6, **sizes)
    return Arm("hmlp pretrained", RunSpec("finetune", model, parent=parent, **sizes), "hmlp", "pretrained")


def test_predictions_fill_the_mask_alone_and_a_perfect_one_with_the_picture_of_the_true_tokens(monkeypatch):
    arm = masked_arm()
    runs = runs_of("52", arm)
    with pytest.raises(UsageError, match="no predictor of 'pretrained' runs"):
        looks.predictions(runs)
    for spec in arm.spec.parent.family():
        execute.execute(spec)
    kept = store.weights(arm.spec.parent, "predictor")
    assert {name: tuple(t.shape) for name, t in kept.items()} == {
        "mask_token": (32,), "predictor.weight": (32, 32), "predictor.bias": (32,)
    }  # fmt: skip
    assert not any("predictor" in name or "mask" in name for name in store.weights(arm.spec.parent))

    def drawn() -> np.ndarray:
        figure, caption = looks.predictions(runs)
        assert "Eight validation images at 16 pixels" in caption and "after 2 steps" in caption
        return np.array([panel.images[0].get_array() for panel in figure.axes]).reshape(4, 8, 16, 16)

    image, hidden, true, guess = drawn()
    under = np.isclose(hidden, looks.GREY) & ~np.isclose(image, looks.GREY)
    assert 6 * 16 * 8 >= under.sum() > 6 * 16 * 7
    assert np.array_equal(np.where(under, 0, guess), np.where(under, 0, image)) and not np.allclose(guess, true)
    data, _ = looks.examples(arm.spec.parent, 8)
    truth = looks.coder(arm.spec.parent, data)[0](data.pixels())

    def perfect(spec):
        return lambda images, mask: torch.nn.functional.one_hot(truth[mask], 32).float()

    monkeypatch.setattr(looks, "pretrained", perfect)
    assert np.array_equal(drawn()[3], true)


def test_attention_is_drawn_before_and_after_tuning_and_a_page_without_weights_says_why_not(monkeypatch):
    from lab.report import notebook as pages

    sizes = {"data": "fashion-mnist", "recipe": RECIPE, "seed": 1000, "images": 100}
    small, larger = (
        vit_config("W32-4/4", image_size=side, in_chans=1, num_classes=10, layer_scale=0.1) for side in (16, 20)
    )
    trunk = RunSpec("supervised", small, **sizes)
    runs = runs_of("41", Arm("attn", RunSpec("finetune", larger, parent=trunk, strategy="attn", **sizes), "", "attn"))
    shown = []
    monkeypatch.setattr(pages, "display", lambda what: shown.append(what.data))
    page = pages.Page(notebook("41"), profile("smoke"))
    page.look(looks.attention, runs)
    assert len(shown) == 1 and shown[0].startswith("Not drawn: no weights of 'attn' runs")
    for spec in runs.experiment.arms["attn"].spec.family():
        execute.execute(spec)
    figure, caption = looks.attention(runs)
    titles = [panel.get_title() for panel in figure.axes[:5]]
    assert titles == ["image", *(f"layer {i}, {when}" for i in (2, 4) for when in ("before", "after"))]
    assert [panel.images[0].get_array().shape[:2] for panel in figure.axes[:5]] == [(20, 20)] + 4 * [(5, 5)]
    before, after = (figure.axes[i].images[0].get_array() for i in (3, 4))
    assert not np.allclose(before, after) and "in layers 2 and 4" in caption
