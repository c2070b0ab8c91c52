"""One loop for supervised training, fine-tuning and masked pre-training. Needs torch, numpy, timm, pyarrow, Pillow."""

from vitlib.train import dvae, finetune, masked, supervised

PROTOCOLS = {p.name: p for p in (supervised.PROTOCOL, finetune.PROTOCOL, masked.PROTOCOL, dvae.PROTOCOL)}
