"""An exported segmenter predicts as the trained one does, in wsss and in onnxruntime; a damaged one is named."""

import hashlib
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file

import wsss
from stages.contracts import Runtime, SilentProgress
from stages.data.pictures import find_pictures
from stages.errors import DamagedFileError, EnvironmentFailure, InputError
from stages.nets.segmenters.config import DeepLabConfig, DeepLabV2Config, LargeFovConfig
from stages.nets.segmenters.files import load_segmenter
from stages.ops.multi_scale import predict_logits
from stages.scoring import export as export_module
from stages.scoring.export import compare_onnx, export_segmenter, to_onnx
from stages.scoring.exported_model import exported_source, load_export, read_export, trained_source
from stages.scoring.image_prediction import predict_pictures
from stages.scoring.prediction import PredictionConfig
from stages.scoring.window_prediction import PredictOptions
from tests.stages.trained_nets import CLASSES, SMALL, save_lively_segmenter, save_noise

PROVENANCE = {"key": "0123", "commit": "abc", "mask_supervision": ["im1"]}
ONNX_NETS = {
    "small": SMALL,
    "squeezenet": LargeFovConfig.model_validate({"backbone": {"name": "squeezenet1_1"}, "channels": 16}),
    "deeplabv3plus": DeepLabConfig(name="deeplabv3plus", encoder="resnet18", decoder_channels=16),
    "deeplabv2": DeepLabV2Config.model_validate({"name": "deeplabv2", "backbone": {"name": "small"}}),
    "deeplabv3": DeepLabConfig(name="deeplabv3", encoder="mobilenet_v2", output_stride=8, decoder_channels=16),
}


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_lively_segmenter(tmp_path_factory.mktemp("segmenter"))


