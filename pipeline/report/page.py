"""Write the report of a run: one self-contained HTML page.

Reads the artifacts of a run and their manifests; writes one HTML file.  The page needs no network and no
script: pictures are data URIs, charts inline SVG, and everything that comes from the run is escaped.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import yaml

from pipeline.delivery.submission import archive_command
from pipeline.report.charts import LineChart, line_chart
from pipeline.report.confusion_picture import MatrixPicture, matrix_picture
from pipeline.report.picture_sections import legend_entries, load_confusions, show_examples
from pipeline.report.pictures import colour_css
from pipeline.report.step_rows import step_rows
from pipeline.report.tables import ClassTable, class_table, format_seconds, format_time, metric_rows, stage_rows
from stages.contracts import ImageSet, open_image_set, read_json, write_atomic
from stages.ops.metrics.confusion import SparseConfusions

if TYPE_CHECKING:
    from pipeline.config.run_config import RunConfig

CARDS = ("attention.miou", "masks.miou", "segmenter.miou", "segmenter.miou_ms", "localization.top1_loc")
HARDWARE = ("host", "machine", "cpu", "cores", "memory", "device")
"""What the ``run`` part of a manifest may say of the machine, in the order of the page."""
WATCHED = {"peak_logit": "logit", "mined": "share", "recall": "share", "kept": "share"}
"""What methods log beside their losses, with its unit: on charts of their own."""
NOT_CURVES = frozenset({"step", "epoch", "learning_rate", *WATCHED})


def build_report(
    run: RunConfig,
    artifacts: Mapping[str, Path],
    manifests: Mapping[str, Mapping[str, Any]],
    data_root: Path | None,
    out: Path,
    *,
    states: Mapping[str, str] | None = None,
) -> Path:
    """Write the report of ``run`` to ``out``; parts whose stage did not run are left out with one sentence.

    Args:
        run: The run's config.
        artifacts: Folder of each stage that ran or was cached, by stage name; prepare_data may be all there is.
        manifests: ``manifest.json`` of the same stages.
        data_root: Folder of the user's data; None where prepare_data generated the data.
        out: The HTML file to write, atomically.
        states: built, cached, resumed, skipped or failed by stage name, where the report follows a run.

    Returns:
        ``out``.
    """
    config = run.model_dump(mode="json")
    images = open_image_set(artifacts["prepare_data"], data_root) if "prepare_data" in artifacts else None
    confusions = load_confusions(artifacts)
    metrics = _merge_metrics(manifests)
    rows = metric_rows(metrics)
    context = {
        "name": run.name,
        "summary": _summarise(config, images, manifests),
        "facts": [*_facts(config, manifests), *_predictions(run, artifacts), *_archive(run, artifacts)],
        "cards": [row for name in CARDS for row in rows if row.name == name],
        "metrics": rows,
        "class_table": _class_table(confusions, images),
        "matrix": _matrix(confusions, images),
        "losses": _loss_charts(artifacts),
        "sweep": _sweep(artifacts),
        "steps": step_rows(metrics),
        "legend": legend_entries(images.index.classes) if images else [],
        "colours": [colour_css(index) for index in range(256)],
        "stages": stage_rows(manifests, states or {}),
        "config": yaml.safe_dump(config, sort_keys=False, allow_unicode=True),
        "packages": _packages(manifests),
        **show_examples(images, artifacts, confusions, run.evaluate.written_score),
    }
    template = _environment().get_template("report.html")
    write_atomic(out, template.render(context).encode())
    return out


@cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("pipeline.report", ""), autoescape=True, undefined=jinja2.StrictUndefined
    )


# ---------------------------------------------------------------------------------------------------------------------
# Header
# ---------------------------------------------------------------------------------------------------------------------


def _summarise(config: Mapping[str, Any], images: ImageSet | None, manifests: Mapping[str, Mapping[str, Any]]) -> str:
    """One sentence: what was trained on what, every use of true masks named."""
    supervision = _dig(config, "train_segmenter", "supervision")
    labels = "true masks (the upper bound)" if supervision == "full" else "image-level labels"
    masks = {stage: len(_dig(manifest, "content", "mask_supervision") or ()) for stage, manifest in manifests.items()}
    seen = [] if supervision == "full" else [f"the true masks of {n:,} ({stage})" for stage, n in masks.items() if n]
    if _dig(config, "train_segmenter", "init") == "coco":
        seen.append("a backbone trained on COCO's pixel masks")
    count = f"{len(images.index.splits.get('train', ())):,} training images with " if images else ""
    return f"Semantic segmentation from {' and '.join([count + labels, *seen])}, supervision: {supervision or 'weak'}."


def _facts(config: Mapping[str, Any], manifests: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str]]:
    runs = [manifest["run"] for manifest in manifests.values()]
    segmenter = _dig(config, "train_segmenter", "net")
    body = _dig(segmenter, "backbone", "name") or _dig(segmenter, "encoder")
    facts = {
        "Data": f"{_dig(config, 'data', 'format')} {_dig(config, 'data', 'root') or ''}",
        "Method": f"{_dig(config, 'train_classifier', 'method', 'name')}",
        "Classifier": f"{_dig(config, 'train_classifier', 'backbone', 'name')}",
        "Segmenter": " on ".join(str(part) for part in (_dig(segmenter, "name"), body) if part),
        "Starts from": f"{_dig(config, 'train_segmenter', 'init')}",
        "Seed": str(config.get("seed", "")),
        "Started": format_time(min((str(run["started"]) for run in runs if run.get("started")), default="")),
        "Stage time": format_seconds(sum(run.get("seconds") or 0.0 for run in runs)),
        "Hardware": _join_distinct(", ".join(_texts(run, HARDWARE)) for run in runs),
        "Code": _join_distinct(_shorten_revision(text) for run in runs for text in _texts(run, ("revision",))),
        "Python": _join_distinct(text for run in runs for text in _texts(run, ("python",))),
    }
    return [(label, value.strip()) for label, value in facts.items() if value.strip() not in ("", "None")]


def _predictions(run: RunConfig, artifacts: Mapping[str, Path]) -> list[tuple[str, str]]:
    """Which masks the pictures, the files and an archive hold."""
    is_predicted = run.evaluate.segmentation and "evaluate" in artifacts
    return [("Predictions", run.evaluate.describe_predictions())] if is_predicted else []


def _archive(run: RunConfig, artifacts: Mapping[str, Path]) -> list[tuple[str, str]]:
    """How to make the test server's archive, where this run has predicted the images for it."""
    command = archive_command(run) if "evaluate" in artifacts else None
    return [] if command is None else [("Test archive", command)]


