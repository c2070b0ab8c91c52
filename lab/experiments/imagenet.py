"""The paper's experiments at the paper's scale: its own models, protocols and data, with where each value comes from.

The letter beside a value: A the paper, B its released code (facebookresearch/deit), D BEiT (microsoft/unilm), E procedure A2
(mmpretrain's resnet50_8xb256-rsb-a2-300e_in1k and a published timm command). "Proxy": the paper states nothing, and the value
is a neighbour's. The functions are named as in `small.py`, and arms that claims name have the same labels. What a GPU is told
to do (bf16, compiled, one branch after the other, so many images at once) is fixed here, the same for every arm. Nothing of
this was run: `python -m lab plan --profile imagenet --device h100` says the hours; the top-1 below are the paper's.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import replace

from lab.data.cards import source
from lab.experiments.profiles import LAYER_SCALE, Arm, Profile
from lab.experiments.small import STEM_ARMS, stem_pairs
from lab.runs.spec import RunSpec
from vitlib.data.augment import Augment
from vitlib.model import ViTConfig, vit_config
from vitlib.train.dvae import DVAEConfig
from vitlib.train.finetune import PAPER_STRATEGIES, at_image_size
from vitlib.train.recipe import Recipe

LETTERS = {192: "Ti", 384: "S", 768: "B", 1024: "L"}
SHORT, LONG = 300, 400  # Paper: epochs without LayerScale, and of the models with it that are tuned further
# Images that go through the model at once, by image size: what fits one GPU of 80 GB for every arm (ViT-L at 384 pixels has
# room for 130), so that in all arms of a comparison a part of a batch, and with it batch norm's statistics, is of as many
# images. Released code: 256 per GPU by procedure A2, 128 by BEiT; SyncBatchNorm takes the statistics of all GPUs together.
AT_ONCE = {112: 512, 224: 256, 384: 128}

# Stochastic depth, of the model's configuration. A: by width, at 12 pairs for Ti, S and B and 24 for L; it states no
# rate for deeper models. B: the same rate in every layer.
DROP_PATH = {"Ti": 0.0, "S": 0.05, "B": 0.1, "L": 0.4}
PEAK_LR = {"Ti": 4e-3, "S": 4e-3, "B": 3e-3, "L": 3e-3}  # A; procedure A2 has 5e-3 (E)
RAND_AUGMENT_7 = Augment(  # E: 2 operations, magnitude 7, standard deviation 0.5, increasing; no jitter, no erasing;
    policy="rand-m7-mstd0.5-inc1", crop_scale=(0.08, 1.0), color_jitter=0.0, erasing=0.0,
    test_crop=0.95, interpolation="bicubic",  # resize to 236, crop 224
)  # fmt: skip


def supervised_recipe(width: str, epochs: int = SHORT) -> Recipe:
    """Tables 1 to 3 and 7 (left), Figures 1 to 3: procedure A2 with the paper's changes, by width.

    A: 300 epochs without LayerScale, 400 with. Stochastic depth is the model's: `DROP_PATH`.
    """
    return Recipe(
        epochs=epochs, lr=PEAK_LR[width],  # A
        loss="bce",  # A: targets above 0 count as 1, engine.py of B
        batch_size=2048, optimizer="lamb", weight_decay=0.02, betas=(0.9, 0.999), min_lr=1e-6,  # E: 8 x 256; LAMB's defaults
        warmup=5 / epochs,  # E: 5 epochs
        # E: its config clips nothing. LAMB itself, timm's and mmpretrain's, divides by the norm of all gradients where
        # that is above 1 (`max_grad_norm`); so does ours.
        clip=None,
        flip=True, mixup=0.1, cutmix=1.0, augment=RAND_AUGMENT_7, ema=None,  # E: mixup and cutmix half of the time each
        smoothing=0.0,  # E; with any, targets above 0 would be all classes
        repeats=3,  # E: RepeatAugSampler; B: RASampler, 3
    )  # fmt: skip


def run_of(p: Profile, protocol: str, model: ViTConfig | DVAEConfig, recipe: Recipe, data: str = "", **more) -> RunSpec:
    classifier = protocol != "tokenizer"  # whose loss calls parts of the model, which are not what is compiled
    return RunSpec(
        protocol, model, data or p.data, recipe, execution="seq", device=p.device,
        precision="bf16", streamed=True, compile=classifier, accumulate=recipe.batch_size // AT_ONCE[model.image_size], **more,
    )  # fmt: skip


def _supervised(
    p: Profile, letter: str, depth: int, branches: int = 1, scale: float | None = None, epochs: int = SHORT
) -> RunSpec:
    model = vit_config(f"{letter}{depth}x{branches}", layer_scale=scale, drop_path=DROP_PATH[letter])
    return run_of(p, "supervised", model, supervised_recipe(letter, epochs))


def _trunk(p: Profile, letter: str) -> RunSpec:
    """Paper: Table 5 starts from the models of 400 epochs with LayerScale. Of Table 6 it says only ImageNet-1k."""
    return _supervised(p, letter, 24 if letter == "L" else 12, scale=LAYER_SCALE, epochs=LONG)


# B and D say jitter 0.4 or 0.3 beside RandAugment. timm's transforms leave jitter out where a policy is set
# (transforms_factory.py, `force_color_jitter`), so there it does nothing; it is recorded as it is said.
RAND_AUGMENT_9 = Augment(policy="rand-m9-mstd0.5-inc1", color_jitter=0.4, erasing=0.25, test_crop=0.875)
# Table 8, row DeiT, which the paper cites and did not train: 72.2, 79.8 and 81.8 for Ti, S and B. B: main.py's
# defaults; batch 1024 from README_deit.md (4 x 256).
DEIT = Recipe(
    epochs=300, batch_size=1024,
    lr=1e-3,  # 5e-4 x 1024 / 512
    optimizer="adamw", weight_decay=0.05, betas=(0.9, 0.999), min_lr=1e-5,
    warmup=5 / 300,  # 5 epochs of 1,252 steps: 6,260 of 375,600
    clip=None,
    loss="cross_entropy", mixup=0.8, cutmix=1.0, smoothing=0.1, augment=RAND_AUGMENT_9, repeats=3,
    ema=0.99996,  # B evaluates the raw weights all the same
)  # fmt: skip
DEIT_DROP_PATH = 0.1  # B: main.py's default, for every width


def baselines(p: Profile) -> list[Arm]:
    """Tables 1 and 8: this recipe and DeiT's, both trained here. Paper: Ti 72.7, S 79.7, B 82.2; DeiT 72.2, 79.8, 81.8."""
    sizes = {"Ti": 12, "S": 12, "B": 12, "L": 24}
    specs = {f"{w}{n}": _supervised(p, w, n) for w, n in sizes.items()}
    specs |= {f"{w}{n}+LS": _supervised(p, w, n, scale=LAYER_SCALE, epochs=LONG) for w, n in sizes.items()}
    deit = {w: vit_config(f"{w}12", drop_path=DEIT_DROP_PATH) for w in ("Ti", "S", "B")}
    specs |= {f"{w}12 DeiT": run_of(p, "supervised", model, DEIT) for w, model in deit.items()}
    rows = {label: label.removesuffix("+LS").removesuffix(" DeiT") for label in specs}
    return [Arm(label, spec, rows[label], label.removeprefix(rows[label]).strip()) for label, spec in specs.items()]


