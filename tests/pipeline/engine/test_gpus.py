"""Which GPUs there are, with a program in place of nvidia-smi."""

from pathlib import Path

import pytest

from pipeline.engine import gpus
from pipeline.engine.gpus import find_gpus, short_name
from pipeline.flows.up import choose_workers
from stages.errors import InputError


def fake_smi(folder: Path, script: str) -> dict[str, str]:
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    return {"PATH": f"{folder}:/usr/bin:/bin"}


def test_the_gpus_that_nvidia_smi_lists(tmp_path: Path):
    assert find_gpus(fake_smi(tmp_path, "printf '0\\n1\\n'")) == ["0", "1"]


@pytest.mark.parametrize(
    ("allowed", "expected"),
    [("1", ["1"]), (" 2, 0 ", ["2", "0"]), ("", []), ("-1", []), ("0,-1,1", ["0"]), ("GPU-5a", ["GPU-5a"])],
)
def test_what_the_user_allows_stands(tmp_path: Path, allowed: str, expected: list[str]):
    environment = fake_smi(tmp_path, "printf '0\\n1\\n'") | {"CUDA_VISIBLE_DEVICES": allowed}
    assert find_gpus(environment) == expected


def test_a_broken_driver_without_a_device_is_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gpus, "_DEVICE_FILES", (str(tmp_path / "none"),))
    assert find_gpus(fake_smi(tmp_path, "echo 'no driver' >&2; exit 9")) == []


def test_torch_is_asked_where_a_device_is_there_without_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "kfd").write_text("")
    (tmp_path / "torch.py").write_text("class cuda:\n    device_count = staticmethod(lambda: 3)\n")
    monkeypatch.setattr(gpus, "_DEVICE_FILES", (str(tmp_path / "kfd"),))
    assert find_gpus({"PATH": str(tmp_path), "PYTHONPATH": str(tmp_path)}) == ["0", "1", "2"]


def test_one_worker_per_gpu_or_one_on_the_cpu():
    assert choose_workers(None, ["0", "3"], "box.lan") == {"box-gpu0": "0", "box-gpu3": "3"}
    assert choose_workers(None, [], "box") == {"box-cpu0": ""}
    assert choose_workers(2, [], "box") == {"box-cpu0": "", "box-cpu1": ""}
    assert choose_workers(1, ["0", "1"], "box") == {"box-gpu0": "0"}
    assert choose_workers(0, ["0"], "box") == {}


def test_two_workers_do_not_share_a_gpu():
    with pytest.raises(InputError, match=r"--workers 2: one worker per GPU, and 1 visible.*CUDA_VISIBLE_DEVICES=-1"):
        choose_workers(2, ["0"], "box")


def test_a_uuid_gives_a_short_name():
    assert short_name("GPU-8932f937-d72c-4106-c12f-20bd9faed9f6") == "gpu-8932f937"
