"""What ``wsss predict`` and ``wsss export`` answer before there is a segmenter: help, wrong words, what is missing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from pipeline.cli import main as cli
from tests.pipeline.whole_runs.tiny_run import tiny_yaml

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
