"""``wsss up`` and ``wsss down``: a server, workers and what keeps them alive, on this machine."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.options import JsonOption, as_path
from pipeline.cli.output import get_output
from pipeline.engine.invocation import DEFAULT_ARTIFACTS

Home = Annotated[
    Path, typer.Option(metavar="DIR", parser=as_path, envvar="PREFECT_HOME", help="Prefect's files and our logs.")
]
DEFAULT_HOME = Path(".prefect")


def up(
    context: typer.Context,
    host: Annotated[str, typer.Option(help="Address that the server listens on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port of the server.")] = 4200,
    pool: Annotated[str, typer.Option(help="Work pool, of type process.")] = "wsss",
    workers: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="By default one per visible GPU, or one on the CPU.")
    ] = None,
    home: Home = DEFAULT_HOME,
    artifacts: Annotated[
        str, typer.Option(metavar="DIR", envvar="WSSS_ARTIFACTS", help="Root of the artifact store.")
    ] = DEFAULT_ARTIFACTS,
    foreground: Annotated[
        bool, typer.Option("--foreground", help="Stay until SIGTERM or Ctrl-C, then do as wsss down.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Start server, deployments and workers by the commands that it prints; what is up already stays."""
    from pipeline.flows import up as flows_up

    output, home = get_output(context), home.absolute()
    output.document = found = flows_up.up(flows_up.UpCall(home, host, port, pool, workers, artifacts), output.say)
    rows = [("UI", found["ui_url"]), ("API", found["api_url"]), ("pool", found["pool"]["name"])]
    for process in (found["server"], *found["workers"]):
        where = f"GPU {process['gpu']}" if process.get("gpu") else "CPU" if "gpu" in process else ""
        pid = f"pid {process['pid']}" if "pid" in process else ""
        rows.append((process["name"], f"{process['state']:11} {pid:12} {where}".rstrip()))
    rows += [("kept by", f"supervisord, {found['supervisord']}"), ("logs", str(found["logs"]))]
    output.tell("\n" + "\n".join(f"{name:{max(len(name) for name, _ in rows)}}  {value}" for name, value in rows))
    output.tell(f"\nexport PREFECT_API_URL={found['api_url']} PREFECT_HOME={home} DO_NOT_TRACK=1")
    output.tell("next: prefect deployment run wsss/run --param config=demo --watch")
    output.tell("end:  wsss down" + ("" if home == DEFAULT_HOME.absolute() else f" --home {home}"))
    if foreground:
        try:
            while True:
                signal.pause()
        except KeyboardInterrupt:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            flows_up.down(home, output.say)


def down(context: typer.Context, home: Home = DEFAULT_HOME, as_json: JsonOption = False) -> None:
    """End what wsss up started; interrupted runs go on after the next wsss up."""
    from pipeline.flows import up as flows_up

    output = get_output(context)
    output.document = flows_up.down(home.absolute(), output.say)
    ended = ", ".join(output.document["ended"])
    output.tell(f"ended: {ended}" if ended else f"nothing was up in {output.document['home']}")
