"""The YAML loader: every problem at once, each with path, found value, what is allowed, and the nearest spelling."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field, model_validator

from pipeline.config.run_config import find_config, load_config
from pipeline.config.yaml_models import load_model, load_values
from stages.contracts import StageConfig
from stages.errors import ConfigError
from tests.machine_speed import slowness


class Crf(StageConfig):
    iterations: int = Field(default=10, ge=0)
    weight: float = Field(default=4.0, gt=0)


class Masks(StageConfig):
    threshold: float = Field(ge=0, le=1)
    """Fraction of each map's maximum."""
    refine: Literal["none", "crf"] = "crf"
    crf: Crf = Crf()


class Voc(StageConfig):
    format: Literal["voc"]
    root: Path
    """The folder that holds JPEGImages."""
    classes: tuple[str, ...] | None = None


class Custom(StageConfig):
    format: Literal["custom"]
    root: Path
    labels: Path | None = None
    bias: bool | float = False
    pair: tuple[int, int] = (1, 2)

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, values: Any) -> Any:
        return {"pair": (3, 4), **values}

    @model_validator(mode="after")
    def _check(self) -> Custom:
        if self.labels == self.root:
            raise ValueError("labels must be a file inside root; write labels: labels.csv")
        return self


class Small(StageConfig):
    """A run in miniature."""

    name: str
    seed: int = 0
    flip: bool = True
    data: Annotated[Voc | Custom, Field(discriminator="format")]
    make_masks: Masks
    weights: dict[str, Path] = Field(default_factory=dict)


GOOD = """\
name: demo
data:
  format: voc
  root: VOC2012
make_masks:
  threshold: 0.3
  crf:
    weight: 1e-4
"""


def load(tmp_path: Path, text: str, *overrides: str) -> Small:
    path = tmp_path / "demo.yaml"
    path.write_text(text, encoding="utf-8")
    return load_model(Small, path, overrides)


def problems(tmp_path: Path, text: str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text, *overrides)
    folder = f"{tmp_path}/"
    return [line.replace(folder, "") for line in caught.value.problems or (caught.value.message,)]


def test_good_file_loads_with_scientific_floats(tmp_path: Path) -> None:
    run = load(tmp_path, GOOD)
    assert run.make_masks.crf == Crf(iterations=10, weight=1e-4)
    assert run.data == Voc(format="voc", root=Path("VOC2012"))


@pytest.mark.parametrize(
    ("text", "value"), [("1e-4", 1e-4), ("1E3", 1e3), ("+.5", 0.5), ("5e-1", 0.5), ("2", 2.0), ("-3e2", -300.0)]
)
def test_floats_are_read_as_a_person_means_them(tmp_path: Path, text: str, value: float) -> None:
    if value < 0:
        assert f"found {value}" in problems(tmp_path, GOOD, f"make_masks.crf.weight={text}")[0]
    else:
        assert load(tmp_path, GOOD, f"make_masks.crf.weight={text}").make_masks.crf.weight == value


def test_all_problems_come_at_once_with_path_found_allowed_and_line(tmp_path: Path) -> None:
    text = """\
name: demo
sede: 3
data:
  format: voc
make_masks:
  threshold: 1.5
  refine: crff
  crf:
    iteration: 5
    weight: heavy
"""
    assert problems(tmp_path, text) == [
        "data.root: missing; The folder that holds JPEGImages.  (demo.yaml:4)",
        "make_masks.threshold: expected less than or equal to 1, found 1.5  (demo.yaml:6)",
        "make_masks.refine: expected one of none, crf, found 'crff'; did you mean 'crf'?  (demo.yaml:7)",
        "make_masks.crf.weight: expected a number, found 'heavy'  (demo.yaml:10)",
        "make_masks.crf.iteration: unknown key; did you mean 'iterations'? Allowed here: iterations, weight"
        "  (demo.yaml:9)",
        "sede: unknown key; did you mean 'seed'? Allowed here: name, seed, flip, data, make_masks, weights"
        "  (demo.yaml:2)",
    ]


