"""Fine-tuning: what each strategy trains, in our models and in timm's, and how it starts."""

from dataclasses import replace

import pytest
import timm
import torch
from torch import nn
from training import small, train

from vitlib.errors import UsageError
from vitlib.model import ViT, vit_config
from vitlib.train.finetune import STRATEGIES, at_image_size, freeze, start_from, trainable
from vitlib.train.masked import MaskedViT

torch.set_num_threads(1)


def test_each_strategy_trains_exactly_its_roles_in_every_branch():
    model = ViT(small(layer_scale=0.1, stem="local"))  # whose own attention is the stem's
    shared = {"pos_embed", "head.weight", "head.bias"}

    def of(kind, parts):
        places = [f"layers.{i}.{kind}.{k}.f.{part}" for i in range(3) for k in range(2) for part in parts]
        return {f"{place}.{tensor}" for place in places for tensor in ("weight", "bias")}

    assert set(trainable(model, "attn")) == of("mhsa", ("qkv", "proj")) | shared
    assert set(trainable(model, "ffn")) == of("ffn", ("fc1", "fc2")) | shared
    assert set(trainable(model, "head")) == shared
    assert trainable(model, "full") == [name for name, _ in model.named_parameters()]
    with pytest.raises(UsageError, match="did you mean 'attn'"):
        trainable(model, "attention")


def test_the_last_layers_are_trained_whole_in_our_models_and_in_timms():
    around = {"pos_embed", "head.weight", "head.bias"}
    ours, theirs = ViT(small(layer_scale=0.1)), timm.create_model("vit_tiny_patch16_224", depth=3)
    for model, layers in ((ours, "layers"), (theirs, "blocks")):
        last_two = {n for n, _ in model.named_parameters() if n.startswith((f"{layers}.1.", f"{layers}.2."))}
        assert set(trainable(model, "last-2")) == last_two | around
        with pytest.raises(UsageError, match=r"'last-4' is for models of 4 layers and more: this .* has 3"):
            trainable(model, "last-4")


def test_attention_only_of_vit_b_at_384_trains_what_the_released_code_trains():
    counts = {"attn": 29_559_784, "ffn": 57_880_552, "full": 86_877_160}
    for strategy, count in counts.items():
        with torch.device("meta"):
            model = ViT(vit_config("B12", image_size=384, layer_scale=1e-4))
        freeze(model, strategy)
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count


def test_the_strategies_work_on_timm_models_and_train_both_parallel_branches():
    with torch.device("meta"):
        model = timm.create_model("vit_small_patch16_18x2_224")
    names = freeze(model, "attn")
    attention = sum(p.numel() for n, p in model.named_parameters() if ".attn." in n)
    assert attention == 36 * (4 * 384**2 + 4 * 384)
    assert {n for n in names if ".attns." in n} == {n for n, _ in model.named_parameters() if ".attn." in n}
    assert {n for n in names if ".attns." not in n} == {"pos_embed", "head.weight", "head.bias"}


@pytest.mark.parametrize(("name", "fresh"), [
    ("vit_tiny_patch16_224", {"head", "pos_embed"}),
    ("deit_tiny_distilled_patch16_224", {"head", "head_dist", "pos_embed"}),
    ("pit_ti_distilled_224", {"head", "head_dist", "pos_embed"}),
    ("naflexvit_base_patch16_gap", {"head", "embeds.pos_embed"}),
    ("mobilevit_xxs", {"head.fc"}),
])  # fmt: skip
def test_every_head_position_and_attention_of_timms_models_is_trained(name, fresh):
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=5)
    attention = {n for n, _ in model.named_parameters() if ".attn." in n}
    names = set(freeze(model, "attn"))
    assert attention and names - attention == {n for n, _ in model.named_parameters() if n.startswith(tuple(fresh))}
    assert {n for n, p in model.named_parameters() if p.requires_grad} == names == attention | names


@pytest.mark.parametrize(("name", "said"), [
    ("crossvit_tiny_240", r"CrossVit's blocks.0.fusion.0 \(CrossAttentionBlock\) would stay frozen"),
    ("vit_base_patch16_siglip_224", r"attn_pool \(AttentionPoolLatent\) would stay frozen"),
    ("csatv2", r"stages.0.0.attn \(SpatialAttention\) would stay frozen"),
    ("swin_tiny_patch4_window7_224", "has no attn layers that can be told apart: known are vitlib's MHSA and timm's"),
    ("resnet18", "ResNet has no attn layers"),
])  # fmt: skip
def test_a_model_whose_attention_is_not_known_is_refused(name, said):
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(UsageError, match=said) as error:
        freeze(model, "attn")
    assert "\n" not in str(error.value) and all(p.requires_grad for p in model.parameters())


