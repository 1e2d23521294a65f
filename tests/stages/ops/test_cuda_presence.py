"""A CUDA device is found without torch, and not where it is hidden or torch could not use it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from stages.ops.crf import cuda_presence
from stages.ops.crf.cuda_presence import has_cuda


@pytest.fixture(autouse=True)
def _asks_anew() -> None:
    has_cuda.cache_clear()


def _torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cuda: str) -> None:
    (tmp_path / "version.py").write_text(f"__version__ = '2.9'\ncuda: Optional[str] = {cuda}\nhip = None\n")
    found = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(cuda_presence.importlib.util, "find_spec", lambda _: found)


@pytest.mark.parametrize(
    ("visible", "cuda", "devices", "expected"),
    [
        (None, "'13.0'", 1, True),
        ("0,1", "'13.0'", 2, True),
        ("GPU-8932f937", "'13.0'", 1, True),
        (None, "'13.0'", 0, False),
        (None, "None", 1, False),
        ("", "'13.0'", 1, False),
        ("-1,0", "'13.0'", 1, False),
    ],
)
def test_has_cuda(
    visible: str | None,
    cuda: str,
    devices: int,
    expected: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _torch(tmp_path, monkeypatch, cuda)
    monkeypatch.setattr(cuda_presence, "_num_devices", lambda: devices)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert has_cuda() is expected


def test_without_torch_there_is_no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_presence.importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(cuda_presence, "_num_devices", lambda: 1)
    assert not has_cuda()


def test_without_nvidias_library_there_are_no_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_presence, "_LIBRARIES", ("libnvidia-ml-that-is-not-there.so",))
    assert cuda_presence._num_devices() == 0


class _Nvml:
    """NVIDIA's management library as far as it is asked."""

    def __init__(self, failure: int, count: int) -> None:
        self.failure, self.count, self.is_open = failure, count, False

    def nvmlInit_v2(self) -> int:
        self.is_open = not self.failure
        return self.failure

    def nvmlDeviceGetCount_v2(self, count: object) -> int:
        count._obj.value = self.count
        return 0

    def nvmlShutdown(self) -> None:
        self.is_open = False


@pytest.mark.parametrize(("failure", "expected"), [(0, 3), (9, 0)])
def test_devices_are_counted_and_the_library_is_closed(
    failure: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = _Nvml(failure, 3)
    monkeypatch.setattr(cuda_presence.ctypes, "CDLL", lambda _: library)
    assert cuda_presence._num_devices() == expected
    assert not library.is_open


def test_it_misses_no_device_that_torch_finds_and_imports_no_torch() -> None:
    code = (
        "import sys; from stages.ops.crf.cuda_presence import has_cuda; found = has_cuda(); "
        "assert 'torch' not in sys.modules; import torch; assert found or not torch.cuda.is_available()"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
