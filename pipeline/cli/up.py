"""``wsss up`` and ``wsss down``: a server, workers and what keeps them alive, on this machine."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.cli.options import JsonOption
from pipeline.cli.output import Output, get_output
from pipeline.engine.invocation import DEFAULT_ARTIFACTS

HomeOption = Annotated[
    Path | None,
    typer.Option(
        "--home", metavar="DIR", envvar="PREFECT_HOME", help="Prefect's files and our logs; by default .prefect."
    ),
]


def up(
    context: typer.Context,
    host: Annotated[str, typer.Option("--host", help="Address that the server listens on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="Port of the server.")] = 4200,
    pool: Annotated[str, typer.Option("--pool", help="Work pool, of type process.")] = "wsss",
    workers: Annotated[
        str, typer.Option("--workers", metavar="auto|N", help="auto: one per visible GPU, or one on the CPU.")
    ] = "auto",
    max_runs: Annotated[
        int | None, typer.Option("--max-runs", metavar="N", min=1, help="Flow runs of the pool at a time.")
    ] = None,
    home: HomeOption = None,
    artifacts: Annotated[
        str, typer.Option("--artifacts", metavar="DIR", envvar="WSSS_ARTIFACTS", help="Root of the artifact store.")
    ] = DEFAULT_ARTIFACTS,
    files_url: Annotated[
        str, typer.Option("--files-url", envvar="WSSS_FILES_URL", help="Where a web server has the store's reports.")
    ] = "",
    foreground: Annotated[
        bool, typer.Option("--foreground", help="Stay until SIGTERM or Ctrl-C, then do as wsss down.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Start server, deployments and workers by the commands that it prints; what is up already stays."""
    from pipeline.flows.environment import default_home
    from pipeline.flows.up import UpCall
    from pipeline.flows.up import down as bring_down
    from pipeline.flows.up import up as bring_up

    if workers != "auto" and not workers.isdigit():
        raise typer.BadParameter(f"expected auto or a number, got {workers!r}", param_hint="--workers")
    output = get_output(context)
    number, folder = None if workers == "auto" else int(workers), (home or default_home()).absolute()
    call = UpCall(folder, host, port, pool, number, max_runs, artifacts, files_url)
    output.document = bring_up(call, output.say)
    if not output.is_json:
        _say_up(output, output.document, folder)
    if foreground:
        try:
            while True:
                signal.pause()
        except KeyboardInterrupt:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            bring_down(folder, output.say)


def down(context: typer.Context, home: HomeOption = None, as_json: JsonOption = False) -> None:
    """End what wsss up started; interrupted runs go on after the next wsss up."""
    from pipeline.flows.environment import default_home
    from pipeline.flows.up import down as bring_down

    output = get_output(context)
    output.document = bring_down((home or default_home()).absolute(), output.say)
    if not output.is_json:
        ended = ", ".join(output.document["ended"])
        output.say(f"ended: {ended}" if ended else f"nothing was up in {output.document['home']}")


def _say_up(output: Output, found: dict[str, Any], home: Path) -> None:
    rows = [("UI", found["ui_url"]), ("API", found["api_url"]), ("pool", found["pool"]["name"])]
    for process in (found["server"], *found["workers"]):
        where = f"GPU {process['gpu']}" if process.get("gpu") else "CPU" if "gpu" in process else ""
        pid = f"pid {process['pid']}" if "pid" in process else ""
        rows.append((process["name"], f"{process['state']:11} {pid:12} {where}".rstrip()))
    rows += [("kept by", f"supervisord, {found['supervisord']}"), ("logs", str(found["logs"]))]
    width = max(len(name) for name, _ in rows)
    home_words = "" if home == Path(".prefect").absolute() else f" --home {home}"
    lines = [
        "",
        *(f"{name:{width}}  {value}" for name, value in rows),
        f"\nexport PREFECT_API_URL={found['api_url']} PREFECT_HOME={home} DO_NOT_TRACK=1",
        "next: prefect deployment run wsss/run --param config=demo --watch",
        f"end:  wsss down{home_words}",
    ]
    output.say("\n".join(lines))
