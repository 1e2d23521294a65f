import pytest
import torch
from pydantic import TypeAdapter

from stages.contracts import ClassList, write_json
from stages.errors import DamagedFileError
from stages.nets.segmenters.build import build_segmenter
from stages.nets.segmenters.config import SegmenterConfig
from stages.nets.segmenters.files import load_segmenter, read_segmenter_record, save_segmenter

NETS = [
    {"name": "largefov", "backbone": {"name": "small"}},
    {"name": "deeplabv3plus", "encoder": "resnet18", "decoder_channels": 16},
]


def make(fields):
    config = TypeAdapter(SegmenterConfig).validate_python(fields)
    return config, build_segmenter(config, 3, init="random", weights={})


@pytest.mark.parametrize("fields", NETS, ids=lambda fields: fields["name"])
def test_a_saved_segmenter_comes_back_with_the_same_answers(fields, tmp_path):
    config, segmenter = make(fields)
    segmenter(torch.randn(2, 3, 32, 32))  # moves the BatchNorm statistics
    save_segmenter(tmp_path, config, segmenter, ClassList(names=("cat", "dog")))
    state = torch.get_rng_state()
    loaded = load_segmenter(tmp_path, "cpu")
    assert torch.equal(torch.get_rng_state(), state)
    images = torch.randn(1, 3, 33, 49)
    assert not loaded.training
    with torch.no_grad():
        assert torch.equal(loaded(images), segmenter.eval()(images))
    record = read_segmenter_record(tmp_path)
    assert (record.net, record.num_classes, record.classes) == (config, 3, ("cat", "dog"))


def test_equal_segmenters_give_equal_bytes(tmp_path):
    config, segmenter = make(NETS[0])
    for name in ("a", "b"):
        save_segmenter(tmp_path / name, config, segmenter, ["cat", "dog"])
    for file in ("segmenter.json", "segmenter.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_names_must_fit_the_net(tmp_path):
    config, segmenter = make(NETS[0])
    with pytest.raises(ValueError, match="the net scores 3 classes, expected background and 1 names"):
        save_segmenter(tmp_path, config, segmenter, ["cat"])
    assert list(tmp_path.iterdir()) == []


def test_damage_is_named(tmp_path):
    with pytest.raises(DamagedFileError, match=r"segmenter\.json is not readable JSON"):
        load_segmenter(tmp_path)
    write_json(tmp_path / "segmenter.json", {"net": {"name": "unheard"}})
    with pytest.raises(DamagedFileError, match="is no SegmenterRecord of this version; rebuild train_segmenter"):
        load_segmenter(tmp_path)
    config, segmenter = make(NETS[0])
    save_segmenter(tmp_path, config, segmenter, ["cat", "dog"])
    (tmp_path / "segmenter.safetensors").write_bytes(b"")
    with pytest.raises(DamagedFileError, match=r"segmenter\.safetensors does not hold this net"):
        load_segmenter(tmp_path)