def test_headline_counts_the_problems(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"demo\.yaml is not a valid config: 2 problems"):
        load(tmp_path, GOOD, "seed=x", "flip=3")


def test_key_of_another_section_is_found(tmp_path: Path) -> None:
    found = problems(tmp_path, GOOD + "threshold: 0.2\n")
    assert found[0].startswith("threshold: unknown key; did you mean 'make_masks.threshold'? Allowed here: name")


def test_duplicate_keys_are_refused_with_both_lines(tmp_path: Path) -> None:
    text = GOOD.replace("  crf:\n", "  crf: {iterations: 1}\n  threshold: 0.4\n  crf:\n")
    assert problems(tmp_path, text) == [
        "make_masks.threshold: written twice, first on line 6; keep one  (demo.yaml:8)",
        "make_masks.crf: written twice, first on line 7; keep one  (demo.yaml:9)",
    ]


def test_merge_keys_are_no_duplicates(tmp_path: Path) -> None:
    text = GOOD.replace("  threshold: 0.3\n", "  <<: {threshold: 0.1, refine: none}\n  threshold: 0.3\n")
    masks = load(tmp_path, text).make_masks
    assert (masks.threshold, masks.refine) == (0.3, "none")


@pytest.mark.parametrize(
    ("format_line", "expected"),
    [
        ("format: vok", "data.format: expected one of voc, custom, found 'vok'; did you mean 'voc'?  (demo.yaml:3)"),
        ("root: .", "data.format: missing; expected one of voc, custom  (demo.yaml:3)"),
    ],
)
def test_union_is_explained_by_its_discriminator(tmp_path: Path, format_line: str, expected: str) -> None:
    assert problems(tmp_path, f"name: x\ndata:\n  {format_line}\nmake_masks: {{threshold: 0}}\n") == [expected]


def test_unknown_key_in_a_union_offers_the_keys_of_the_chosen_member(tmp_path: Path) -> None:
    found = problems(tmp_path, GOOD, "data.label=x")
    assert found == ["data.label: unknown key; remove it. Allowed here: format, root, classes  (--set data.label=x)"]
    found = problems(tmp_path, GOOD, "data.format=custom", "data.lables=x")
    assert "did you mean 'labels'? Allowed here: format, root, labels, bias, pair" in found[0]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("seed='5'", "seed: expected a number, found '5'; write it without quotes"),
        ("seed=true", "seed: expected a number, found true"),
        ("seed=1.5", "seed: expected a whole number, found 1.5"),
        ("flip=1", "flip: expected true or false, found 1"),
        ("name=true", "name: expected text, found true"),
        ("make_masks.threshold=.nan", "make_masks.threshold: expected a finite number, found nan"),
        ("make_masks.crf.weight=.inf", "make_masks.crf.weight: expected a finite number, found inf"),
        ("make_masks.crf=5", "make_masks.crf: expected a section, found 5"),
        ("data.classes=cat", "data.classes: expected a list, found 'cat'"),
        ("data.classes=[cat, [3]]", "data.classes[1]: expected text, found [3]"),
        (
            "data.classes=[cat, null]",
            "data.classes[1]: expected text, found nothing (null); write it in quotes if it is a word",
        ),
        ("weights.vgg16=", "weights.vgg16: expected a path, found nothing (null)"),
    ],
)
def test_wrong_values_name_path_and_value(tmp_path: Path, override: str, expected: str) -> None:
    assert f"{expected}  (--set {override})" in problems(tmp_path, GOOD, override)


