"""The command line: exit codes, the one JSON document, what is said to people, and what is not imported."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pipeline.cli import doctor
from pipeline.cli import main as cli
from pipeline.cli.doctor import Check, check_packages, check_prefect, check_store
from pipeline.engine import forecast
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
    assert "http://127.0.0.1:9/api/ does not answer" in json.loads(done.stdout)["error"]["message"]


def test_a_fault_of_ours_is_exit_1_with_a_traceback_on_stderr(wsss, monkeypatch: pytest.MonkeyPatch):
    def broken(*_: object) -> None:
        raise KeyError("unforeseen")

    monkeypatch.setattr("pipeline.config.run_config.load_config", broken)
    out, err = wsss("run", "tiny.yaml", "--json", code=1)
    assert "a fault of ours" in json.loads(out)["error"]["message"]
    assert "Traceback (most recent call last)" in err
    assert "KeyError: 'unforeseen'" in err


def test_an_interrupt_is_130(wsss, monkeypatch: pytest.MonkeyPatch):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pipeline.config.run_config.load_config", interrupted)
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
    assert "é\udcff.yaml" in json.loads(answer.stdout)["error"]["message"]


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
    check_artifacts(wsss, wsss_json, stage["key"], Path(stage["path"]))


def check_reproduction(folder: Path, wsss, wsss_json, path: Path) -> None:
    assert "'tiny' means 2 runs" in wsss_json("reproduce", "tiny", code=2)["error"]["message"]
    found = wsss_json("reproduce", "last")
    assert (found["verdict"], [stage["stage"] for stage in found["stages"]]) == ("equal", ["prepare_data"])
    assert found["stages"][0]["files"] == found["stages"][0]["environment"] == {}
    assert not (folder / "artifacts" / ".reproduced").exists()
    out, _ = wsss("reproduce", "last", "prepare_data", "--out", "again")
    assert out.splitlines()[-1].endswith(": 1 stage reproduced, byte for byte")
    built = folder / "again" / "prepare_data" / path.name
    assert (built / "index.json").read_bytes() == (path / "index.json").read_bytes()

    # a store whose artifact says that it has other bytes, as another machine's would
    manifest = json.loads((built / "manifest.json").read_text())
    manifest["content"]["files"]["index.json"]["sha256"] = "0" * 64
    manifest["run"] |= {"threads": 77, "metrics": {"data.num_train": 5, "data.num_val": 2}}
    (built / "manifest.json").write_text(json.dumps(manifest))
    failed = wsss_json("reproduce", "last", "--out", "again", code=4)
    assert failed["verdict"] == "different"
    assert failed["stages"][0]["files"] == {"index.json": "different"}
    assert failed["stages"][0]["environment"]["threads"][1] == 77
    first, second, third = failed["error"]["problems"]
    assert re.search("built elsewhere: .*threads .* → 77", first), "the environment comes first"
    assert second.endswith("index.json (different)")
    assert third.endswith("1 of 2 metrics differ; 1 by more than 0.01: data.num_train 6 → 5")
    assert wsss_json("reproduce", "last", "--out", "again", "--tolerance", "0.5")["verdict"] == "close"
    assert "no run 'nothing'" in wsss_json("reproduce", "nothing", code=2)["error"]["message"]


def check_artifacts(wsss, wsss_json, key: str, path: Path) -> None:
    (artifact,) = wsss_json("artifacts", "list")["artifacts"]
    assert artifact["key"] == key
    assert key in wsss("artifacts", "list")[0]
    manifest = wsss_json("artifacts", "show", f"prepare_data/{key[:6]}")["manifest"]
    assert manifest["content"]["key"] == key
    assert "no artifact ffff" in wsss_json("artifacts", "show", "ffff", code=3)["error"]["message"]

    assert wsss_json("artifacts", "verify") == {"verified": 1, "problems": []}
    index = path / "index.json"
    text = index.read_bytes()
    index.write_bytes(text.replace(b"6", b"7", 1))  # the same size: only the digest tells
    (problem,) = wsss_json("artifacts", "verify", key, code=4)["problems"]
    assert str(index) in problem
    index.write_bytes(text)

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
    assert "is fine" in wsss("data", "check", "tiny.yaml", "--set", options)[0]

    first = sorted((folder / "made/JPEGImages").iterdir())[0]
    first.write_bytes(first.read_bytes()[:300])
    document = wsss_json("data", "check", "tiny.yaml", "--set", options, code=2)
    assert any(first.name in problem for problem in document["problems"])
    assert document["error"]["problems"] == document["problems"]


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
    found = check_prefect()
    assert (found.status, found.found.startswith("http://127.0.0.1:9/api does not answer")) == ("failed", True)


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
