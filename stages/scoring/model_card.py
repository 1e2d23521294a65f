"""The README of an exported segmenter: what it is, what it was trained on, its scores, and how to use it.

Pure: made of the record alone, with the metadata block that model hubs read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from stages.scoring.exported_model import ExportRecord

CARD_FILE = "README.md"

SHOWN_SCORES = {
    "segmenter.miou": "mIoU on val, single scale",
    "segmenter.miou_ms": "mIoU on val, multi-scale",
    "segmenter.miou_ms_crf": "mIoU on val, multi-scale and CRF",
    "segmenter.pixel_accuracy": "pixel accuracy on val",
}


def write_card(record: ExportRecord) -> str:
    """The model card as Markdown with a YAML block in front; its numbers are those that ``evaluate`` measured."""
    origin, names = record.provenance, record.classes[1:]
    metrics = origin.get("metrics") or {}
    scores = {text: metrics[name] for name, text in SHOWN_SCORES.items() if isinstance(metrics.get(name), float)}
    net = record.net.model_dump(mode="json")
    body = (net.get("backbone") or {}).get("name") or net.get("encoder")
    head: dict[str, Any] = {
        "library_name": "wsss-pipeline",
        "pipeline_tag": "image-segmentation",
        "tags": ["semantic-segmentation", "weakly-supervised", *(["onnx"] if record.onnx else [])],
    }
    if scores:
        values = [{"type": "mean_iou", "name": text, "value": round(value, 4)} for text, value in scores.items()]
        task = {"type": "image-segmentation"}
        data = {"name": "val of the run", "type": "own"}
        results = [{"task": task, "dataset": data, "metrics": values}]
        head["model-index"] = [{"name": str(origin.get("run") or "segmenter"), "results": results}]
    lines = [
        f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---",
        f"# {origin.get('run') or 'Segmenter'}: {net['name']} on {body}, {len(names)} classes",
        f"Semantic segmentation trained with [wsss-pipeline] {_supervision(origin)}.",
        f"Classes, by mask value: 0 background, {', '.join(f'{i} {name}' for i, name in enumerate(names, start=1))}.",
        "## Scores",
        "\n".join(f"- {text}: {value * 100:.1f} %" for text, value in scores.items())
        or "None: the run was not evaluated when this was exported.",
        "## Use",
        _usage(record),
        "## Limits",
        "It knows the classes above alone; whatever else is in a picture becomes background or the nearest of them. "
        "It was measured on images like those that it was trained on; on others, look at some masks first.",
        "## Where it comes from",
        "\n".join(f"- {name.replace('_', ' ')}: `{text}`" for name, text in _origin(origin).items()),
        "[wsss-pipeline]: `pip install wsss-pipeline`",
    ]
    return "\n\n".join(lines) + "\n"


def _supervision(origin: dict[str, Any]) -> str:
    if origin.get("supervision") == "full":
        return "from true masks"
    count = len(origin.get("mask_supervision") or ())
    return "from image-level labels" + (f" and the true masks of {count:,} images" if count else "")


def _usage(record: ExportRecord) -> str:
    lines = [
        "```",
        "wsss predict --model FOLDER photo.jpg --out masks",
        "```",
        "```python",
        "import wsss",
        'mask = wsss.Segmenter.load("FOLDER").predict("photo.jpg")   # uint8 (H, W)',
        "```",
    ]
    if record.onnx is not None:
        mean, std = record.normalisation.mean, record.normalisation.std
        lines += [
            "```python",
            "import numpy as np, onnxruntime",
            "from PIL import Image",
            'image = np.asarray(Image.open("photo.jpg").convert("RGB"), np.float32) / 255',
            f"image = ((image - {list(mean)}) / {list(std)}).transpose(2, 0, 1)[None].astype(np.float32)",
            'session = onnxruntime.InferenceSession("FOLDER/model.onnx")',
            f'logits = session.run(["{record.onnx.output}"], {{"{record.onnx.input}": image}})[0]   '
            "# (batch, classes, height, width)",
            "mask = logits[0].argmax(0)",
            "```",
        ]
    return "\n".join(lines)


def _origin(origin: dict[str, Any]) -> dict[str, str]:
    packages = origin.get("packages") or {}
    found = {
        "run": origin.get("run"),
        "artifact": origin.get("key"),
        "commit": origin.get("commit"),
        "trained": origin.get("trained"),
        "seed": origin.get("seed"),
        "start": origin.get("init"),
        "torch": packages.get("torch"),
    }
    return {name: str(value) for name, value in found.items() if value is not None}