def test_hugging_faces_layers_are_told_by_the_names_of_their_classes():
    """transformers may not be installed: classes of the same names and module, as its ViT has them."""

    def theirs(name: str, **parts: nn.Module) -> nn.Module:
        kind = type(name, (nn.Module,), {"__module__": "transformers.models.vit.modeling_vit"})
        module = kind()
        for part, inner in parts.items():
            setattr(module, part, inner)
        return module

    def model(attention: str = "ViTAttention", mlp: str = "ViTMLP") -> nn.Module:
        layer = theirs(
            "ViTLayer", attention=theirs(attention, q_proj=nn.Linear(4, 4), o_proj=nn.Linear(4, 4)),
            layernorm_before=nn.LayerNorm(4), mlp=theirs(mlp, fc1=nn.Linear(4, 8), fc2=nn.Linear(8, 4)),
        )  # fmt: skip
        embeddings = theirs("ViTEmbeddings", position_embeddings=nn.Parameter(torch.zeros(1, 5, 4)))
        vit = theirs("ViTModel", embeddings=embeddings, layers=nn.ModuleList([layer]))
        return theirs("ViTForImageClassification", vit=vit, classifier=nn.Linear(4, 3))

    shared = {"vit.embeddings.position_embeddings", "classifier.weight", "classifier.bias"}
    for strategy, parts in {
        "attn": ("attention.q_proj", "attention.o_proj"), "ffn": ("mlp.fc1", "mlp.fc2"), "fc1": ("mlp.fc1",),
        "norm": ("layernorm_before",), "head": (),
    }.items():  # fmt: skip
        tensors = {f"vit.layers.0.{part}.{tensor}" for part in parts for tensor in ("weight", "bias")}
        assert set(freeze(model(), strategy)) == tensors | shared
    with pytest.raises(UsageError, match=r"has no attn layers.* and those of transformers that end in Attention"):
        freeze(model(attention="ViTMixer"), "attn")


def test_a_head_is_found_by_what_timm_says_and_a_model_without_one_is_refused():
    with torch.device("meta"):
        assert freeze(timm.create_model("resnet18"), "head") == ["fc.weight", "fc.bias"]
        assert freeze(timm.create_model("densenet121"), "head") == ["classifier.weight", "classifier.bias"]
    for model in (nn.Sequential(nn.Linear(2, 2)), ViT(replace(small(), num_classes=0)), MaskedViT(small(), 4)):
        with pytest.raises(UsageError, match=f"{type(model).__name__} has no head that could be trained"):
            freeze(model, "head")


def test_a_wrapped_model_trains_the_same_parameters_and_one_in_ddp_is_refused(monkeypatch):
    model = ViT(small(pos="relative", stem="local"))
    names = {strategy: trainable(model, strategy) for strategy in STRATEGIES}
    wrappers = {"_orig_mod.": torch.compile, "module.": nn.DataParallel}
    wrappers["_orig_mod.module."] = lambda model: torch.compile(nn.DataParallel(model))
    for strategy in STRATEGIES:
        for prefix, wrap in wrappers.items():
            assert freeze(wrap(model), strategy) == [prefix + name for name in names[strategy]]
            assert [n for n, p in model.named_parameters() if p.requires_grad] == names[strategy]
    inside = ViT(small())
    inside.layers[1] = torch.compile(inside.layers[1])
    assert len(freeze(inside, "attn")) == len(trainable(ViT(small()), "attn"))
    monkeypatch.setattr(nn.parallel.DistributedDataParallel, "__init__", lambda self: nn.Module.__init__(self))
    with pytest.raises(UsageError, match="before DistributedDataParallel"):
        freeze(nn.parallel.DistributedDataParallel(), "attn")


def test_frozen_tensors_stay_and_trained_ones_move(images):
    config = small(layer_scale=0.1, stem="hmlp")
    trunk, _ = train(config, images, rows=100)
    before = {k: v.clone() for k, v in trunk.state_dict().items()}
    for strategy in ("attn", "ffn", "head", "fc1", "norm", "bias"):
        model = start_from(before, config, 1000)
        kept = set(freeze(model, strategy))
        train(config, images, rows=100, model=model)
        moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
        # also: frozen batch norm keeps its running statistics
        assert {k for k in moved if "running" not in k and "num_batches" not in k} == kept
        assert kept == moved or strategy in ("norm", "bias")  # these train the stem's batch norm


