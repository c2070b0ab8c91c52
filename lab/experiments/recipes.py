"""Recipes: every number of a training run in one frozen record.

The recipes below belong to the embedded images (16x16 pixels, width 32 or 64, hundreds of steps). Their values
come from a scouting study of about 60 runs on Fashion-MNIST, done before this project on images that it does not use
(test images 0-4,999): only a mirror flip, no shift (runs this short underfit); batch 64, or 32 for few labels;
AdamW, cosine to 1e-5 after a warm-up of 10 % of the steps, gradient norm clipped at 1.
They are not the paper's: those are for ImageNet, belong to the profile of that name and stand at the end.
"""

from __future__ import annotations

from dataclasses import replace

from vitlib.data.augment import Augment
from vitlib.errors import unknown
from vitlib.train.finetune import STRATEGIES
from vitlib.train.recipe import Recipe

# Supervised training on all images. Of 1.5e-3, 3e-3 and 6e-3 with LayerScale, and 5e-4, 1e-3 and 2e-3 without, these are the
# best for 12x1 and 6x2 together, and for the linear, hMLP and convolutional stems (outputs/reference/pilot/tuning.csv); so is
# FEW_LABELS's 1e-3. No verdict compares a model with LayerScale to one without.
SUPERVISED = Recipe(epochs=2, batch_size=64, lr=1e-3)


SUPERVISED_LAYER_SCALE = Recipe(epochs=2, batch_size=64, lr=3e-3)


SUPERVISED_STEMS = Recipe(epochs=2, batch_size=64, lr=2e-3)


# Change of resolution (Table 5): each strategy its own rate, the best of 1e-3, 2e-3 and 4e-3 on validation images
# (outputs/reference/pilot/tuning.csv, seeds 1000 and 1001).
_FINE_TUNING = Recipe(epochs=1, batch_size=64, lr=2e-3)


FINE_TUNING = {
    strategy: replace(_FINE_TUNING, lr=lr)
    for strategy, lr in {"full": 2e-3, "attn": 4e-3, "ffn": 4e-3, "head": 4e-3}.items()
}


# Transfer to other data (Table 6, of which the paper states no hyper-parameter): each arm its own rate, the best of 1e-3, 3e-3
# and 1e-2 in the same way, since that depends on the number of images and on the width. Arms that no verdict reads take that of
# width 64, or of their strategy at the middle number of images. Where the best is the largest tried, a larger one may be better
# still, here and above.
TRANSFER_RATES = {  # target -> the rates of the four strategies at width 64, and at others that are not named
    "fashion-mnist-4 200": (3e-3, 1e-2, 1e-2, 1e-2),
    "fashion-mnist-4 1000": (3e-3, 3e-3, 1e-2, 1e-2),
    "fashion-mnist-4 7200": (3e-3, 3e-3, 1e-2, 1e-2),
    "W32 fashion-mnist-4 7200": (3e-3, 3e-3, 1e-2, 1e-2),
    "digits 100": (3e-3, 1e-2, 1e-2, 1e-2),
    "digits 300": (1e-2, 1e-2, 1e-2, 1e-2),
    "digits 1000": (1e-2, 3e-3, 1e-2, 1e-2),
    "W32 digits 1000": (1e-2, 1e-2, 1e-2, 1e-2),
    "animal-shapes 200": (3e-3, 1e-2, 1e-2, 1e-2),
    "animal-shapes 1000": (3e-3, 3e-3, 1e-2, 1e-2),
    "animal-shapes 5000": (3e-3, 3e-3, 1e-2, 1e-2),
    "W32 animal-shapes 5000": (1e-2, 1e-2, 1e-2, 1e-2),
}


# Proxy, tuned for none: the fewest, middle and most images of CIFAR-10 take the rates of Fashion-MNIST's.
TRANSFER_RATES |= {
    f"cifar-10 {images}": TRANSFER_RATES[f"fashion-mnist-4 {like}"]
    for images, like in ((500, 200), (5000, 1000), (45_000, 7200))
}


# Up to so many images: epochs. The scouting study: 30 steps are too few for 200 images (hence 20 epochs), some 300 are enough
# for 2,000.
TRANSFER_EPOCHS = {250: 20, 500: 10, 1000: 6, 5000: 3, 50_000: 2}


