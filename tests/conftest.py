"""Fixtures that several rooms' tests share."""

import pytest

from lab.data.cards import load_resized


@pytest.fixture(scope="session")
def images():
    """The training images of Fashion-MNIST at 16 pixels, in memory."""
    return load_resized("fashion-mnist", "train", 16)