def test_items_of_a_list_of_names_are_taken_as_they_are_written(tmp_path: Path) -> None:
    words = ("yes", "no", "on", "off", "true", "007", "1.50", "1e3", "12", "y", "-")
    text = GOOD.replace("  root: VOC2012\n", f"  root: VOC2012\n  classes: [{', '.join(words[:-1])}, '-']\n")
    assert "classes" in text
    assert load(tmp_path, text).data.classes == words
    assert load(tmp_path, text, "data.classes=[no, 2, 1_0]").data.classes == ("no", "2", "1_0")
    assert load(tmp_path, text, "data.classes=[no]", "data.classes=[false]").data.classes == ("false",)
    values = {"name": "demo", "data": {"format": "voc", "root": "VOC2012", "classes": ["a", 3]}}
    values["make_masks"] = {"threshold": 0.3}
    assert load_values(Small, values, [], "a request").data.classes == ("a", "3")
    values["data"] = {"format": "voc", "root": "VOC2012", "classes": ["a", True]}  # yes, on or true: nobody knows
    with pytest.raises(ConfigError) as caught:
        load_values(Small, values, [], "a request")
    expected = "data.classes[1]: expected text, found true; write it in quotes if it is a word"
    assert caught.value.problems == (expected,)


@pytest.mark.parametrize("value", ["010", "-010", "0o10", "0b1", "0x1F", "0x_", "1_000", "1:30", "1_0.5", "1e1_0"])
def test_numbers_that_versions_of_yaml_read_in_different_ways_are_refused(tmp_path: Path, value: str) -> None:
    remedy = "write it in plain decimal digits, without leading zeros, '_', ':' or a prefix such as 0x"
    for override in (f"seed={value}", f"make_masks.crf.weight={value}", f"data.pair=[1, {value}]"):
        name = override.partition("=")[0] + ("[1]" if "pair" in override else "")
        found = problems(tmp_path, GOOD, "data.format=custom", override)
        assert found == [f"{name}: expected a number, found '{value}'; {remedy}  (--set {override})"]
    assert f"seed: expected a number, found '{value}'" in problems(tmp_path, f"{GOOD}seed: {value}\n")[0]
    values = {"name": "x", "data": {"format": "voc", "root": "d"}, "make_masks": {"threshold": 0}, "seed": value}
    with pytest.raises(ConfigError, match=r"1 problem"):
        load_values(Small, values, [], "a request")


@pytest.mark.parametrize(("word", "truth"), [("yes", True), ("On", True), ("no", False), ("OFF", False)])
def test_words_for_truths_are_truths_where_truths_are_asked_for(tmp_path: Path, word: str, truth: bool) -> None:
    run = load(tmp_path, f"{GOOD}flip: {word}\n", f"name={word}", f"data.root={word}", f"weights.{word}={word}")
    assert (run.flip, run.name, run.data.root, run.weights) == (truth, word, Path(word), {word: Path(word)})
    assert f"seed: expected a number, found '{word}'" in problems(tmp_path, GOOD, f"seed={word}")[0]
    assert f"'{word}'" in problems(tmp_path, GOOD, f"make_masks.refine={word}")[0]


@pytest.mark.parametrize("number", ["2012", "007", "1.50", "1e3", "1_0", "-0"])
def test_a_number_where_a_text_is_wanted_is_taken_as_it_is_written(tmp_path: Path, number: str) -> None:
    run = load(tmp_path, f"{GOOD}weights: {{vgg16: {number}}}\n", f"name={number}", f"data.root={number}")
    assert (run.name, run.data.root, run.weights["vgg16"]) == (number, Path(number), Path(number))


def test_validators_before_and_after_work_on_lists_and_whole_models(tmp_path: Path) -> None:
    custom = "name: x\ndata: {format: custom, root: d, pair: [5, 6], bias: 0.5}\nmake_masks: {threshold: 0}\n"
    data = load(tmp_path, custom).data
    assert isinstance(data, Custom)
    assert (data.pair, data.bias) == ((5, 6), 0.5)
    found = problems(tmp_path, custom, "data.labels=d")
    assert found == ["data: labels must be a file inside root; write labels: labels.csv  (demo.yaml:2)"]


def test_overrides_make_sections_and_win_in_order(tmp_path: Path) -> None:
    text = GOOD.replace("  crf:\n    weight: 1e-4\n", "")
    run = load(tmp_path, text, "make_masks.crf.iterations=5", "weights.vgg16=a/b.pth", "seed=1", "seed=2")
    assert (run.make_masks.crf.iterations, run.weights, run.seed) == (5, {"vgg16": Path("a/b.pth")}, 2)