def transfer(width: int, data: str, images: int, strategy: str) -> Recipe:
    """Table 6 below ImageNet's scale: how a strategy is trained on so many images of a data set, for a model of this width.

    Raises UsageError for a target or a strategy without a rate.
    """
    target = f"{data} {images}"
    if target not in TRANSFER_RATES:
        raise unknown("target of Table 6", target, [name for name in TRANSFER_RATES if name[0] != "W"])
    if strategy not in STRATEGIES:
        raise unknown("strategy of Table 6", strategy, STRATEGIES)
    rates = TRANSFER_RATES.get(f"W{width} {target}", TRANSFER_RATES[target])
    epochs = next(epochs for most, epochs in TRANSFER_EPOCHS.items() if images <= most)
    return Recipe(epochs=epochs, batch_size=32, lr=rates[STRATEGIES.index(strategy)])


# Masked pre-training: betas of the BEiT recipe (microsoft/unilm, beit/README.md), its clip 3.0.
MASKED = Recipe(epochs=4, batch_size=64, lr=2e-3, betas=(0.9, 0.98), clip=3.0)


# The tokenizer (`dvae.py`). On validation images, 4 epochs: 1e-2 reconstructs better than 5e-3, and 1e-3 leaves nine
# of ten tokens unused.
TOKENIZER = Recipe(epochs=4, batch_size=64, lr=1e-2)


# Few labels: pre-trained and from scratch, same labels, same steps.
FEW_LABELS = Recipe(epochs=24, batch_size=32, lr=1e-3)


# The same with layer decay, as BEiT fine-tunes. Released code: 0.65 at 4e-3, for 100 epochs of ImageNet. Tried here on one
# tuning seed (validation images): 0.65 hurts (69.2 against 75.4 without), 0.8 at 2e-3 is about equal (76.6). What is
# judged has none; this recipe is shown beside.
FEW_LABELS_BEIT = Recipe(epochs=24, batch_size=32, lr=2e-3, layer_decay=0.8)


# Stochastic depth, of the model's configuration. A: by width, at 12 pairs for Ti, S and B and 24 for L; it states no
# rate for deeper models. B: the same rate in every layer.
DROP_PATH = {"Ti": 0.0, "S": 0.05, "B": 0.1, "L": 0.4}


PEAK_LR = {"Ti": 4e-3, "S": 4e-3, "B": 3e-3, "L": 3e-3}  # A; procedure A2's own is 5e-3 (E)


RAND_AUGMENT_7 = Augment(
    policy="rand-m7-mstd0.5-inc1",  # E: 2 operations, magnitude 7, deviation 0.5, increasing
    crop_scale=(0.08, 1.0),  # E: its random resized crop's default
    color_jitter=0.0,  # E: none
    erasing=0.0,  # E: none
    test_crop=0.95,  # E: resize to 236, crop 224
    interpolation="bicubic",  # E
)


# An option: DeiT III's 3-Augment (grey, solarised or blurred, one of three), `replace(recipe, augment=THREE_AUGMENT)`.
# B: augment.py; jitter 0.3 from the README's commands; test crop 1.0.
THREE_AUGMENT = Augment(policy="3-augment", color_jitter=0.3, test_crop=1.0)


def supervised_imagenet(width: str, epochs: int = 300) -> Recipe:
    """Tables 1 to 3 and 7 (left), Figures 1 to 3: procedure A2 with the paper's changes, by width.

    A: 300 epochs without LayerScale, 400 with. Stochastic depth is the model's: `DROP_PATH`.
    Raises UsageError for a width that the paper does not have.
    """
    if width not in PEAK_LR:
        raise unknown("width", width, PEAK_LR)
    return Recipe(
        epochs=epochs,  # A
        batch_size=2048,  # E: 8 x 256
        lr=PEAK_LR[width],  # A
        optimizer="lamb",  # E
        weight_decay=0.02,  # E: none on biases and norms
        betas=(0.9, 0.999),  # E: LAMB's defaults
        min_lr=1e-6,  # E
        warmup=5 / epochs,  # E: 5 epochs
        # E: its config clips nothing. LAMB itself, timm's and mmpretrain's, divides by the norm of all gradients where
        # that is above 1 (`max_grad_norm`); so does ours.
        clip=None,
        loss="bce",  # A: targets above 0 count as 1, engine.py of B
        flip=True,  # E: 0.5
        mixup=0.1,  # E: half of the time
        cutmix=1.0,  # E: the other half
        augment=RAND_AUGMENT_7,
        smoothing=0.0,  # E; with any, targets above 0 would be all classes
        repeats=3,  # E: RepeatAugSampler; B: RASampler, 3
        ema=None,  # E: none
    )


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


