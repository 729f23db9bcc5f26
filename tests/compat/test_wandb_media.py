"""What raylit reads of wandb's media, on the real package."""

import pickle

import numpy as np
import pytest

from raylit.compat.wandb_media import reduce_media


def test_an_image_travels_with_its_file():
    wandb = pytest.importorskip("wandb")
    image = wandb.Image(np.zeros((8, 8, 3), dtype=np.uint8), caption="black")
    with open(image._path, "rb") as file:
        content = file.read()
    function, arguments = reduce_media(image)
    copied = function(*pickle.loads(pickle.dumps(arguments)))
    assert copied._path != image._path
    assert (copied._caption, copied._is_tmp, copied._sha256) == ("black", True, image._sha256)
    with open(copied._path, "rb") as file:
        assert file.read() == content


def test_what_is_no_media_is_pickled_as_ever():
    assert reduce_media(3) is None
