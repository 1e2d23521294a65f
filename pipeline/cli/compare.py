"""``wsss compare``: the scores of finished runs side by side, with how certain their differences are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.cli.options import ArtifactsOption, JsonOption, PageColours, PaletteOption, as_path
from pipeline.cli.output import get_output
from pipeline.engine.invocation import DEFAULT_ARTIFACTS
from stages.errors import InputError

if TYPE_CHECKING:
    from rich.table import Table

    from pipeline.report.comparison import Comparison, ScoreRow
    from stages.ops.metrics.bootstrap import Interval


def compare(
    context: typer.Context,
    runs: Annotated[
        list[str],
        typer.Argument(metavar="RUN RUN...", help="Config, run, last, or key or folder of an evaluate artifact."),
    ],
    per_class: Annotated[bool, typer.Option("--per-class", help="Show every class too.")] = False,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", parser=as_path, help="Also write an HTML page.")
    ] = None,
    palette: PaletteOption = PageColours.SAFE,
    artifacts: ArtifactsOption = DEFAULT_ARTIFACTS,
    as_json: JsonOption = False,
) -> None:
    """Compare finished runs with the first: scores, differences, and 95 % intervals over the images."""
    from pipeline.report.comparison import compare_runs, find_scored_run, write_page
    from pipeline.store.artifacts import open_store

    output = get_output(context)
    output.document = {"runs": list(runs), "settings": [], "metrics": [], "classes": [], "notes": [], "page": None}
    if len(runs) < 2:
        raise InputError(f"a comparison needs at least two runs, found {len(runs)}: wsss compare RUN RUN...")
    store = open_store(artifacts)
    found = compare_runs([find_scored_run(word, store) for word in runs])
    output.document = _describe(found) | {"page": out}
    if out is not None:
        write_page(found, out, palette.value)
    if not output.is_json:
        _show(found, per_class=per_class)
    if out is not None:
        output.tell(f"\npage: {out}")


def _describe(found: Comparison) -> dict[str, Any]:
    """The JSON document: fractions, null for what a run does not have."""

    def limits(found: Interval | None) -> dict[str, float | None]:
        return {"low": found.low if found else None, "high": found.high if found else None}

    def describe_row(row: ScoreRow) -> dict[str, Any]:
        values = [
            None if value is None else {"value": value, **limits(interval)}
            for value, interval in zip(row.values, row.intervals, strict=True)
        ]
        differences = [
            None if d is None else {"value": d.value, **limits(d.interval), "better_ratio": d.better_ratio}
            for d in row.differences
        ]
        return {"metric": row.metric, "images": row.num_images, "values": values, "differences": differences}

    return {
        "runs": [{"run": run.word, "title": run.title, "key": run.key, "path": run.path} for run in found.runs],
        "settings": [{"setting": row.name, "values": row.values} for row in found.settings],
        "metrics": [describe_row(row) for row in found.rows],
        "classes": [{"class": row.class_name, **describe_row(row)} for row in found.class_rows],
        "notes": list(found.notes),
    }


def _show(found: Comparison, *, per_class: bool) -> None:
    from pipeline.cli.console import make_console

    console = make_console(is_json=False)
    for number, run in enumerate(found.runs, start=1):
        console.print(f"{number}  {run.title}  {run.word}", markup=False)
    if found.settings:
        console.print(_settings_table(found))
    console.print(_table(found, found.rows))
    if per_class:
        for rows in found.rows_by_metric().values():
            console.print(_table(found, rows))
    for note in found.notes:
        console.print(f"note: {note}", markup=False)
    console.print("(low … high): 95 % bootstrap interval over the images; differences are to run 1")


def _settings_table(found: Comparison) -> Table:
    from rich.markup import escape

    from pipeline.cli.console import make_table

    runs = [escape(f"{number} {run.title}") for number, run in enumerate(found.runs, start=1)]
    table = make_table("set otherwise", *runs)
    for row in found.settings:
        table.add_row(escape(row.name), *(escape("–" if value is None else value) for value in row.values))
    return table


def _table(found: Comparison, rows: Sequence[ScoreRow]) -> Table:
    from rich.markup import escape

    from pipeline.cli.console import make_table
    from pipeline.report.comparison import label_text, table_lines

    title = escape(label_text(rows[0])) if rows and rows[0].class_name else "score"
    runs = [escape(f"{number} {run.title}") for number, run in enumerate(found.runs, start=1)]
    table = make_table(title, *runs, ">images")
    for line in table_lines(rows):
        texts = [(cell["value"], cell["difference"], cell["odds"]) for cell in line["cells"]]
        table.add_row(escape(line["label"]), *("\n".join(filter(None, cell)) for cell in texts), line["images"])
    return table
