"""Output that stages, growth and start-up share: the lines on the machine, the files."""

import argparse
import csv
import io
import json
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.speed import implementations, report
from keras_convnext._environment import machine, processor_text
from keras_convnext._files import replacing_file, replacing_path

BUSY_LOAD = 0.5  # of other work, for each core


def busy_warning(facts: dict[str, str]) -> str:
    """Returns a line of warning when other work was running before the measurement, else ""."""
    if float(facts["load"]) <= BUSY_LOAD * int(facts["cores"]):
        return ""
    return (
        f"the machine is busy: load {facts['load']} on {facts['cores']} cores before the first turn. Ratios "
        "may hold, times do not; repeat when it is idle."
    )


def begin(options: argparse.Namespace) -> dict[str, str]:
    """Checks the folder of the results, says when the machine is busy, and returns what describes it."""
    if options.output is not None:
        report.check_output(options.output)
    where = machine() | {"threads": str(options.threads or "all")}
    if warning := busy_warning(where):
        print(f"warning: {warning}", file=sys.stderr)
    return where


def end(
    options: argparse.Namespace,
    name: str,
    where: dict[str, str],
    names: Sequence[str],
    tables: Sequence[report.Table],
    rows: Sequence[dict[str, Any]],
    draw: Callable[[pathlib.Path], None] | None = None,
) -> None:
    """Prints the tables, or all numbers as JSON, and writes NAME.csv, NAME.md and NAME.png to the folder.

    Args:
        options: of the command line: `output`, `json`, `rounds`, `seconds`.
        name: of the files, without suffix.
        where: what `begin` returned.
        names: implementations that were measured, for the versions.
        tables: what is printed.
        rows: all numbers, by column.
        draw: writes the picture to a path.
    """
    heading = _heading(options, where, names)
    if options.json:
        print(json.dumps({"machine": where, name: rows}, indent=2))
    else:
        print("\n\n".join(table.text() for table in tables))
        print("\n".join(heading))
    if options.output is None:
        return
    folder = pathlib.Path(options.output)
    text = io.StringIO()
    writer = csv.DictWriter(text, [*(rows[0] if rows else {}), *where], lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _cell(value) for key, value in row.items()} | where for row in rows)
    pages = ["\n".join(f"- {line}" for line in heading), *(table.markdown() for table in tables)]
    for suffix, content in ((".csv", text.getvalue()), (".md", "\n\n".join(pages) + "\n")):
        with replacing_file(folder / f"{name}{suffix}") as file:
            file.write(content.encode("utf-8"))
    if draw is not None:
        with replacing_path(folder / f"{name}.png") as temporary:
            draw(temporary)


def _cell(value: Any) -> Any:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else value


def _heading(options: argparse.Namespace, where: dict[str, str], names: Sequence[str]) -> list[str]:
    versions: dict[str, str] = {}
    for name in names:
        versions |= implementations.versions(name)
    commit = f", commit {where['commit']}" * bool(where["commit"])
    lines = [
        f"{processor_text()}, threads: {where['threads']}",
        f"keras-convnext {where['keras_convnext']}{commit}, Python {where['python']}, "
        + ", ".join(f"{name} {version}" for name, version in sorted(versions.items())),
        f"{where['time']}, load before {where['load']}, rounds: {options.rounds}, medians",
    ]
    if warning := busy_warning(where):
        lines.append(f"warning: {warning}")
    return lines