def test_a_malformed_override_hides_no_other_problem(tmp_path: Path) -> None:
    found = problems(tmp_path, GOOD, "seed", "a..b=3", "make_masks.treshold=1")
    assert [line.partition(":")[0] for line in found] == ["--set seed", "--set a..b=3", "make_masks.treshold"]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("seed", "--set seed: expected dotted.path=value"),
        ("a..b=3", "--set a..b=3: expected dotted.path=value"),
        ("name.x=3", "--set name.x=3: name is the value 'demo', not a section"),
        ("seed=[1", "--set seed=[1: not valid YAML"),
        ("name=\x07", r"--set name=\x07: not valid YAML: unacceptable character #x0007"),
    ],
)
def test_malformed_overrides(tmp_path: Path, override: str, expected: str) -> None:
    assert problems(tmp_path, GOOD, override)[0].startswith(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "expected 'key: value' lines at the top level, found an empty file"),
        ("- a\n", "expected 'key: value' lines at the top level, found list at the top level"),
        ("name: [1\nseed: 2\n", "demo.yaml:2: not valid YAML"),
        ("a: &a [*a]\n", "an anchor contains itself"),
        ("name: !!python/name:os.system x\n", "not valid YAML: tags are not read; remove !!python/name:os.system"),
        ("name: !!timestamp foo\n", "demo.yaml:1: not valid YAML: tags are not read; remove !!timestamp"),
        ("name: !!int foo\n", "tags are not read; remove !!int"),
        ("name: !!binary _\n", "tags are not read; remove !!binary"),
        ("name: ! foo\n", "tags are not read; remove !"),
        ("a: &a {<<: *a}\n", "an anchor contains itself"),
        ("a: &a\n  b: {<<: [*a, *a]}\n", "an anchor contains itself"),
        (f"seed: {'9' * 5000}\n", "demo.yaml:1: not valid YAML: a whole number of 5,000 characters"),
        (f"{'9' * 900}: 1\n", "a whole number of 900 characters"),
        (f"name: {'[' * 5000}\n", "more than 32 sections or lists inside each other"),
        (f"name: {'{a: ' * 5000}\n", "more than 32 sections or lists inside each other"),
        ("- a\n" * 6000, "more than 5,000 values"),
        ("#" * 200_000, "expected a config of at most 100,000 characters"),
        ("? [a]\n: 1\n", "expected text as a key"),
        ("1: 2\n", "1: expected text as a key, found 1; quote it"),
    ],
)
def test_files_that_are_no_config(tmp_path: Path, text: str, expected: str) -> None:
    assert expected in "\n".join(problems(tmp_path, text))


LAUGHS = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
LAUGHS += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
MERGES = ["a0: &a0 {x: 1, y: 2}"]
MERGES += [f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}]}}" for n in range(1, 10)]
LADDER = ["a0: &a0 [x]", *(f"a{n}: &a{n} [*a{n - 1}]" for n in range(1, 1000))]


@pytest.mark.parametrize(
    ("rungs", "expected"),
    [
        (LAUGHS, "demo.yaml:4: not valid YAML: more than 5,000 values, each anchor counted as often as it is used"),
        (MERGES, "demo.yaml:4: not valid YAML: more than 5,000 values"),
        (LADDER, "demo.yaml:31: not valid YAML: more than 32 sections or lists inside each other"),
    ],
)
def test_anchors_are_counted_before_anything_is_built_of_them(tmp_path: Path, rungs: list[str], expected: str) -> None:
    began = time.process_time()
    assert expected in problems(tmp_path, "\n".join(rungs))[0]
    inline = "{" + ", ".join(rungs) + "}"
    assert "not valid YAML: more than " in problems(tmp_path, GOOD, f"name={inline}")[0]
    assert time.process_time() - began < 2 * slowness()


def test_the_overrides_together_are_counted_too(tmp_path: Path) -> None:
    overrides = [f"name=[{', '.join('x' * 1000)}]"] * 6
    assert "more than 5,000 values" in problems(tmp_path, GOOD, *overrides)[0]
    assert "expected dotted.path=value" in problems(tmp_path, GOOD, f"{'a.' * 100_000}b=1")[0]
    assert max(map(len, problems(tmp_path, GOOD, f"name=[{'x' * 90_000}"))) < 300


