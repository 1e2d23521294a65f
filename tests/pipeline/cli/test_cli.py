"""The command line: exit codes, the one JSON document, what is said to people, and what is not imported."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest

from pipeline.cli import doctor
from pipeline.cli import main as cli
from pipeline.cli.doctor import Check, check_packages, check_prefect, check_store
from pipeline.cli.options import as_path
from pipeline.engine import forecast
from pipeline.store.artifacts import Store
from stages.contracts import write_index_mask
from tests.machine_speed import slowness
from tests.pipeline.whole_runs.tiny_run import tiny_yaml

ROOT = Path(__file__).parents[3]
HEAVY = ["torch", "prefect", "albumentations", "cv2", "scipy", "matplotlib"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "tiny.yaml").write_text(tiny_yaml())
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    return tmp_path


@pytest.fixture
def wsss(folder: Path, capsys):
    def call(*words: str, code: int = 0) -> tuple[str, str]:
        found = cli.main(words)
        captured = capsys.readouterr()
        assert found == code, captured.err + captured.out
        return captured.out, captured.err

    return call


@pytest.fixture
def wsss_json(wsss):
    def call(*words: str, code: int = 0) -> dict:
        out, _ = wsss(*words, "--json", code=code)
        assert out.endswith("\n")
        document = json.loads(out)  # fails on a second document
        assert document.get("error", {}).get("code", 0) == code
        return document

    return call


# -- paths ------------------------------------------------------------------------------------------------------------


def test_every_path_of_the_command_line_is_read_in_the_one_way():
    groups = [cli.app, *(group.typer_instance for group in cli.app.registered_groups)]
    seen, odd = 0, []
    for command in (command for group in groups if group for command in group.registered_commands):
        assert command.callback is not None
        for name, hint in get_type_hints(command.callback, include_extras=True).items():
            if "Path" in str(get_args(hint)[:1]):
                seen += 1
                odd += [(command.callback.__name__, name)] if get_args(hint)[1].parser is not as_path else []
    assert odd == []
    assert seen >= 15


def test_home_and_variables_mean_the_same_everywhere(folder: Path, wsss, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(folder / "home"))
    monkeypatch.setenv("PLACE", "place")
    wsss("data", "synthetic", "~/$PLACE", "--num-train=4", "--num-val=2", "--size-px=64")
    assert (folder / "home" / "place" / "labels.csv").is_file()
    (folder / "home" / "tiny.yaml").write_text(tiny_yaml())
    wsss("stage", "prepare_data", "~/tiny.yaml", "--artifacts=~/art")
    assert (folder / "home" / "art" / "prepare_data").is_dir()
    monkeypatch.setenv("WSSS_ARTIFACTS", "$PLACE/art")
    wsss("stage", "prepare_data", "~/tiny.yaml")
    assert (folder / "place" / "art" / "prepare_data").is_dir()
    assert sorted(path.name for path in folder.iterdir()) == ["home", "place", "tiny.yaml"]


@pytest.mark.parametrize(
    "words",
    [
        ("run", "tiny.yaml", "--artifacts=~no-such-user/a"),
        ("run", "~no-such-user/tiny.yaml"),
        ("run", "tiny.yaml", "--set", "weights.vgg16=~no-such-user/a.pth"),
        ("data", "synthetic", "~no-such-user/data"),
        ("report", "tiny.yaml", "--out=~no-such-user/r.html"),
        ("compare", "~no-such-user/a", "tiny.yaml"),
        ("up", "--home=~no-such-user/.prefect"),
        ("predict", "tiny.yaml", "~no-such-user/*.png", "--out=out"),
        ("predict", "--model=~no-such-user/m", "tiny.yaml", "--out=out"),
    ],
)
def test_a_path_that_means_nothing_is_one_line(folder: Path, wsss, words: tuple[str, ...]):
    out, err = wsss(*words, code=2)
    assert out == ""
    assert err.count("there is no user 'no-such-user' on this machine; write the path in full") == 1
    assert [path.name for path in folder.iterdir()] == ["tiny.yaml"]


# -- speed and imports ------------------------------------------------------------------------------------------------


def in_a_process(*words: str) -> tuple[int, float, list[str]]:
    """Exit code, seconds of one core, and the heavy modules that were imported."""
    program = (
        "import json, os, sys; from pipeline.cli.main import main; code = main(sys.argv[1:]); t = os.times(); "
        f"print(json.dumps([code, t.user + t.system, [m for m in {HEAVY} if m in sys.modules]]), file=sys.stderr)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program, *words], capture_output=True, text=True, env=environment, check=True
    )
    code, seconds, modules = json.loads(done.stderr.splitlines()[-1])
    return code, seconds, modules


@pytest.mark.parametrize("words", [("--help",), ("run", "--help"), ("data", "synthetic", "--help"), ("--version",)])
def test_help_answers_at_once(words: tuple[str, ...]):
    code, seconds, modules = in_a_process(*words)
    assert code == 0
    assert modules == []
    assert seconds < 0.5 * slowness()


def test_a_config_error_answers_at_once(folder: Path):
    tries = [in_a_process("run", "tiny.yaml", "--set", "make_masks.treshold=0.2") for _ in range(3)]
    code, seconds, modules = min(tries)
    assert code == 2
    assert modules == []
    assert seconds < 1.0 * slowness()


# -- errors -----------------------------------------------------------------------------------------------------------


def test_a_config_error_is_one_document_with_every_problem(wsss_json):
    document = wsss_json("run", "tiny.yaml", "--set", "make_masks.treshold=2", "--set", "seed=x", code=2)
    assert document["run"] is None
    assert document["config"] == "tiny.yaml"
    assert (document["stages"], document["metrics"], document["report"]) == ([], {}, None)
    problems = document["error"]["problems"]
    assert any("make_masks.treshold" in line and "threshold" in line for line in problems)
    assert any(line.startswith("seed") for line in problems)


def test_a_config_error_in_words_goes_to_stderr(wsss):
    out, err = wsss("run", "tiny.yaml", "--set", "make_masks.treshold=2", code=2)
    assert out == ""
    assert err.startswith("error: ")
    assert "\n  - make_masks.treshold" in err


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("run",), "CONFIG"),
        (("run", "tiny.yaml", "--nonsense"), "--nonsense"),
        (("run", "tiny.yaml", "--engine", "fast"), "prefect"),
    ],
)
def test_a_wrong_command_line_is_exit_2_and_one_document(wsss, wsss_json, words: tuple[str, ...], text: str):
    document = wsss_json(*words, code=2)
    assert text in document["error"]["message"]
    assert document["stages"] == []
    out, err = wsss(*words, code=2)
    assert out == ""
    assert "Usage: wsss run" in err


def test_unknown_command(wsss):
    _, err = wsss("rum", code=2)
    assert "rum" in err


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("--from", "evaluat"), "did you mean 'evaluate'?"),
        (("--force", "masks"), "there is no stage 'masks'"),
        (("--from", "evaluate", "--until", "make_masks"), "--from evaluate comes after --until make_masks"),
    ],
)
def test_wrong_stages_are_refused_before_anything_runs(folder: Path, wsss_json, words: tuple[str, ...], text: str):
    document = wsss_json("run", "tiny.yaml", *words, code=2)
    assert text in document["error"]["message"]
    assert not (folder / "artifacts").exists()


@pytest.mark.parametrize("part", ["9/8", "0/8", "x", "1/0", "3/8/1"])
def test_a_part_that_cannot_be_is_refused_at_once(wsss_json, wsss, part: str):
    words = ("stage", "make_masks", "tiny.yaml", "--part", part)
    message = wsss_json(*words, code=2)["error"]["message"]
    assert message == f"expected a part such as 3/8 (1/8 … 8/8) or any, found '{part}'; parts are counted from 1"
    assert message in wsss(*words, code=2)[1]


def test_parts_of_a_stage_that_has_none_and_forced_parts_are_refused(wsss_json):
    document = wsss_json("stage", "train_classifier", "tiny.yaml", "--part", "any", code=2)
    assert "train_classifier has no parts" in document["error"]["message"]
    assert (document["stages"], document["metrics"]) == ([], {})
    document = wsss_json("stage", "make_masks", "tiny.yaml", "--part", "1/2", "--force", code=2)
    assert "leave --force away" in document["error"]["message"]


def test_a_missing_input_is_exit_3_with_the_command_to_run(wsss_json):
    document = wsss_json("stage", "make_masks", "tiny.yaml", "--set", "seed=3", "--artifacts", "my store", code=3)
    command = "wsss run tiny.yaml --set seed=3 --artifacts 'my store' --until make_attention"
    assert command in document["error"]["message"]


def test_a_store_that_cannot_be_written_is_exit_4(folder: Path, wsss_json):
    (folder / "file").write_text("")
    document = wsss_json("run", "tiny.yaml", "--artifacts", "file", code=4)
    assert "--artifacts DIR" in document["error"]["message"]


def test_a_prefect_api_that_is_away_is_exit_4(folder: Path):
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PREFECT_API_URL": "http://127.0.0.1:9/api",
        "PREFECT_HOME": str(folder / "home"),
    }
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.cli.main", "run", "tiny.yaml", "--json"],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 4, done.stderr
    assert "http://127.0.0.1:9/api does not answer" in json.loads(done.stdout)["error"]["message"]


def test_a_fault_of_ours_is_exit_1_with_a_traceback_on_stderr(wsss, monkeypatch: pytest.MonkeyPatch):
    def broken(*_: object) -> None:
        raise KeyError("unforeseen")

    monkeypatch.setattr("pipeline.engine.records.load_config", broken)
    out, err = wsss("run", "tiny.yaml", "--json", code=1)
    assert "a fault of ours" in json.loads(out)["error"]["message"]
    assert "Traceback (most recent call last)" in err
    assert "KeyError: 'unforeseen'" in err


def test_an_interrupt_is_130(wsss, monkeypatch: pytest.MonkeyPatch):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pipeline.engine.records.load_config", interrupted)
    out, _ = wsss("run", "tiny.yaml", "--json", code=130)
    assert json.loads(out)["error"]["code"] == 130
    _, err = wsss("run", "tiny.yaml", code=130)
    assert "the same command continues" in err
    _, err = wsss("run", "tiny.yaml", "--force", "evaluate", code=130)
    assert "with --force the same command starts over" in err


def test_any_name_can_be_said_on_any_terminal(folder: Path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "pipeline.cli.main", "run", "é\udcff.yaml", "--json"]
    answer = subprocess.run(command, capture_output=True, env=environment)
    assert answer.returncode == 2, answer.stderr
    assert r"é\udcff.yaml" in json.loads(answer.stdout)["error"]["message"]


def test_help_is_no_document(wsss):
    out, _ = wsss("run", "--help", "--json")
    assert out.startswith("Usage: ")
    assert '"stages"' not in out


# -- a run, and what is in the store afterwards -----------------------------------------------------------------------


def test_run_status_artifacts_and_report(folder: Path, wsss, wsss_json):
    assert [stage["state"] for stage in wsss_json("status", "tiny.yaml")["stages"]] == ["missing"] * 6
    assert "wsss run tiny.yaml" in wsss_json("report", "tiny.yaml", code=3)["error"]["message"]

    out, err = wsss("run", "tiny.yaml", "--until", "prepare_data", "--json")
    document = json.loads(out)
    assert set(document) == {"run", "config", "stages", "metrics", "report"}
    (stage,) = document["stages"]
    assert set(stage) == {"stage", "key", "path", "state", "seconds", "metrics"}
    assert (stage["stage"], stage["state"]) == ("prepare_data", "built")
    assert Path(stage["path"], "manifest.json").is_file()
    assert document["metrics"] == {"data.num_train": 6, "data.num_val": 2}
    assert document["report"] is None, "the run has not reached its end"
    assert err.startswith("to build:     prepare_data (not yet built here)\n")
    assert "\n1/6 prepare_data" in err

    out, _ = wsss("run", "tiny.yaml", "--until", "prepare_data")
    assert "1/6 prepare_data        cached" in out
    assert "to build:" not in out
    out, _ = wsss("run", "tiny.yaml", "--until", "prepare_data", "--force", "prepare_data")
    assert "to build:     prepare_data (last time on this machine: " in out
    assert wsss_json("stage", "prepare_data", "tiny.yaml")["stages"][0]["state"] == "cached"
    assert wsss_json("stage", "prepare_data", "tiny.yaml", "--force")["stages"][0]["state"] == "built"

    found = wsss_json("status", "tiny.yaml")["stages"]
    assert [entry["state"] for entry in found] == ["cached"] + ["missing"] * 5
    assert found[0]["size_bytes"] > 0
    assert found[0]["age_s"] >= 0
    out, _ = wsss("status", "tiny.yaml")
    assert out.splitlines()[1].split()[:2] == ["train_classifier", "missing"]

    path = Path(wsss_json("report", "tiny.yaml", "--out", "r.html")["report"])
    assert path.read_text().lower().startswith("<!doctype html>")
    partial = Path(wsss_json("report", "tiny.yaml")["report"])
    assert partial.stem.endswith("-partial"), "a page of an unfinished run never stands where the finished one will"

    check_reproduction(folder, wsss, wsss_json, Path(stage["path"]))
    check_runs(folder, wsss, wsss_json, stage["key"])
    check_artifacts(wsss, wsss_json, stage["key"], Path(stage["path"]))


def check_reproduction(folder: Path, wsss, wsss_json, path: Path) -> None:
    found = wsss_json("reproduce", "tiny")
    assert (found["verdict"], [stage["stage"] for stage in found["stages"]]) == ("equal", ["prepare_data"])
    assert found["stages"][0]["files"] == found["stages"][0]["environment"] == {}
    assert not (folder / "artifacts" / ".reproduced").exists()
    out, _ = wsss("reproduce", "last", "prepare_data", "--out", "again")
    assert out.splitlines()[-1].endswith(": 1 stage reproduced, byte for byte")
    built = folder / "again" / "prepare_data" / path.name
    assert (built / "index.json").read_bytes() == (path / "index.json").read_bytes()

    # what another machine would have built under this key
    beside = Store(folder / "again")
    old = beside.require("prepare_data", path.name)
    with beside.lock("prepare_data", path.name):
        work, _ = beside.work_dir("prepare_data", path.name)
        shutil.copytree(old.path, work, dirs_exist_ok=True)
        (work / "index.json").write_bytes((work / "index.json").read_bytes() + b"\n")
        content = {name: value for name, value in old.content.items() if name != "files"}
        run = {**old.run, "threads": 77, "metrics": {"data.num_train": 5, "data.num_val": 2}}
        beside.publish("prepare_data", path.name, content=content, run=run)
    failed = wsss_json("reproduce", "last", "--out", "again", code=4)
    assert failed["verdict"] == "different"
    assert failed["stages"][0]["files"] == {"index.json": "different"}
    assert failed["stages"][0]["environment"]["threads"][1] == 77
    first, second, third = failed["error"]["problems"]
    assert re.search("built elsewhere: .*threads .* → 77", first), "the environment comes first"
    assert second.endswith("index.json (different)")
    assert third.endswith("1 of 2 metrics differ; 1 by more than 0.01: data.num_train 6 → 5")
    assert wsss_json("reproduce", "last", "--out", "again", "--tolerance", "0.5")["verdict"] == "close"
    assert (
        "is the store of the run itself"
        in wsss_json("reproduce", "last", "--out", "artifacts", code=2)["error"]["message"]
    )
    assert "no run 'nothing'" in wsss_json("reproduce", "nothing", code=2)["error"]["message"]


def check_runs(folder: Path, wsss, wsss_json, key: str) -> None:
    """The run is found again by its name, by last and by the beginning, wherever a config is asked for."""
    wsss("run", "tiny.yaml", "--until", "prepare_data", "--set", "seed=5", "--set", "name=other")
    other, *_ = wsss_json("runs")["runs"]
    assert (other["name"], other["state"], other["metrics"]["data.num_train"]) == ("other", "done", 6)
    out, _ = wsss("runs", "-n", "1")
    assert out.splitlines()[0].startswith(other["run"])
    assert out.splitlines()[1].startswith("and ")
    for word in ("other", "last", other["run"]):
        assert wsss_json("config", "show", word)["values"]["seed"] == 5
        assert wsss_json("status", word)["stages"][0]["key"] == key
    assert wsss_json("config", "show", "last", "--set", "seed=6")["values"]["seed"] == 6
    assert wsss_json("run", "tiny", "--until", "prepare_data")["stages"][0]["state"] == "cached"
    assert "wsss run other" in wsss_json("predict", "other", str(folder), "--out", "x", code=3)["error"]["message"]
    message = wsss_json("status", "othre", code=2)["error"]["message"]
    assert "no config file othre" in message
    assert "no run 'othre'" in message
    wsss("run", "tiny.yaml", "--until", "prepare_data", "--set", "seed=7", "--set", "name=other")
    found = wsss_json("status", "other", code=2)["error"]
    assert found["message"].startswith("'other' means 2 runs")
    assert len(found["problems"]) == 2
    assert wsss_json("status", other["run"])["stages"][0]["key"] == key


def check_artifacts(wsss, wsss_json, key: str, path: Path) -> None:
    (artifact,) = wsss_json("artifacts", "list")["artifacts"]
    assert artifact["key"] == key
    assert key in wsss("artifacts", "list")[0]
    manifest = wsss_json("artifacts", "show", f"prepare_data/{key[:6]}")["manifest"]
    assert manifest["content"]["key"] == key
    assert "no artifact ffff" in wsss_json("artifacts", "show", "ffff", code=3)["error"]["message"]

    assert wsss_json("artifacts", "verify") == {"verified": 1, "problems": []}
    edited = path / "manifest.json"
    text = edited.read_bytes()
    edited.write_bytes(text.replace(b'"data.num_train": 6', b'"data.num_train": 9'))
    run, *_ = wsss_json("runs")["runs"]
    told = f"{Path('artifacts', 'prepare_data', key, 'manifest.json')} was edited: its content differs from its own"
    assert run["metrics"] == {}
    assert told in run["damaged"]["prepare_data"]
    assert f"without the metrics of prepare_data: {told}" in wsss("runs")[0]
    assert told in wsss_json("artifacts", "list")["damaged"][0]
    assert f"damaged, and left out: {told}" in wsss("artifacts", "list")[0]
    edited.write_bytes(text)
    assert wsss_json("runs")["runs"][0]["damaged"] == {}

    index = path / "index.json"
    text = index.read_bytes()
    index.write_bytes(text.replace(b"6", b"7", 1))  # the same size: only the digest tells
    (problem,) = wsss_json("artifacts", "verify", key, code=4)["problems"]
    assert str(index) in problem
    index.write_bytes(text)

    record = path.parents[1] / "runs" / "odd.json"
    record.write_text("[" * 100_000)
    for words in (("verify",), ("prune",)):
        error = wsss_json("artifacts", *words, code=4)["error"]
        assert f"{record} is not readable JSON (nested too deeply)" in " ".join([error["message"], *error["problems"]])
    record.unlink()

    assert wsss_json("artifacts", "prune")["entries"] == [], "the run needs it"
    assert wsss_json("artifacts", "prune", "--keep", "0")["removed"] is False
    assert path.is_dir(), "nothing is removed without --yes"
    wsss("artifacts", "prune", "--keep", "0", "--yes")
    assert not path.exists()


# -- data and config --------------------------------------------------------------------------------------------------


def test_data_synthetic_then_check_finds_what_was_broken(folder: Path, wsss, wsss_json):
    made = wsss_json("data", "synthetic", "made", "--num-train", "5", "--num-val", "2", "--num-classes", "2")
    assert made == {"folder": "made", "num_train": 5, "num_val": 2}
    assert len(list((folder / "made/JPEGImages").iterdir())) == 7
    options = (
        "data={format: custom, root: made, images: JPEGImages, masks: SegmentationClass, "
        "train_list: made/ImageSets/Segmentation/train.txt, val_list: made/ImageSets/Segmentation/val.txt}"
    )
    fine = wsss_json("data", "check", "tiny.yaml", "--set", options)
    assert fine["problems"] == []
    understood = fine["understood"]
    assert (understood["num_images"], understood["splits"], understood["unused_masks"]) == (
        7,
        {"train": 5, "val": 2},
        [],
    )
    assert [entry["name"] for entry in understood["classes"]] == ["auk", "bee"]
    said = wsss("data", "check", "tiny.yaml", "--set", options)[0]
    assert "7 images: 5 train, 2 val; height 96, width 96 px" in said
    assert "1 auk: " in said
    assert "is fine" in said

    first = sorted((folder / "made/JPEGImages").iterdir())[0]
    first.write_bytes(first.read_bytes()[:300])
    document = wsss_json("data", "check", "tiny.yaml", "--set", options, code=2)
    assert any(first.name in problem for problem in document["problems"])
    assert document["error"]["problems"] == document["problems"]


def test_data_check_reads_corrected_masks_with_all_else(folder: Path, wsss, wsss_json):
    wsss("data", "synthetic", "made", "--num-train", "5", "--num-val", "2", "--num-classes", "2", "--size-px", "64")
    data = "data={format: custom, root: made, images: JPEGImages, masks: null}"
    words = ("data", "check", "tiny.yaml", "--set", data, "--set", "train_segmenter.corrected_masks=by hand")
    (problem,) = wsss_json(*words, code=2)["problems"]
    assert problem.startswith("train_segmenter.corrected_masks: by hand: there is no such folder")
    for name, value in (("train_00000", 0), ("train_00001", 3), ("train_00002", 3)):
        write_index_mask(folder / "by hand" / f"{name}.png", np.full((64, 64), value, dtype=np.uint8))
    (folder / "made/JPEGImages/train_00004.jpg").write_bytes(b"no image")
    document = wsss_json(*words, code=2)
    assert [problem.split(": ")[0] for problem in document["problems"]] == [
        "made/JPEGImages/train_00004.jpg",
        "train_segmenter.corrected_masks",
        "train_segmenter.corrected_masks",
    ]
    assert "values 3 are no class (allowed: 0 … 2 and 255)" in document["problems"][1]


def test_data_check_shortens_for_people_and_lists_all_for_programs(folder: Path, wsss, wsss_json):
    wsss("data", "synthetic", "made", "--num-train", "5", "--num-val", "2", "--num-classes", "2")
    labels = folder / "made/labels.csv"
    labels.write_text(labels.read_text() + "".join(f"ghost{n},bee\n" for n in range(1000)) + "x\x1b[2J,bee\n")
    options = "data={format: custom, root: made, images: JPEGImages, masks: SegmentationClass}"
    document = wsss_json("data", "check", "tiny.yaml", "--set", options, code=2)
    assert len(document["problems"]) == len(document["error"]["problems"]) == 1001
    assert document["understood"]["num_images"] == 7
    out, err = wsss("data", "check", "tiny.yaml", "--set", options, code=2)[:2]
    assert "\x1b" not in out + err
    assert r"'x\x1b[2J' names no image: it has the control character U+001B; rename the file" in err
    assert "… and 975 more like the last one; `wsss data check --json` lists all" in err
    assert err.count("ghost") == 25
    assert "1,001 problems in the data set of tiny.yaml" in err


def test_wrong_options_of_the_synthetic_set_are_named_as_flags(folder: Path, wsss_json):
    document = wsss_json("data", "synthetic", "made", "--size-px", "16", "--head-ratio", "0.9", code=2)
    flags = [problem.split(":")[0] for problem in document["error"]["problems"]]
    assert flags == ["--size-px", "--head-ratio"]
    assert not (folder / "made").exists()


def test_config_show_has_every_default_and_check_counts(wsss, wsss_json):
    values = wsss_json("config", "show", "tiny.yaml", "--set", "seed=4")["values"]
    assert values["seed"] == 4
    assert values["train_segmenter"]["supervision"] == "weak"
    shown = wsss("config", "show", "tiny.yaml")[0]
    assert "supervision: weak" in shown
    # options that came later are in no key while they are at their default, and a user must know of them
    assert values["train_segmenter"]["training"]["accumulate_steps"] == 1
    assert "ema_decay: null" in shown
    checked = wsss_json("config", "check", "tiny.yaml")
    assert len(checked["classes"]) == 2
    assert checked["images"]["train"] == 6


def test_shipped_configs_are_found_by_name(wsss_json):
    assert wsss_json("config", "show", "demo")["values"]["name"] == "demo"


def test_version(wsss):
    assert wsss("--version")[0] == f"wsss {cli.version()}\n"


# -- doctor -----------------------------------------------------------------------------------------------------------


def test_doctor_says_what_to_do_and_ends_with_4(wsss, wsss_json, monkeypatch: pytest.MonkeyPatch):
    checks = [Check("packages", "ok", "31 requirements met"), Check("device", "failed", "no torch", "install it")]
    monkeypatch.setattr(doctor, "examine", lambda artifacts: checks)
    document = wsss_json("doctor", code=4)
    assert document["checks"][1] == {"name": "device", "status": "failed", "found": "no torch", "remedy": "install it"}
    assert document["error"]["problems"] == ["device: no torch; install it"]
    out, err = wsss("doctor", code=4)
    assert "FAILED   device    no torch  → install it" in out
    assert "not fit for a run" in err


def test_doctor_checks_find_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    found = check_packages(["numpy>=1", "numpy<1", "nosuchpackage>=2", "hypothesis>99; extra == 'dev'"])
    assert found.status == "failed"
    assert "numpy<1 (found" in found.found
    assert "nosuchpackage>=2 (found none)" in found.found
    assert found.remedy == "pip install 'numpy<1' 'nosuchpackage>=2'"
    assert check_packages(["numpy>=1"]).status == "ok"
    assert check_store(tmp_path / "not" / "yet").status in ("ok", "warning")
    monkeypatch.setattr(forecast, "MIN_FREE_BYTES", 1e18)
    failed = doctor.run_check("store", lambda: check_store(tmp_path))
    assert (failed.status, "wsss artifacts prune" in failed.found) == ("failed", True)


def test_doctor_asks_the_prefect_server_that_is_set(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    assert (check_prefect().status, "wsss up" in check_prefect().found) == ("ok", True)
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    found = doctor.run_check("prefect", check_prefect)
    assert (found.status, "http://127.0.0.1:9/api does not answer" in found.found) == ("failed", True)


def test_a_check_that_raises_is_a_failed_check():
    def broken() -> Check:
        raise RuntimeError("operator torchvision::nms does not exist")

    found = doctor.run_check("device", broken)
    assert found.status == "failed"
    assert "torchvision::nms" in found.found
    assert "constraints.txt" in found.remedy


# -- score ------------------------------------------------------------------------------------------------------------


def test_score_says_every_class_and_what_is_left_out(folder: Path, wsss, wsss_json):
    for name, values in {"t/a": [[0, 0, 1, 255]], "p/a": [[0, 1, 1, 1]], "p/b": [[0]]}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        write_index_mask(folder / f"{name}.png", np.array(values, np.uint8))
    found = wsss_json("score", "t", "p", "--classes", "cat,dog")
    assert found["iou"] == {"background": 0.5, "cat": 0.5, "dog": None}
    assert (found["miou"], found["images"], found["not_scored"]) == (0.5, 1, ["b.png"])
    out, _ = wsss("score", "t", "p")
    assert out.splitlines()[-2] == "mIoU 50.0 %, pixel accuracy 66.7 %, 1 images"
    assert "p have no true mask and are not scored: b.png" in out
    assert "cannot be scored" in wsss_json("score", "p", "t", code=2)["error"]["message"]


# -- the shell's completion --------------------------------------------------------------------------------------------


def completed(line: str) -> list[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "_WSSS_COMPLETE": "complete_bash"}
    environment |= {"COMP_WORDS": line, "COMP_CWORD": str(len(line.split(" ")) - 1)}
    program = "import sys; from pipeline.cli.main import main; sys.exit(main([]))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True)
    return done.stdout.split()


def test_a_shell_completes_commands_configs_files_and_runs(folder: Path):
    assert {"run", "report", "reproduce"} <= set(completed("wsss r"))
    (folder / "artifacts" / "runs").mkdir(parents=True)
    (folder / "artifacts" / "runs" / "tiny-20260101-1.json").write_text("{}")
    assert completed("wsss run tin") == ["tiny-20260101-1", "tiny.yaml"]
    assert completed("wsss status custom") == ["custom", "custom_gpu"]
