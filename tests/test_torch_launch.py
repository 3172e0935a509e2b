"""Launches by the CUDA driver, with one that is not there: what a kernel would find as its arguments."""

from __future__ import annotations

import ctypes
import struct
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from laser_torch import driver  # noqa: E402

SIGNATURE = {"X": "*bf16", "N": "i32", "Mask": "constexpr", "Y": "*fp32", "s": "fp32", "D": "constexpr", "t": "i64"}
SIZES = [8, 4, 8, 4, 8, 8, 8]  # of the parameters, with the two for scratch memory


class Cuda:
    """Remembers a launch."""

    def __init__(self, sizes: list[int]) -> None:
        self.sizes, self.found, self.status = sizes, b"", 0

    def cuFuncGetParamInfo(self, function: int, n: int, offset: Any, size: Any) -> int:
        if n < len(self.sizes):
            size._obj.value = self.sizes[n]
        return int(n >= len(self.sizes))

    def cuLaunchKernelEx(self, config: Any, function: int, parameters: Any, extra: None) -> int:
        launch = config._obj
        self.shape = [function, *launch.grid, *launch.block, launch.shared]
        self.stream = launch.stream
        self.attributes = [(a.id, a.value) for a in launch.attributes[: launch.count]]
        self.found = b"".join(ctypes.string_at(at, n) for at, n in zip(parameters, self.sizes, strict=True))
        return self.status


def kernel(**about: Any) -> Any:
    plain = {"num_ctas": 1, "launch_cooperative_grid": False, "launch_pdl": False, "tensordesc_meta": None}
    metadata = SimpleNamespace(**plain | {"global_scratch_size": 0, "profile_scratch_size": 0} | about)
    source = SimpleNamespace(signature=SIGNATURE)
    return SimpleNamespace(metadata=metadata, src=source, function=7, packed_metadata=(8, 1, 4096))


def test_a_kernel_finds_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 99, raising=False)
    cuda = Cuda(SIZES)
    x, y, z = torch.zeros(3, 8).unbind()
    prepared = driver.Arguments(cuda, kernel(launch_pdl=True), (5, 1, 1), (x, 3, None, y, 0.5, 64, 2**40), 4)
    for first, second in ((x, y), (z, x)):
        assert prepared.launch((first, 3, None, second))
        assert cuda.shape == [7, 5, 1, 1, 256, 1, 1, 4096]
        assert cuda.stream == 99
        assert cuda.attributes == [(6, 1)]
        assert cuda.found == struct.pack("=QiQfqQQ", first.data_ptr(), 3, second.data_ptr(), 0.5, 2**40, 0, 0)
    cuda.status = 201
    assert not prepared.launch((x, 3, None, y))


@pytest.mark.parametrize(
    ("about", "sizes"), [({"num_ctas": 2}, SIZES), ({"global_scratch_size": 64}, SIZES), ({}, SIZES[:-1])]
)
def test_what_is_not_known_is_left_to_triton(about: dict[str, Any], sizes: list[int]) -> None:
    x = torch.zeros(8)
    with pytest.raises(LookupError):
        driver.Arguments(Cuda(sizes), kernel(**about), (5, 1, 1), (x, 3, None, x, 0.5, 64, 2**40), 4)