def test_keys_are_shown_short_and_without_control_characters(tmp_path: Path) -> None:
    found = problems(
        tmp_path, f'{GOOD}"a\\e[31m": 1\n? {"k" * 50_000}\n: 1\nseed: {{{"s" * 900}: 1}}\nflip: *{"b" * 50_000}\n'
    )
    assert len(found[0]) < 300
    found = problems(tmp_path, f'{GOOD}"a\\e[31m": 1\n? {"k" * 50_000}\n: 1\nseed: {{{"s" * 900}: 1}}\n')
    assert found[0].startswith("seed: expected a whole number, found a section with sss")
    assert {line.partition(":")[0] for line in found[1:]} == {"a\\x1b[31m", "k" * 100 + "…"}
    assert max(map(len, found)) < 500


def test_anchors_of_a_sensible_size_are_read(tmp_path: Path) -> None:
    text = GOOD.replace("  crf:\n    weight: 1e-4\n", "  crf: &crf\n    weight: 1e-4\n") + "  refine: crf\n"
    merged = text.replace("  crf: &crf\n    weight: 1e-4\n", "  crf:\n    <<: &crf {weight: 1e-4, iterations: 3}\n")
    assert load(tmp_path, text).make_masks.crf == Crf(iterations=10, weight=1e-4)
    assert load(tmp_path, merged).make_masks.crf == Crf(iterations=3, weight=1e-4)


def test_home_and_variables_in_paths_mean_what_a_shell_means(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("DISK", "/disk")
    text = GOOD.replace("root: VOC2012", "root: ~/VOC2012").replace("format: voc", "format: custom")
    run = load(tmp_path, text, "data.labels=$DISK/${DISK}.csv", "weights={vgg16: ~/a.pth}", "name=~/$DISK")
    assert isinstance(run.data, Custom)
    assert (run.data.root, run.data.labels) == (Path("/home/me/VOC2012"), Path("/disk//disk.csv"))
    assert (run.weights, run.name) == ({"vgg16": Path("/home/me/a.pth")}, "~/$DISK")
    monkeypatch.delenv("DISK")
    found = problems(tmp_path, text, "data.labels=$DISK/l.csv", "weights.a=~no-such-user/a", "weights.b=")
    assert sorted(line.partition("  (")[0] for line in found) == [
        "data.labels: $DISK/l.csv: $DISK is not set; write the path in full",
        "weights.a: ~no-such-user/a: there is no user 'no-such-user' on this machine; write the path in full",
        "weights.b: expected a path, found nothing (null)",
    ]
    assert problems(tmp_path, text, 'data.labels="a\\0b"')[0].startswith(
        "data.labels: expected a path, found 'a\\x00b'"
    )


def test_missing_and_binary_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not readable as UTF-8 text"):
        load_model(Small, tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not readable as UTF-8 text"):
        load_model(Small, tmp_path / "binary.yaml")


def test_dates_stay_text(tmp_path: Path) -> None:
    assert load(tmp_path, GOOD, "name=2024-01-01").name == "2024-01-01"


def test_an_option_of_another_method_names_its_owners() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(find_config("demo"), ["train_classifier.method={name: adl, am_mode: joint}"])
    assert caught.value.problems[0].startswith(
        "train_classifier.method.am_mode: unknown key; it is an option of gain, gain_ext: remove it. "
        "Allowed here: name, layers, gamma, drop_rate"
    )


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("last", "'last' means the newest run in every command; give the run another name"),
        ("LAST", "'LAST' means the newest run"),
        ("demo.yaml", "'demo.yaml' would be read as a file; leave .yaml out"),
        ("demo.YML", "leave .YML out"),
    ],
)
def test_a_run_has_no_name_that_commands_read_as_something_else(name: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(find_config("demo"), [f"name={name}"])
    assert expected in str(caught.value)
    assert load_config(find_config("demo"), ["name=lasting"]).name == "lasting"
