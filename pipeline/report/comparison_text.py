"""Write the cells of a comparison: values, intervals and differences as people read them.

Pure: rows in, text out.
"""

from __future__ import annotations

from pipeline.report.comparison import ScoreRow
from pipeline.report.tables import METRICS, MetricText, format_value
from stages.ops.metrics.bootstrap import Interval


def _text_of(row: ScoreRow) -> MetricText:
    counted = any(row.intervals)
    return METRICS.get(row.metric) or MetricText("", row.metric, "", "percent" if counted else "number")


def label_text(row: ScoreRow) -> str:
    """``Segmenter mIoU``; the metric's own name where it has no other."""
    text = _text_of(row)
    return f"{text.group} {text.label}".strip()


def value_text(row: ScoreRow, place: int) -> str:
    """``43.1 % (41.0 … 45.2)``; a dash for a run without this score."""
    value, limits = row.values[place], row.intervals[place]
    if value is None:
        return "–"
    text = format_value(value, _text_of(row).unit)
    return text if limits is None else f"{text} ({limits.low * 100:.1f} … {limits.high * 100:.1f})"


def difference_text(row: ScoreRow, place: int) -> str:
    """``+1.2 (-0.3 … +2.7) ▲ 93 %`` in points of percent; nothing for the run that is compared with."""
    found = row.differences[place]
    if found is None:
        return ""
    if _text_of(row).unit != "percent":
        return f"{found.value:+.3g}"
    text = f"{found.value * 100:+.1f}"
    if found.interval == Interval(0.0, 0.0):
        return "the same"
    if found.interval is not None:
        text += f" ({found.interval.low * 100:+.1f} … {found.interval.high * 100:+.1f})"
    return text if found.better_ratio is None else f"{text} ▲ {found.better_ratio * 100:.0f} %"
