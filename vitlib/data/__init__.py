"""Real images, loaded once into a tensor; augmentation as batched tensor operations."""

from vitlib.data.registry import DataSet, load
from vitlib.data.tensors import Batch, epoch_batches, load_resized, normalise, resize, subset

__all__ = ["Batch", "DataSet", "epoch_batches", "load", "load_resized", "normalise", "resize", "subset"]
