"""What ``wsss predict`` and ``wsss export`` answer before there is a segmenter: help, wrong words, what is missing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from pipeline.cli import main as cli
from stages.contracts import SilentProgress
from stages.scoring.export import export_segmenter
from stages.scoring.prediction import PredictionConfig
from tests.pipeline.whole_runs.tiny_run import tiny_yaml
from tests.stages.trained_nets import save_lively_segmenter

ROOT = Path(__file__).parents[3]


@pytest.fixture
def wsss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Calls a command with --json in a folder that has a config, an image and an empty folder."""
    (tmp_path / "tiny.yaml").write_text(tiny_yaml())
    (tmp_path / "shots").mkdir()
    (tmp_path / "empty").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "shots" / "a.png")
    monkeypatch.chdir(tmp_path)

    def call(*words: str, code: int) -> dict:
        found = cli.main([*words, "--json"])
        captured = capsys.readouterr()
        assert found == code, captured.err + captured.out
        return json.loads(captured.out)["error"]

    return call


@pytest.mark.parametrize("command", ["predict", "export"])
def test_help_needs_no_torch(command: str):
    program = (
        "import sys; from pipeline.cli.main import main; code = main([sys.argv[1], '--help']); "
        "sys.exit(code or any(name in sys.modules for name in ('torch', 'prefect', 'onnx', 'onnxruntime', 'PIL')))"
    )
    done = subprocess.run([sys.executable, "-c", program, command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--out DIR" in done.stdout


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["predict", "tiny.yaml", "--out", "x"], "after CONFIG"),
        (["predict", "tiny.yaml", "gone.jpg", "--out", "x"], "not there"),
        (["predict", "tiny.yaml", "empty", "--out", "x"], "not there"),
        (["predict", "gone.yaml", "shots", "--out", "x"], "there is no config file gone.yaml"),
        (["predict", "--model", "shots", "shots", "--out", "x"], "wsss export CONFIG --out DIR"),
        (["predict", "--model", "shots", "shots", "--out", "x", "--set", "seed=1"], "stands instead"),
        (["predict", "tiny.yaml", "shots"], "--out"),
    ],
)
def test_wrong_words_end_with_2(wsss, words: list[str], text: str):
    assert text in wsss(*words, code=2)["message"]
    assert not Path("x").exists()


@pytest.mark.parametrize("command", [["predict", "tiny.yaml", "shots"], ["export", "tiny.yaml"]])
def test_without_the_segmenter_the_command_that_trains_it_is_said(wsss, command: list[str]):
    message = wsss(*command, "--out", "x", "--set", "seed=5", "--artifacts", "elsewhere", code=3)["message"]
    assert "wsss run tiny.yaml --set seed=5 --artifacts elsewhere --until train_segmenter" in message
    assert not Path("x").exists()


def test_a_config_without_a_segmenter_is_refused(wsss):
    words = ["--set", "evaluate.segmentation=false", "--set", "evaluate.localization={}"]
    assert "trains no segmenter" in wsss("export", "tiny.yaml", "--out", "x", *words, code=2)["message"]


def test_precision_is_the_configs_unless_the_command_says_otherwise():
    from pipeline.cli.predict import _options
    from stages.errors import ConfigError
    from stages.scoring.prediction import PredictionConfig

    config, nothing = PredictionConfig(precision="bf16"), {"scales": None, "flip": None, "precision": None}
    assert _options(config, nothing, None).precision == "bf16"
    assert _options(config, nothing | {"precision": "fp32"}, None).precision == "fp32"
    with pytest.raises(ConfigError) as caught:
        _options(config, nothing | {"precision": "fp8"}, None)
    assert caught.value.problems[0].startswith("--precision")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    export_segmenter(
        save_lively_segmenter(tmp_path / "segmenter"),
        tmp_path / "model",
        prediction=PredictionConfig(multi_scale=False, crf=False),
        provenance={},
        progress=SilentProgress(),
        onnx=False,
    )
    return tmp_path / "model"


def test_odd_files_are_named_after_the_work_and_everything_else_is_written(wsss, model: Path):
    shots, name = Path("shots"), os.fsdecode(b"caf\xe9 1")
    (shots / "a.png").rename(shots / f"{name}.PNG")
    Image.new("RGB", (64, 64)).save(shots / "plain.JFIF", format="JPEG")
    (shots / "loop.jpg").symlink_to("loop.jpg")
    os.mkfifo(shots / "pipe.jpg")
    (shots / "folder.jpg").mkdir()
    (shots / "pointer.jpg").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    words = ["predict", "--model", str(model), "--out", "out"]
    error = wsss(*words, *map(str, sorted(shots.iterdir())[::-1]), "empty/../shots/loop.jpg", code=2)
    assert error["message"] == "5 images could not be read; the others are done"
    assert sorted(line.partition(":")[0] for line in error["problems"]) == [
        "empty/../shots/loop.jpg",
        "shots/folder.jpg",
        "shots/loop.jpg",
        "shots/pipe.jpg",
        "shots/pointer.jpg",
    ]
    assert sorted(path.name for path in Path("out").glob("*.png")) == [f"{name}.png", "plain.png"]
    rows = Path("out/areas.csv").read_bytes().splitlines()[1:]
    assert {row.partition(b",")[0] for row in rows} == {b"caf\xe9 1", b"plain"}


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_pointer_in_the_place_of_an_exports_file_is_named(wsss, model: Path, file: str):
    (model / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    message = wsss("predict", "--model", str(model), "shots", "--out", "out", code=4)["message"]
    assert f"{file} is " in message
    assert "it is a Git LFS pointer; fetch the file itself with `git lfs pull`" in message
    (model / "config.json").write_text("[" * 200_000)
    assert (
        "config.json is not readable JSON"
        in wsss("predict", "--model", str(model), "shots", "--out", "x", code=4)["message"]
    )