@pytest.fixture(scope="module")
def exported(segmenter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "model"
    export(segmenter, out)
    return out


def export(segmenter: Path, out: Path, **options):
    return export_segmenter(
        segmenter,
        out,
        prediction=PredictionConfig(scales=(0.5, 1.0)),
        provenance=PROVENANCE,
        progress=SilentProgress(),
        **options,
    )


@pytest.fixture
def copy(exported: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in exported.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_the_config_says_all_that_a_user_needs(exported: Path, segmenter: Path):
    found = json.loads((exported / "config.json").read_text())
    assert found["classes"] == ["background", *CLASSES]
    assert found["net"]["name"] == "largefov"
    assert found["net"]["backbone"]["name"] == "small"
    assert found["normalisation"] == {
        "channels": "RGB",
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
    }
    assert found["prediction"]["scales"] == [0.5, 1.0]
    assert found["provenance"] == PROVENANCE
    assert set(found["files"]) == {"model.safetensors", "model.onnx"}
    assert found["onnx"]["max_abs_difference"] <= 1e-3 * max(1, found["onnx"]["max_abs_logit"])
    assert same_tensors(exported / "model.safetensors", segmenter / "segmenter.safetensors")


def same_tensors(first: Path, second: Path) -> bool:
    found = [load_file(path) for path in (first, second)]
    return found[0].keys() == found[1].keys() and all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_tensors_and_onnx_can_be_used_without_the_config(exported: Path):
    with safe_open(exported / "model.safetensors", "pt") as file:
        texts = file.metadata()
    model = onnx.load(exported / "model.onnx")
    for found in (texts, {entry.key: entry.value for entry in model.metadata_props}):
        assert found["kind"] == "wsss-segmenter"
        assert json.loads(found["classes"]) == ["background", *CLASSES]
        assert json.loads(found["normalisation"])["mean"] == [0.485, 0.456, 0.406]
        assert json.loads(found["net"])["name"] == "largefov"
        assert found["key"] == "0123"
    (images,), (logits,) = model.graph.input, model.graph.output
    dims = [[dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in (images, logits)]
    assert dims == [["batch", 3, "height", "width"], ["batch", len(CLASSES) + 1, "height", "width"]]


def test_the_model_card_has_classes_scores_and_how_to_use_it(segmenter: Path, tmp_path: Path):
    provenance = {
        "run": "cats",
        "key": "0123",
        "supervision": "weak",
        "mask_supervision": ["a", "b"],
        "metrics": {"segmenter.miou": 0.51234, "segmenter.miou_low": 0.5},
    }
    export_segmenter(
        segmenter,
        tmp_path / "out",
        prediction=PredictionConfig(),
        provenance=provenance,
        progress=SilentProgress(),
        onnx=False,
    )
    _, head, body = (tmp_path / "out" / "README.md").read_text().split("---\n", 2)
    found = yaml.safe_load(head)
    assert found["pipeline_tag"] == "image-segmentation"
    (result,) = found["model-index"][0]["results"]
    assert result["metrics"] == [{"type": "mean_iou", "name": "mIoU on val, single scale", "value": 0.5123}]
    assert "from image-level labels and the true masks of 2 images" in body
    assert f"0 background, 1 {CLASSES[0]}" in body
    assert "- mIoU on val, single scale: 51.2 %" in body
    assert "wsss predict --model" in body
    assert "onnxruntime" not in body


def test_the_onnx_lines_of_the_card_run_and_give_the_mask_of_torch(exported: Path, tmp_path: Path):
    card = (exported / "README.md").read_text()
    assert "None: the run was not evaluated" in card
    code = card.split("```python\n")[2].split("```")[0]
    save_noise(tmp_path / "photo.png", (64, 96), seed=3)
    code = code.replace("photo.jpg", str(tmp_path / "photo.png")).replace("FOLDER", str(exported))
    names: dict[str, object] = {}
    exec(code, names)
    expected = wsss.Segmenter.load(exported, device="cpu").predict(tmp_path / "photo.png", scales=[1.0], flip=False)
    assert (names["mask"] == expected).mean() > 0.999


def test_the_exported_net_is_the_trained_one_and_so_are_its_files(exported: Path, segmenter: Path, tmp_path: Path):
    save_noise(tmp_path / "in" / "a.png", (70, 90))
    outs = {"trained": trained_source(segmenter), "exported": exported_source(*read_export(exported))}
    for name, source in outs.items():
        predict_pictures(
            source,
            find_pictures([str(tmp_path / "in")], tmp_path / name).pictures,
            PredictOptions(scales=(0.5, 1.0), flip=True),
            out=tmp_path / name,
            progress=SilentProgress(),
            runtime=Runtime(device="cpu", threads=1),
        )
    for file in ("a.png", "overlays/a.jpg", "areas.csv"):
        assert (tmp_path / "trained" / file).read_bytes() == (tmp_path / "exported" / file).read_bytes()


@pytest.mark.parametrize("name", ["", "model.safetensors", "config.json"])
def test_the_folder_or_a_file_in_it_names_the_model(exported: Path, name: str):
    folder, record = read_export(exported / name)
    assert folder == exported
    assert record.classes[0] == "background"


# -- ONNX -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ONNX_NETS)
def test_onnxruntime_gives_torchs_logits_at_sizes_that_were_not_traced(name: str, tmp_path: Path):
    import onnxruntime

    folder = save_lively_segmenter(tmp_path / "net", ONNX_NETS[name])
    net = load_segmenter(folder)
    data = to_onnx(net)
    record = compare_onnx(net, data)
    assert record.max_abs_difference <= 1e-3 * max(1, record.max_abs_logit)
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    for batch, height, width in [(1, 101, 75), (3, 32, 48), (2, 40, 129)]:
        images = torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(5))
        with torch.inference_mode():
            expected = predict_logits(net, images).numpy()
        (found,) = session.run(["logits"], {"images": images.numpy()})
        assert found.shape == (batch, 3, height, width)
        assert np.abs(found - expected).max() <= 1e-3 * max(1, np.abs(expected).max())
        assert np.abs(expected).max() > 1e-3  # else any two nets would agree


def test_onnx_of_another_net_is_refused_and_nothing_is_written(segmenter: Path, tmp_path: Path, monkeypatch):
    other = to_onnx(load_segmenter(save_lively_segmenter(tmp_path / "other", seed=1)))
    monkeypatch.setattr(export_module, "to_onnx", lambda net, texts: other)
    with pytest.raises(EnvironmentFailure, match="differs from torch"):
        export(segmenter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_onnx_that_does_not_run_is_refused(segmenter: Path):
    with pytest.raises(EnvironmentFailure, match="does not run"):
        compare_onnx(load_segmenter(segmenter), b"no onnx")


def test_a_sample_of_the_data_is_compared_too(segmenter: Path):
    net = load_segmenter(segmenter)
    sample = np.random.default_rng(0).integers(0, 256, (50, 71, 3), dtype=np.uint8)
    record = compare_onnx(net, to_onnx(net), sample=sample)
    assert record.checked_shapes[-1] == (1, 3, 50, 71)
    small = compare_onnx(net, to_onnx(net), sample=sample[:20])  # wsss enlarges it before the net, ONNX does not
    assert small.checked_shapes == record.checked_shapes[:-1]


def test_without_the_extra_the_command_is_said_and_no_onnx_still_works(segmenter: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(export_module, "_NEEDED", ("onnx", "no_such_package"))
    with pytest.raises(EnvironmentFailure, match=r"no_such_package: pip install 'wsss-pipeline\[export\]'"):
        export(segmenter, tmp_path / "out")
    record = export(segmenter, tmp_path / "out", onnx=False)
    assert record.onnx is None
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"README.md", "config.json", "model.safetensors"}


# -- places and damage ------------------------------------------------------------------------------------------------


def test_other_files_are_left_alone_and_an_export_is_replaced_only_on_demand(segmenter: Path, tmp_path: Path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match=r"other files \(thesis.tex\)"):
        export(segmenter, out, onnx=False, force=True)
    (out / "thesis.tex").unlink()
    (out / ".tmp-of-a-killed-export").touch()
    export(segmenter, out)
    with pytest.raises(InputError, match="--force"):
        export(segmenter, out, onnx=False)
    export(segmenter, out, onnx=False, force=True)
    assert not (out / "model.onnx").exists()  # it belonged to the earlier one
    load_export(*read_export(out))


def test_an_export_that_fails_leaves_the_earlier_one_whole(segmenter: Path, copy: Path, monkeypatch):
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    other = save_lively_segmenter(copy.parent / "other", seed=1)
    with monkeypatch.context() as patch:
        patch.setattr(export_module, "write_json", lambda *_: (_ for _ in ()).throw(OSError(28, "disk full")))
        with pytest.raises(OSError, match="disk full"):
            export(other, copy, onnx=False, force=True)
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before
    load_export(*read_export(copy))
    (copy / ".tmp-export").mkdir()
    (copy / ".tmp-export" / "model.safetensors").write_bytes(b"half of it")  # as a killed export leaves it
    export(other, copy, onnx=False, force=True)
    assert {path.name for path in copy.iterdir()} == {"README.md", "config.json", "model.safetensors"}
    assert same_tensors(copy / "model.safetensors", other / "segmenter.safetensors")


@pytest.mark.parametrize("renamed", [0, 1])
def test_an_export_killed_between_its_renames_is_named(copy: Path, tmp_path: Path, monkeypatch, renamed: int):
    other = save_lively_segmenter(tmp_path / "other", seed=1)
    rename, done = Path.replace, []

    def stop(self: Path, target: Path) -> Path:
        if self.parent.name == ".tmp-export" and not self.name.startswith(".tmp-"):
            if len(done) == renamed:
                raise KeyboardInterrupt
            done.append(target)
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            export(other, copy, onnx=False, force=True)
    if renamed:
        with pytest.raises(DamagedFileError, match="export the model again"):
            read_export(copy)
    else:
        read_export(copy)
    export(other, copy, onnx=False, force=True)
    read_export(copy)


def test_damaged_tensors_are_named(copy: Path):
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "model.safetensors").write_bytes(data)
    with pytest.raises(DamagedFileError, match=r"model\.safetensors is damaged"):
        read_export(copy)
    (copy / "model.safetensors").unlink()
    with pytest.raises(DamagedFileError, match=r"model\.safetensors is missing"):
        read_export(copy)


@pytest.mark.parametrize(
    ("change", "error", "reason"),
    [
        ({"kind": "other"}, InputError, "kind: wsss-segmenter"),
        ({"version": 99}, InputError, "expected version 1, found 99"),
        ({"classes": 7}, DamagedFileError, "damaged or was edited"),
        ({"normalisation": {"mean": [0, 0, 0], "std": [1, 1, 1]}}, InputError, "normalisation"),
    ],
)
def test_a_config_that_is_not_ours_is_named(copy: Path, change: dict, error: type[Exception], reason: str):
    path = copy / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(error, match=reason) as found:
        read_export(copy)
    assert str(path) in str(found.value)


@pytest.mark.parametrize(
    "classes", [["background", "bee", "auk"], ["background", "auk", "cat"], ["auk", "background", "bee"]]
)
def test_classes_that_were_edited_are_named_and_not_used(copy: Path, classes: list[str]):
    path = copy / "config.json"
    config = json.loads(path.read_text())
    assert config["classes"] == ["background", "auk", "bee"]
    path.write_text(json.dumps(config | {"classes": classes}))
    with pytest.raises(DamagedFileError, match=r"was edited or belongs to another model: its classes are not") as found:
        wsss.Segmenter.load(copy, device="cpu")
    expected = (
        f"""(classes: expected ["background", "auk", "bee"], found {json.dumps(classes)}); export the model again"""
    )
    assert str(found.value).endswith(expected)


def test_the_config_of_another_export_is_named(segmenter: Path, copy: Path, tmp_path: Path):
    other = tmp_path / "other"
    record = export(segmenter, other, onnx=False)
    config = json.loads((other / "config.json").read_text())
    config["classes"] = [*record.classes[:1], *record.classes[:0:-1]]
    config["files"] = json.loads((copy / "config.json").read_text())["files"]
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(DamagedFileError, match="belongs to another model"):
        read_export(copy)


def test_tensors_without_their_metadata_are_named(copy: Path):
    from safetensors.torch import load, save

    data = save(load((copy / "model.safetensors").read_bytes()))
    (copy / "model.safetensors").write_bytes(data)
    config = json.loads((copy / "config.json").read_text())
    config["files"]["model.safetensors"] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(DamagedFileError, match=r"not those in model\.safetensors \(kind: expected nothing"):
        read_export(copy)


def test_half_a_config_and_no_config_are_told_apart(copy: Path, tmp_path: Path):
    (copy / "config.json").write_text('{"kind": ')
    with pytest.raises(DamagedFileError, match=r"config\.json"):
        read_export(copy)
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(InputError, match="wsss export CONFIG --out DIR"):
            read_export(path)
    with pytest.raises(InputError, match=r"predicts from model\.safetensors"):
        read_export(copy / "model.onnx")


def test_tensors_of_another_net_are_named(copy: Path, tmp_path: Path):
    from safetensors.torch import load, save

    other = save_lively_segmenter(tmp_path / "wide", SMALL.model_copy(update={"channels": 32}))
    metadata = {"format": "pt", **export_module.metadata(read_export(copy)[1])}
    data = save(load((other / "segmenter.safetensors").read_bytes()), metadata)
    (copy / "model.safetensors").write_bytes(data)
    config = json.loads((copy / "config.json").read_text())
    config["files"]["model.safetensors"] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(DamagedFileError, match="does not hold this net"):
        load_export(*read_export(copy))