# Table 5, 224 -> 384. A: it starts from the models of 400 epochs with LayerScale, and nothing else is stated. Proxy:
# DeiT III's command for 384 (B, README_revenge.md). Its --min-lr is main.py's default 1e-5, the peak itself: behind the
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
RESOLUTION_SGD = Recipe(
    epochs=20, batch_size=512, lr=1e-2, optimizer="sgd", weight_decay=1e-4, min_lr=1e-5, warmup=5 / 20, clip=None,
    loss="cross_entropy", mixup=0.8, cutmix=1.0, smoothing=0.1, augment=RESOLUTION_ADAMW.augment, repeats=1,
)  # fmt: skip


RESOLUTION_SGD_RATES = (3e-3, 1e-2, 3e-2)  # to tune on validation images


# Table 6: no hyper-parameter, resolution or length is stated (A). Proxy: what the first author gives for DeiT, the
# model that the paper's is compared with. Both at 224 pixels, and what they do not name as for training on ImageNet, in
# `DEIT`. facebookresearch/deit issue 45, for CIFAR-10 and Cars (we take it for CIFAR-100 and Flowers too): SGD, no
# erasing. Whether 0.01 is meant before scaling by batch / 512 is not said; here it is the peak.
_SMALL_SETS = Recipe(
    epochs=1000, batch_size=768, lr=1e-2, optimizer="sgd", weight_decay=1e-4, min_lr=1e-5, warmup=5 / 1000, clip=None,
    loss="cross_entropy", mixup=0.8, cutmix=1.0, smoothing=0.1, repeats=3,
    augment=Augment(policy="rand-m9-mstd0.5-inc1", color_jitter=0.4, erasing=0.0, test_crop=0.875),
)  # fmt: skip


# facebookresearch/deit issues 105 and 141, for ViT-B: 7.5e-5 is the rate after scaling, erasing 0.1.
_INATURALIST = Recipe(
    epochs=360, batch_size=768, lr=7.5e-5, optimizer="adamw", weight_decay=0.05, min_lr=1e-5, warmup=5 / 360, clip=None,
    loss="cross_entropy", mixup=0.8, cutmix=1.0, smoothing=0.1, repeats=3,
    augment=Augment(policy="rand-m9-mstd0.5-inc1", color_jitter=0.4, erasing=0.1, test_crop=0.875),
)  # fmt: skip


_TRANSFER_IMAGENET = {
    "inaturalist-2018": (_INATURALIST, 0.1), "inaturalist-2019": (_INATURALIST, 0.1), "cifar-10": (_SMALL_SETS, 0.0),
    "cifar-100": (_SMALL_SETS, 0.0), "stanford-cars": (_SMALL_SETS, 0.0), "flowers-102": (_SMALL_SETS, 0.0),
}  # fmt: skip


def transfer_imagenet(data: str) -> tuple[Recipe, float]:
    """Table 6: the recipe for one of its six sets, and the model's stochastic-depth rate; all of it proxy.

    One rate for `full`, `attn` and `ffn`, tuned for none of them. Raises UsageError for another data set.
    """
    if data not in _TRANSFER_IMAGENET:
        raise unknown("data set of Table 6", data, _TRANSFER_IMAGENET)
    return _TRANSFER_IMAGENET[data]


