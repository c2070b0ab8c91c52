"""A small model, a short recipe and a batch, for tests of training."""

from dataclasses import replace

import numpy as np

from vitlib.data import Batch, subset
from vitlib.model import ViT, vit_config
from vitlib.train import loop
from vitlib.train.recipe import Recipe
from vitlib.train.supervised import cross_entropy

RECIPE = Recipe(epochs=1, batch_size=10, lr=1e-3)


def small(**fields):
    return vit_config("W32-3x2/4", image_size=16, in_chans=1, num_classes=10, **fields)


def train(config, images, recipe=RECIPE, seed=1000, rows=200, model=None, loss=cross_entropy):
    model = model or ViT(config, seed)
    return model, loop.train(model, recipe, images, subset(images, rows, seed), seed, loss)


def batch_of(images, count=20, seed=0, epoch=0) -> Batch:
    return next(images.epoch_batches(np.arange(count), seed, epoch, replace(RECIPE, batch_size=count)))
