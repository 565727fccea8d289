"""The devices that tests of numbers run on: a GPU too, if there is one. `pytest -m gpu` runs those on it alone."""

from __future__ import annotations

import pytest
import torch

GPU = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
        pytest.mark.filterwarnings(
            "default"
        ),  # torch warns there of what is no error, such as products in full float32
    ],
)
each_device = pytest.mark.parametrize("device", ["cpu", GPU])