# Table 7 (right). A: BEiT's code and procedure, 300 epochs, the tokenizer trained on ImageNet-1k, the mask behind the
# stem.
BEIT_PRETRAINING = Recipe(
    epochs=300,  # A, and D's default; D's README has 800
    batch_size=2048,  # D: 16 x 128
    lr=1.5e-3,  # D
    optimizer="adamw",  # D; its epsilon 1e-8 is torch's
    weight_decay=0.05,  # D
    betas=(0.9, 0.98),  # D
    min_lr=1e-5,  # D
    warmup=10 / 300,  # D: 10 epochs, 6,260 of 187,800 steps
    clip=3.0,  # D
    # D: flip, random resized crop, the same crop at 112 pixels (Lanczos) for the tokenizer. Released code: jitter 0.4
    # before them, though not in every stored version of datasets.py.
    augment=Augment(color_jitter=0.4, view_size=112),
)


BEIT_MASKED = 75  # D: of 196 patches, block-wise; `RunSpec.masked`


BEIT_FINE_TUNING = Recipe(
    epochs=100,  # A
    batch_size=1024,  # D: 8 x 128
    lr=4e-3,  # D
    optimizer="adamw",
    weight_decay=0.05,  # D
    betas=(0.9, 0.999),  # D: the optimizer's
    min_lr=1e-6,  # D
    warmup=20 / 100,  # D: 20 epochs, 25,040 of 125,200 steps
    clip=None,  # D: the script's default
    loss="cross_entropy",
    mixup=0.8,  # D
    cutmix=1.0,  # D
    smoothing=0.1,  # D
    layer_decay=0.65,  # D: of 12 layers; other depths by `loop.layer_decay`
    augment=RAND_AUGMENT_9,  # D: m9, jitter 0.4, erasing 0.25, test crop 224 / 256
    repeats=1,  # D
)


# The model in both phases, for `vit_config("B12", **BEIT_MODEL)`.
BEIT_MODEL: dict[str, object] = {
    "layer_scale": 0.1,  # D, for the base size; 1e-5 for large
    # D: pre-training 0.1 in one stored README and 0 in another; fine-tuning 0.1. Released code: a linear ramp; here
    # constant, as in the paper's own code.
    "drop_path": 0.1,
    # D: relative position bias, shared by all layers, no absolute positions. D gives each layer a copy when it
    # fine-tunes; here it stays shared.
    "pos": "relative",
    "pool": "mean",  # D: fine-tuning reads the mean of the patch tokens
    "shrink_deep": True,  # Released code: fix_init_weight of both models
    "head_scale": 0.001,  # Released code: --init_scale of fine-tuning
    "key_bias": False,  # Released code: q_bias and v_bias alone
}


# Not followed. Weight decay: D spares biases, vectors, cls_token and pos_embed, so that the mask token and the tables of
# relative positions decay; here neither does. The last norm: D puts a fresh one behind the mean when it fine-tunes and
# drops the pre-trained one; here that one stays, before the mean. Initial values: D truncates at one deviation, and has
# convolutions like linear layers.
# The option: learned absolute positions, D's --abs_pos_emb, which have one for the class token too.
BEIT_MODEL_ABSOLUTE: dict[str, object] = BEIT_MODEL | {"pos": "all"}


# The tokenizer. A: a discrete VAE trained on ImageNet-1k; its training is El-Nouby et al. (2021)'s and not stated.
# Proxy: DALL-E's (Ramesh et al. 2021, appendix A.2), from which BEiT has its own: AdamW, batch 512, decay 1e-4, rate
# 1e-4 to 1.25e-6 over 1,200,000 steps = 480 epochs of 2,503 (480 x 2503 = 1,201,440; their 3,000,000 steps go on at the
# last rate, and an average of the weights is used). The rates are recalled, not re-read, and ours is a smaller network
# with a squared error: TO BE TUNED by the share of tokens in use.
TOKENIZER_IMAGENET = Recipe(
    epochs=480, batch_size=512, lr=1e-4, optimizer="adamw", weight_decay=1e-4, min_lr=1.25e-6, warmup=0.0, clip=None,
    augment=Augment(),
)  # fmt: skip


# For `DVAEConfig(in_chans=3, ...)`: a token for each 8x8 pixels of the view at 112, 14 x 14 in all. Vocabulary: D;
# channels: DALL-E's first width.
TOKENIZER_MODEL: dict[str, int] = {"image_size": 112, "patch_size": 8, "vocabulary": 8192, "width": 256}