def _forms(p: Profile, forms: Iterable[tuple[str, int, int, float | None]]) -> list[Arm]:
    """(letter, pairs, branches, LayerScale) of each arm; the labels of ViT-B have no letter."""
    return [
        Arm(
            f"{'' if w == 'B' else w}{n // k}x{k}{'+LS' if scale else ''}", _supervised(p, w, n // k, k, scale),
            f"{w}{n}", f"{k}{'+LS' if scale else ''}",
        )
        for w, n, k, scale in forms
    ]  # fmt: skip


def branches(p: Profile) -> list[Arm]:
    """Figure 1: ViT-B36, and S36 and S60. Paper (chart): 82.9, 83.4, 82.6, 82.4."""
    forms = [("B", 36, k, None) for k in (1, 2, 3, 4)] + [("B", 36, k, LAYER_SCALE) for k in (1, 2)]
    forms += [("B", 12, 1, LAYER_SCALE)]  # the control
    return _forms(p, forms + [("S", n, k, None) for n in (36, 60) for k in (1, 2, 3, 4)])


def widths(p: Profile) -> list[Arm]:
    """Figure 2: 24 pairs; at L with LayerScale, as there. Paper, two branches minus one: -0.6, -0.5, 0.0 at Ti, S, B."""
    scale = {1024: LAYER_SCALE}
    return [
        Arm(f"W{width} {24 // k}x{k}", _supervised(p, letter, 24 // k, k, scale.get(width)), f"W{width}", str(k))
        for width, letter in LETTERS.items() for k in (1, 2)
    ]  # fmt: skip


def pairs(p: Profile) -> list[Arm]:
    """Figure 3: ViT-B, and S24 and S48. Paper, ViT-B: -1.2, -0.2, +0.5 at 12, 24, 36 pairs."""
    sizes = (("B", 12), ("B", 24), ("B", 36), ("S", 24), ("S", 48))
    return _forms(p, [(w, n, k, None) for w, n in sizes for k in (1, 2)])


def layer_scale(p: Profile) -> list[Arm]:
    """Table 2: 36 pairs, with LayerScale and without, 300 and 400 epochs. Paper: 82.9 and 83.3 without, 83.9 and 83.8 with."""
    return [
        Arm(f"{row}{word}", _supervised(p, "B", 36 // k, k, scale, epochs), row, word.strip())
        for k in (1, 2) for scale in (None, LAYER_SCALE) for row in [f"{36 // k}x{k}{'+LS' if scale else ''}"]
        for word, epochs in (("", SHORT), (" longer", LONG))
    ]  # fmt: skip


def depth_or_width(p: Profile) -> list[Arm]:
    """Table 3. Of like cost within 5 % are S48 and B12; B36 has 15 % fewer multiply-adds than L24.

    Paper: B12 82.2, S48x1 82.3, S24x2 82.6; L24 83.4, B36x1 83.9, B18x2 83.8.
    """
    plain, scaled = [("B", 12, 1), ("S", 48, 1), ("S", 24, 2)], [("L", 24, 1), ("B", 36, 1), ("B", 18, 2)]
    return [
        Arm(f"{w}{n}x{k}{'+LS' if scale else ''}", _supervised(p, w, n, k, scale), w, f"{n}x{k}")
        for forms, scale in ((plain, None), (scaled, LAYER_SCALE)) for w, n, k in forms
    ]  # fmt: skip


# Table 5, 224 -> 384. A: it starts from the models of 400 epochs with LayerScale, and nothing else is stated. Proxy:
# DeiT III's command for 384 (B, README_revenge.md). Its --min-lr is main.py's default 1e-5, the peak itself: after the
# warm-up the rate is constant. Cross entropy: a smoothing of 0.1 and no --bce-loss.
RESOLUTION_ADAMW = Recipe(
    epochs=20, batch_size=512, lr=1e-5, optimizer="adamw", weight_decay=0.1, betas=(0.9, 0.999), min_lr=1e-5,
    warmup=5 / 20,  # 5 epochs of 2,503 steps: 12,515 of 50,060
    clip=None,
    loss="cross_entropy", mixup=0.8, cutmix=1.0, smoothing=0.1,
    augment=Augment(policy="rand-m9-mstd0.5-inc1", color_jitter=0.3, erasing=0.0, test_crop=1.0), repeats=1,
)  # fmt: skip
RESOLUTION_DROP_PATH = {"S": 0.0, "B": 0.15, "L": 0.4}  # proxy: the same commands; Table 5 has no Ti
# Table 5 with SGD, of which A states the name alone; B has no such command. Proxy for rate and decay: what the paper's
# first author gives for SGD fine-tuning of DeiT (facebookresearch/deit issue 45: 0.01, 1e-4, at batch 768); everything
# else as with AdamW, so that the columns differ in the optimizer. THE RATE MUST BE TUNED before the column means
# anything: google-research/vision_transformer fine-tunes at 384 with 0.03 (batch 512, gradient norm 1). BCE's mean over
# classes would make every gradient, and so SGD's rate, a thousand times smaller, which LAMB and AdamW do not feel:
# cross entropy.
RESOLUTION_SGD = replace(RESOLUTION_ADAMW, lr=1e-2, optimizer="sgd", weight_decay=1e-4)


def resolution(p: Profile) -> list[Arm]:
    """Table 5: ViT-B with AdamW under the labels that claims name; S and L, and SGD, under longer ones.

    Paper, ViT-B with AdamW: full 84.3, attn 84.3, ffn 84.1.
    """
    arms = [Arm("trunk", _trunk(p, "B"), "", "trunk")]
    for letter, name in (("B", ""), ("S", "S"), ("L", "L")):
        trunk = _trunk(p, letter)
        model = at_image_size(replace(trunk.model, drop_path=RESOLUTION_DROP_PATH[letter]), p.finetune_size)
        for optimizer, recipe in (("", RESOLUTION_ADAMW), ("SGD", RESOLUTION_SGD)):
            for strategy in PAPER_STRATEGIES:
                spec = run_of(p, "finetune", model, recipe, parent=trunk, strategy=strategy)
                label, row = f"{name} {strategy} {optimizer}".strip(), f"{name} {optimizer}".strip()
                arms.append(Arm(label, spec, row, strategy))
    full = arms[1].spec  # ViT-B with AdamW
    fewer = replace(full, images=p.control_images)
    return [*arms, Arm("full, fewer steps", fewer, "", "full, fewer steps")]


# Table 6: no hyper-parameter, resolution or length is stated (A). Proxy: what the first author gives for DeiT, the
# model that the paper's is compared with. Both at 224 pixels, and what they do not name as for training on ImageNet, in
# `DEIT`. facebookresearch/deit issue 45, for CIFAR-10 and Cars (we take it for CIFAR-100 and Flowers too): SGD, no
# erasing. Whether 0.01 is meant before scaling by batch / 512 is not said; here it is the peak.
_SMALL_SETS = replace(
    DEIT, epochs=1000, batch_size=768, lr=1e-2, optimizer="sgd", weight_decay=1e-4, warmup=5 / 1000, ema=None,
    augment=replace(RAND_AUGMENT_9, erasing=0.0),
)  # fmt: skip
# facebookresearch/deit issues 105 and 141, for ViT-B: 7.5e-5 is the rate after scaling, erasing 0.1.
_INATURALIST = replace(
    DEIT, epochs=360, batch_size=768, lr=7.5e-5, warmup=5 / 360, ema=None, augment=replace(RAND_AUGMENT_9, erasing=0.1)
)
# Data set -> recipe and stochastic-depth rate. One rate for `full`, `attn` and `ffn`, tuned for none of them.
TRANSFER = {
    "inaturalist-2018": (_INATURALIST, 0.1), "inaturalist-2019": (_INATURALIST, 0.1), "cifar-10": (_SMALL_SETS, 0.0),
    "cifar-100": (_SMALL_SETS, 0.0), "stanford-cars": (_SMALL_SETS, 0.0), "flowers-102": (_SMALL_SETS, 0.0),
}  # fmt: skip


def transfer(p: Profile) -> list[Arm]:
    """Table 6: six data sets, three widths, all labels. Paper, ViT-S on Cars: full 89.7, attn 89.8."""
    arms = []
    for width, (data, (images,)) in itertools.product(p.transfer_widths, p.transfer_images.items()):
        trunk, (recipe, drop_path), row = _trunk(p, LETTERS[width]), TRANSFER[data], f"W{width} {data} {images}"
        model = replace(trunk.model, num_classes=source(data, streamed=True).facts.num_classes, drop_path=drop_path)
        for strategy in PAPER_STRATEGIES:
            spec = run_of(p, "finetune", model, recipe, data, parent=trunk, strategy=strategy)
            arms.append(Arm(f"{row} {strategy}", spec, row, strategy))
    return arms


# Table 7 (right). A: BEiT's code and procedure, 300 epochs, the tokenizer trained on ImageNet-1k, the mask after the stem.
BEIT_PRETRAINING = Recipe(
    epochs=300,  # A, and D's default; D's README has 800
    batch_size=2048, lr=1.5e-3, optimizer="adamw",  # D: 16 x 128; its epsilon 1e-8 is torch's
    weight_decay=0.05, betas=(0.9, 0.98), min_lr=1e-5, clip=3.0,  # D
    warmup=10 / 300,  # D: 10 epochs, 6,260 of 187,800 steps
    # D: flip, random resized crop, the same crop at 112 pixels (Lanczos) for the tokenizer. Released code: jitter 0.4
    # before them, though not in every stored version of datasets.py.
    augment=Augment(color_jitter=0.4, view_size=112),
)  # fmt: skip
BEIT_MASKED = 75  # D: of 196 patches, block-wise; `RunSpec.masked`
BEIT_FINE_TUNING = Recipe(
    epochs=100,  # A
    batch_size=1024, lr=4e-3, optimizer="adamw", weight_decay=0.05, betas=(0.9, 0.999), min_lr=1e-6,  # D: 8 x 128
    warmup=20 / 100,  # D: 20 epochs, 25,040 of 125,200 steps
    clip=None, loss="cross_entropy", mixup=0.8, cutmix=1.0, smoothing=0.1, repeats=1,  # D; clip: the script's default
    layer_decay=0.65,  # D: of 12 layers; other depths by `loop.layer_decay`
    augment=RAND_AUGMENT_9,  # D: m9, jitter 0.4, erasing 0.25, test crop 224 / 256
)  # fmt: skip
# The model in both phases, for `vit_config("B12", **BEIT_MODEL)`.
BEIT_MODEL: dict[str, object] = {
    "layer_scale": 0.1,  # D, for the base size; 1e-5 for large
    # D: pre-training 0.1 in one stored README and 0 in another; fine-tuning 0.1. Released code: a linear ramp; here
    # constant, as in the paper's code.
    "drop_path": 0.1,
    # D: relative position bias, shared by all layers, no absolute positions. D gives each layer a copy when it
    # fine-tunes; here it stays shared.
    "pos": "relative",
    "pool": "mean",  # D: fine-tuning reads the mean of the patch tokens
    "shrink_deep": True,  # Released code: fix_init_weight of both models
    "head_scale": 0.001,  # Released code: --init_scale of fine-tuning
    "key_bias": False,  # Released code: q_bias and v_bias alone
}

# The tokenizer. A: a discrete VAE trained on ImageNet-1k; its training is El-Nouby et al. (2021)'s and not stated.
# Proxy: DALL-E's (Ramesh et al. 2021, appendix A.2), from which BEiT has its own: AdamW, batch 512, decay 1e-4, rate
# 1e-4 to 1.25e-6 over 1,200,000 steps = 480 epochs of 2,503 (480 x 2503 = 1,201,440; their 3,000,000 steps go on at the
# last rate, and an average of the weights is used). The rates are recalled, not re-read, and ours is a smaller network
# with a squared error: TO BE TUNED by the share of tokens in use.
TOKENIZER = Recipe(
    epochs=480, batch_size=512, lr=1e-4, optimizer="adamw", weight_decay=1e-4, min_lr=1.25e-6, warmup=0.0, clip=None,
    augment=Augment(),
)  # fmt: skip
# For `DVAEConfig(in_chans=3, ...)`: a token for each 8x8 pixels of the view at 112, 14 x 14 in all. Vocabulary: D;
# channels: DALL-E's first width.
TOKENIZER_MODEL: dict[str, int] = {"image_size": 112, "patch_size": 8, "vocabulary": 8192, "width": 256}


def stem_model(p: Profile, name: str) -> ViTConfig:
    """A row of Table 7 as it is trained with labels from the start."""
    return vit_config(f"B{stem_pairs(name, p.stems.pairs)}", drop_path=DROP_PATH["B"], **STEM_ARMS[name])


def stems(p: Profile) -> list[Arm]:
    """Table 7: supervised by the paper's recipe; BeiT's model and protocol, pre-trained and from scratch.

    Paper, supervised and pre-trained: linear 82.20 and 83.05, hMLP 82.54 and 83.43, conv 82.57 and 83.04.
    """
    tokenizer = run_of(p, "tokenizer", DVAEConfig(in_chans=3, **TOKENIZER_MODEL), TOKENIZER)
    arms = []
    for name, stem in STEM_ARMS.items():
        model = vit_config(f"B{stem_pairs(name, p.stems.pairs)}", **BEIT_MODEL, **stem)
        how = {"targets": "dvae", "tokenizer": tokenizer, "masked": BEIT_MASKED}
        trunk = run_of(p, "masked", model, BEIT_PRETRAINING, **how)
        specs = {
            "supervised": run_of(p, "supervised", stem_model(p, name), supervised_recipe("B")),
            # Without layer decay, which would leave random layers nearly as they are.
            "scratch": run_of(p, "supervised", model, replace(BEIT_FINE_TUNING, layer_decay=None)),
            "pretrained": run_of(p, "finetune", model, BEIT_FINE_TUNING, parent=trunk),
        }
        arms += [Arm(f"{name} {training}", spec, name, training) for training, spec in specs.items()]
    return arms
