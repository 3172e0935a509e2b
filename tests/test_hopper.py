"""What the Hopper kernel says of problems, without a GPU."""

from __future__ import annotations

from typing import Any

import pytest

from laser_core import Problem

torch = pytest.importorskip("torch", reason="torch is not installed")

from laser_torch import hopper, launch  # noqa: E402

SERVED: dict[str, Any] = {
    "framework": "torch",
    "device": "cuda",
    "dtype": "bfloat16",
    "batch": (2,),
    "query_heads": 4,
    "key_value_heads": 2,
    "query_length": 100,
    "key_length": 300,
    "head_dim": 128,
    "value_dim": 128,
    "scale": 0.1,
}


@pytest.mark.parametrize(
    ("change", "offset"),
    [
        ({}, None),
        ({"head_dim": 64, "value_dim": 64, "dtype": "float16"}, None),
        ({"causal": "top_left"}, 0),
        ({"causal": "bottom_right"}, 200),
        ({"window": (None, 7)}, 7),
        ({"window": (None, 7), "causal": "bottom_right"}, 200),
        ({"causal": "bottom_right", "query_length": 1}, None),
        ({"beta": -2.0, "return_lse": True}, None),
    ],
)
def test_serves(change: dict[str, Any], offset: int | None) -> None:
    problem = Problem(**SERVED | change)
    assert hopper.why_not(problem) is None
    assert hopper.causal_offset(problem) == offset


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"dtype": "float32"}, "dtype"),
        ({"head_dim": 96, "value_dim": 96}, "head dimensions"),
        ({"value_dim": 64}, "head dimensions"),
        ({"key_length": 0}, "empty"),
        ({"scale": -0.1}, "scale"),
        ({"scale": 0.0}, "scale"),
        ({"beta": 0.5}, "beta"),
        ({"beta": None, "beta_shape": (4, 128)}, "beta"),
        ({"mask_shape": (100, 300)}, "mask"),
        ({"bias_shape": (100, 300)}, "bias"),
        ({"logits_soft_cap": 30.0}, "logits_soft_cap"),
        ({"window": (5, None)}, "window_size"),
        ({"key_value_lengths": True}, "lengths"),
    ],
)
def test_says_what_it_does_not_serve(change: dict[str, Any], word: str) -> None:
    reason = hopper.why_not(Problem(**SERVED | change))
    assert reason is not None
    assert word in reason


def test_what_the_memory_accelerator_reads() -> None:
    def fits(x: torch.Tensor) -> bool:
        return launch.fits(x.shape, x.stride(), x.data_ptr() % launch.ALIGNMENT == 0, x.element_size())

    a = torch.zeros(2, 3, 8, 64, dtype=torch.bfloat16)
    assert fits(a)
    assert fits(a.transpose(1, 2))
    assert not fits(a.transpose(2, 3))
    assert not fits(a[:1].expand(2, 3, 8, 64))
    assert not fits(torch.zeros(2, 3, 8, 65, dtype=torch.bfloat16)[..., 1:])


def test_a_device_without_the_kernel_says_so() -> None:
    assert "9.0" in str(hopper.missing(torch.device("cpu")))


@pytest.mark.parametrize(
    ("heads", "work", "most"), [(64, 32, 12), (256, 8, 48), (1, 4, 100), (7, 1000, 3), (300, 4, 1)]
)
def test_sections_cut_the_heads_without_a_rest(heads: int, work: int, most: int) -> None:
    lead, span = hopper.sections(heads, work, 132, most)
    assert 0 < lead <= heads
    assert 0 < span <= most
    assert (heads - lead) % span == 0