def _dig(value: object, *path: str) -> Any:  # noqa: ANN401 - JSON is any
    """The value at ``path`` in nested dictionaries, or None."""
    for name in path:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _texts(run: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """What the ``run`` part of a manifest says under ``names``."""
    return [str(run[name]) for name in names if run.get(name) not in (None, "")]


def _shorten_revision(revision: str) -> str:
    """``1234567890ab… +`` as the first ten digits, and in words that files differed from the commit."""
    commit = revision.removesuffix("+")
    return f"{commit[:10]}, with changes" if revision.endswith("+") else commit[:10]


def _join_distinct(texts: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(text for text in texts if text))


def _packages(manifests: Mapping[str, Mapping[str, Any]]) -> str:
    packages: dict[str, str] = {}
    for manifest in manifests.values():
        packages.update(manifest["run"].get("packages") or {})
    return "\n".join(f"{name}=={version}" for name, version in sorted(packages.items()))


# ---------------------------------------------------------------------------------------------------------------------
# Numbers and charts
# ---------------------------------------------------------------------------------------------------------------------


def _merge_metrics(manifests: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for manifest in manifests.values():
        merged.update(manifest["run"].get("metrics") or {})
    return merged


def _class_table(confusions: Mapping[str, SparseConfusions], images: ImageSet | None) -> ClassTable | None:
    scored = {thing: counts for thing, counts in confusions.items() if len(counts.ids)}
    return class_table(scored, images.index.classes) if scored and images else None


def _matrix(confusions: Mapping[str, SparseConfusions], images: ImageSet | None) -> MatrixPicture | None:
    """The confusions of the segmenter, or of the pseudo-masks where no segmenter was scored."""
    for thing, title in (("segmenter", "the segmenter, single scale, on val"), ("masks", "the pseudo-masks")):
        if images and thing in confusions and confusions[thing].count.size:
            names = images.index.classes.names_with_background
            return matrix_picture(title, confusions[thing].total(), names)
    return None


def _loss_charts(artifacts: Mapping[str, Path]) -> list[LineChart]:
    charts = []
    for stage, title in (("train_classifier", "Classifier"), ("train_segmenter", "Segmenter")):
        path = artifacts[stage] / "history.json" if stage in artifacts else None
        history = read_json(path) if path is not None and path.is_file() else []
        if history:
            charts += [_loss_chart(title, history), *_watch_charts(title, history)]
    return charts + _validation_charts(artifacts)


def _validation_charts(artifacts: Mapping[str, Path]) -> list[LineChart]:
    """The segmenter on its held-out training images, where it was looked at."""
    path = artifacts["train_segmenter"] / "validation.json" if "train_segmenter" in artifacts else None
    if path is None or not path.is_file():
        return []
    found = read_json(path)
    return [
        line_chart(
            f"Segmenter on {len(found['held_out'])} held-out images, against their {found['compared_with']}",
            x_label="step",
            y_label="%",
            x=[look["step"] for look in found["curve"]],
            lines={
                label: [100 * look[name] for look in found["curve"]]
                for name, label in (("miou", "mIoU"), ("pixel_accuracy", "pixel accuracy"))
            },
            marks={f"best {found['best_step']}": float(found["best_step"])},
        )
    ]


def _watch_charts(title: str, history: Sequence[Mapping[str, float]]) -> list[LineChart]:
    """One chart for each unit of what was watched."""
    found = {unit: [name for name in history[0] if WATCHED.get(name) == unit] for unit in sorted({*WATCHED.values()})}
    return [
        line_chart(
            f"{title}: {', '.join(name.replace('_', ' ') for name in names)}",
            x_label="epoch",
            y_label=unit,
            x=[entry["epoch"] for entry in history],
            lines={name.replace("_", " "): [entry.get(name, float("nan")) for entry in history] for name in names},
        )
        for unit, names in found.items()
        if names
    ]


def _loss_chart(title: str, history: Sequence[Mapping[str, float]]) -> LineChart:
    names = [name for name in history[0] if name not in NOT_CURVES]
    names.sort(key=lambda name: (name != "loss", name))
    rates = [entry.get("learning_rate", 0.0) for entry in history]
    return line_chart(
        title,
        x_label="epoch",
        y_label="loss",
        x=[entry["epoch"] for entry in history],
        lines={name.replace("_", " "): [entry.get(name, float("nan")) for entry in history] for name in names},
        faint={f"learning rate (peak {max(rates):.3g})": rates} if any(rates) else None,
    )


def _sweep(artifacts: Mapping[str, Path]) -> dict[str, Any] | None:
    path = artifacts["evaluate"] / "sweep.json" if "evaluate" in artifacts else None
    if path is None or not path.is_file():
        return None
    sweep = read_json(path)
    marks = {
        f"{name} {sweep[name]:.2f}": float(sweep[name])
        for name in ("configured", "oracle")
        if sweep.get(name) is not None
    }
    chart = line_chart(
        "mIoU of the attention maps by threshold",
        x_label="threshold, fraction of each map's maximum",
        y_label="mIoU, %",
        x=sweep["thresholds"],
        lines={"attention mIoU": [100.0 * value for value in sweep["miou"]]},
        marks=marks,
    )
    return {**sweep, "chart": chart}