def test_a_trunk_starts_at_a_new_resolution_with_resized_positions(images):
    trunk = ViT(small(), seed=3)
    larger = at_image_size(trunk.config, 20)
    model = start_from(trunk.state_dict(), larger, seed=4)
    assert model.pos_embed.shape == (1, 25, 32)
    assert torch.equal(model.layers[2].ffn[1].f.fc2.weight, trunk.layers[2].ffn[1].f.fc2.weight)
    assert torch.equal(model.head.weight, trunk.head.weight)
    other = start_from(trunk.state_dict(), replace(larger, num_classes=4), seed=4)
    assert torch.equal(other.head.weight, ViT(replace(larger, num_classes=4), 4).head.weight)
    fresh = start_from(trunk.state_dict(), larger, seed=4, new_head=True)
    assert torch.equal(fresh.head.weight, ViT(larger, 4).head.weight)
    assert torch.equal(fresh.head.bias, ViT(larger, 4).head.bias)
    assert not torch.equal(fresh.head.weight, trunk.head.weight)
    assert torch.equal(fresh.pos_embed, model.pos_embed)
    with pytest.raises(UsageError, match="nearest allowed are 20 and 24"):
        at_image_size(trunk.config, 22)


def test_a_trunk_of_another_shape_is_refused_with_the_keys_that_differ():
    trunk = ViT(small()).state_dict()
    with pytest.raises(ValueError, match=r"layers\.0\.ffn\.1\.f\.fc1\.bias.*nothing was loaded"):
        start_from(trunk, vit_config("W32-6x1/4", image_size=16, in_chans=1, num_classes=10), 0)


def test_a_backbone_without_classes_starts_a_model_without_a_head():
    config = vit_config("W32-1x1/4", image_size=8, num_classes=0)
    weights = ViT(config, 1).state_dict()
    assert all(torch.equal(t, weights[name]) for name, t in start_from(weights, config, seed=0).state_dict().items())


def test_first_matrices_norms_and_biases_are_picked_by_their_role_in_our_models_and_timms():
    ours = ViT(small(stem="hmlp", layer_scale=0.1))
    with torch.device("meta"):
        theirs = timm.create_model("vit_tiny_patch16_224", num_classes=5)
    for model, first in ((ours, ".f.fc1."), (theirs, ".mlp.fc1.")):
        names = {n for n, _ in model.named_parameters()}
        fresh = {n for n in names if n.startswith("head.") or n == "pos_embed"}
        assert {*trainable(model, "fc1")} == {n for n in names if first in n} | fresh
        assert {*trainable(model, "bias")} == {n for n in names if n.endswith("bias")} | fresh
        norms = {f"{n}." for n, m in model.named_modules() if "Norm" in type(m).__name__}
        assert (
            len(norms) > 1 and {*trainable(model, "norm")} == {n for n in names if n.startswith(tuple(norms))} | fresh
        )


def test_weights_that_no_optimizer_trains_are_refused():
    parts = {"attn": "mhsa.0.f.proj", "ffn": "ffn.1.f.fc2", "last-1": "ffn.1.f.fc2", "bias": "ffn.1.f.fc2"}
    for strategy, part in parts.items():
        model = ViT(small())
        model.layers[2].set_submodule(part, torch.ao.nn.quantized.dynamic.Linear(32, 32))
        assert freeze(model, "attn" if strategy != "attn" else "ffn")  # the others are as they were
        with pytest.raises(UsageError, match=r"a quantized layer \(.*\) cannot be trained"):
            freeze(model, strategy)
    model.layers[0].mhsa[0].f.qkv.weight = nn.Parameter(torch.zeros(96, 32, dtype=torch.int8), requires_grad=False)
    with pytest.raises(UsageError, match=r"layers\.0\.mhsa\.0\.f\.qkv\.weight is int8, which cannot be trained"):
        freeze(model, "attn")


def test_layers_in_two_lists_have_no_last_one_and_those_without_fc1_no_first_matrix():
    with torch.device("meta"):
        cait = timm.create_model("cait_xxs24_224")
    with pytest.raises(UsageError, match="this Cait has 24 in blocks and 2 in blocks_token_only; known is one list"):
        freeze(cait, "last-1")
    kind = type("GatedMLP", (nn.Module,), {"__module__": "transformers.models.vit.modeling_vit"})
    model = nn.Module()
    model.mlp, model.classifier = kind(), nn.Linear(4, 2)
    model.mlp.gate_proj = nn.Linear(4, 4)
    assert freeze(model, "ffn") == [
        "mlp.gate_proj.weight",
        "mlp.gate_proj.bias",
        "classifier.weight",
        "classifier.bias",
    ]
    with pytest.raises(UsageError, match="Module has a GatedMLP without fc1: allowed are those that have one"):
        freeze(model, "fc1")
