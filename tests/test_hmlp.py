"""Algorithm 1 for signals, images and volumes, its transposed decoder, and what a stem leaks."""

import math

import pytest
import torch
from torch import nn

from vitlib.errors import UsageError
from vitlib.model import HMLP, HMLPDecoder, HMLPStem, ViT, leakage, make_stem, vit_config
from vitlib.model.stems import leak_map

torch.set_num_threads(1)
SIZES = {1: (24,), 2: (24, 36), 3: (12, 24, 36)}  # in pixels; patches of 12 and 6 divide them
CASES = [(dims, patch) for dims in SIZES for patch in (12, 6)]  # kernels (3, 2, 2) and (3, 1, 2)


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def built(part: type, **fields: object) -> nn.Module:
    torch.manual_seed(0)
    return part(HMLP(**fields)).double()


def patches_of(x: torch.Tensor, patch: int) -> torch.Tensor:
    """(B, C, *sizes) -> (B, N, C, patch, ...), row by row."""
    dims = x.ndim - 2
    for axis in range(2, 2 + dims):  # the window of each axis goes to the end
        x = x.unfold(axis, patch, patch)
    return x.flatten(2, 1 + dims).transpose(1, 2)


@pytest.mark.parametrize(("dims", "patch"), CASES)
def test_the_stem_is_algorithm_1_on_each_patch_by_itself_in_row_major_order(dims, patch):
    stem, x = built(HMLPStem, patch_size=patch, width=32, in_chans=2, dims=dims, norm="ln"), noise(2, 2, *SIZES[dims])
    alone = patches_of(x, patch).flatten(0, 1)  # (B N, C, patch, ...): each patch is an image of its own
    by_hand, parts = alone, [*stem, nn.Identity()]  # convolution, norm, GELU; no GELU at the end
    for convolution, norm, act in zip(parts[0::3], parts[1::3], parts[2::3], strict=True):
        k = convolution.kernel_size[0]
        cut = patches_of(by_hand, k).flatten(2) @ convolution.weight.flatten(1).T + convolution.bias
        cut = act(nn.functional.layer_norm(cut, cut.shape[-1:], norm.weight, norm.bias, norm.eps))
        by_hand = cut.transpose(1, 2).unflatten(2, [size // k for size in by_hand.shape[2:]])
    expected = by_hand.flatten(1).unflatten(0, (2, -1))  # one place is left of each patch
    assert expected.shape == (2, math.prod(SIZES[dims]) // patch**dims, 32)
    torch.testing.assert_close(stem(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("norm", ["bn", "ln"])
@pytest.mark.parametrize("patch", [6, 16])
def test_in_two_dimensions_it_is_the_stem_of_a_vit_to_the_last_bit(patch, norm):
    config = vit_config(f"W64-1/{patch}", image_size=2 * patch, stem="hmlp", stem_norm=norm, num_classes=0)
    inside, alone = make_stem(config), HMLPStem(HMLP(patch, 64, norm=norm))
    alone.load_state_dict(inside.state_dict())
    images = torch.rand(3, 3, 2 * patch, 2 * patch)
    assert torch.equal(inside(images), alone(images))


@pytest.mark.parametrize(("dims", "patch"), CASES)
def test_the_decoder_gives_the_inputs_shape_and_each_patch_from_its_token_alone(dims, patch):
    fields = {"patch_size": patch, "width": 32, "in_chans": 2, "dims": dims}
    stem, decoder, x = built(HMLPStem, **fields), built(HMLPDecoder, **fields).eval(), noise(2, 2, *SIZES[dims])
    tokens = stem(x)
    back, back_changed = decoder(tokens, x.shape[2:]), tokens.clone()
    back_changed[:, 1] += 1
    moved = (decoder(back_changed, x.shape[2:]) != back).flatten(0, 1).any(0)  # (*sizes)
    assert back.shape == x.shape
    assert moved.sum() == patch**dims and patches_of(moved[None, None], patch)[0, 1].all()


@pytest.mark.parametrize("patch", [2, 6, 10, 14])
@pytest.mark.parametrize("chans", [1, 3, 4])
def test_any_even_patch_any_channels_and_images_that_are_not_square(patch, chans):
    """Two patches high, three wide: one patch's pixels reach its own token alone, and come back to its own place."""
    fields = {"patch_size": patch, "width": 32, "in_chans": chans}
    stem, decoder, images = built(HMLPStem, **fields).eval(), built(HMLPDecoder, **fields).eval(), noise(2, chans, 2 * patch, 3 * patch)  # fmt: skip
    tokens, changed = stem(images), images.clone()
    changed[..., :patch, 2 * patch :] += 1  # the upper right patch
    assert tokens.shape == (2, 6, 32)
    assert (stem(changed) != tokens).any(-1).tolist() == [[False, False, True, False, False, False]] * 2
    back, moved = decoder(tokens, images.shape[2:]), decoder(stem(changed), images.shape[2:])
    assert back.shape == images.shape
    assert patches_of((back != moved).any(1, keepdim=True), patch).flatten(2).any(-1).tolist() == [[False, False, True, False, False, False]] * 2  # fmt: skip
    assert math.prod(m.kernel_size[0] for m in stem if isinstance(m, nn.Conv2d)) == patch
    assert not leakage(stem, patch, in_chans=chans, grid=2).any()


@pytest.mark.parametrize("patch", [1, 3, 5, 7, 15])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_an_odd_patch_is_refused_in_one_sentence(patch, dims):
    with pytest.raises(UsageError, match=f"has patch_size {patch}: allowed are even ones, as its last kernel is 2x2") as error:  # fmt: skip
        HMLP(patch, 32, dims=dims)
    assert "\n" not in str(error.value)


def test_the_decoder_has_the_stems_kernels_and_widths_in_reverse():
    patches = HMLP(patch_size=16, width=64, in_chans=3, dims=2)
    forth = [m for m in HMLPStem(patches) if isinstance(m, nn.Conv2d)]
    back = [m for m in HMLPDecoder(patches) if isinstance(m, nn.ConvTranspose2d)]
    assert [m.kernel_size for m in back] == [m.stride for m in back] == [(2, 2), (2, 2), (4, 4)]
    assert [m.weight.shape for m in back] == [m.weight.shape for m in forth[::-1]]
    kinds = [type(m).__name__ for m in HMLPDecoder(patches)]
    assert kinds == [*("ConvTranspose2d", "BatchNorm2d", "GELU") * 2, "ConvTranspose2d"]


@pytest.mark.parametrize(("fields", "said"), [
    ({"patch_size": 7}, "has patch_size 7: allowed are even ones"),
    ({"patch_size": 0}, "has patch_size 0: allowed are even ones"),
    ({"width": 30}, "width 30 is no multiple of 4"),
    ({"dims": 4}, "unknown dims '4': allowed are 1, 2, 3"),
    ({"norm": "layer"}, "unknown norm 'layer': allowed are none, bn, ln"),
])  # fmt: skip
def test_what_cannot_be_is_refused_in_one_sentence(fields, said):
    with pytest.raises(UsageError, match=said):
        HMLP(**{"patch_size": 8, "width": 32} | fields)


def test_sizes_that_the_patch_does_not_divide_and_tokens_that_do_not_fit_are_refused():
    patches = HMLP(patch_size=8, width=32)
    stem, decoder = HMLPStem(patches), HMLPDecoder(patches)
    with pytest.raises(UsageError, match="sizes are 16 x 20: allowed are 2, multiples of patch_size 8"):
        stem(torch.zeros(1, 3, 16, 20))
    with pytest.raises(UsageError, match="sizes are 16: allowed are 2"):
        decoder(torch.zeros(1, 4, 32), (16,))
    with pytest.raises(UsageError, match=r"there are 4 tokens: sizes \(16, 24\) have 6 patches"):
        decoder(torch.zeros(1, 4, 32), (16, 24))


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_leakage_counts_the_neighbours_that_an_overlapping_kernel_reads(dims):
    convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](2, 8, kernel_size=6, stride=4, padding=1)
    leaks = leakage(nn.Sequential(convolution, nn.Flatten(2), Last()), 4, in_chans=2, grid=3, dims=dims)
    middle = 3**dims // 2
    assert leaks.sum(1)[middle] == 3**dims - 1 and torch.equal(leaks, leaks.T) and not leaks.diagonal().any()
    assert not leakage(HMLPStem(HMLP(4, 8, in_chans=2, dims=dims)), 4, in_chans=2, grid=3, dims=dims).any()


class Last(nn.Module):
    """(B, D, N) -> (B, N, D)."""

    def forward(self, x):
        return x.transpose(1, 2)


def test_the_leak_map_is_the_tokens_change_over_their_mean_length():
    stem = nn.Sequential(nn.Conv2d(1, 4, 2, 2, bias=False), nn.Flatten(2), Last()).double()
    images, others = noise(3, 1, 4, 4), torch.zeros(3, 1, 4, 4, dtype=torch.float64)
    mask = torch.tensor([[True, False], [False, False]])
    length = stem(images).detach().norm(dim=-1)
    expected = torch.tensor([length[:, 0].mean() / length.mean(), 0, 0, 0], dtype=torch.float64)
    torch.testing.assert_close(leak_map(stem, images, others, mask, 2), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("stem", ["hmlp", "conv"])
def test_one_image_has_the_gradients_of_the_same_image_twice(stem, training):
    """Batch statistics and the mean loss are the same of both."""
    model = ViT(vit_config("W32-2/8", image_size=32, in_chans=1, num_classes=10, stem=stem), seed=0)
    model.double().train(training)
    image = torch.randn(1, 1, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def gradients(count: int) -> tuple[torch.Tensor, ...]:
        loss = nn.functional.cross_entropy(model(image.expand(count, -1, -1, -1)), torch.full((count,), 3))
        return torch.autograd.grad(loss, [*model.parameters()])

    for one, two in zip(gradients(1), gradients(2), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-12)
