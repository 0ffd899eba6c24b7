"""The full run, `python -m benchmarks.speed all`: fixed cases, and whether they meet the bars."""

import dataclasses
import itertools
import json
import math
from argparse import Namespace
from collections.abc import Sequence

from benchmarks.speed import cases, implementations, machine_rates, output, report, stages
from benchmarks.speed.alternating_runs import Measurement, ratio
from benchmarks.speed.implementations import KERAS_BACKENDS, TITLES, Case
from benchmarks.speed.report import Table

V1, V2, BASE, ATTO, BATCH = "convnext_tiny", "convnextv2_tiny", "convnext_base", "convnextv2_atto", 8
FOREIGN = ("timm-compile", "onnxruntime", "openvino")
SMALL = 3 / 7  # atto's image, which the demo and small fine-tunings use, of the others': 96 of 224 pixels

# Model, mode, batches, dtype, implementations of ours besides the backends, peers.
CASES = (
    (V1, "inference", (1, 8), "float32", ("openvino",), ("timm", *FOREIGN, "keras.applications")),
    (V2, "inference", (1, 8), "float32", ("openvino",), ("timm", *FOREIGN)),
    (BASE, "inference", (1,), "float32", ("openvino",), ("timm", *FOREIGN)),
    (ATTO, "inference", (1,), "float32", (), ("timm", *FOREIGN)),
    (V1, "training", (8,), "float32", (), ("timm", "timm-compile", "keras.applications")),
    (ATTO, "training", (32,), "float32", (), ("timm", "timm-compile")),
    (V1, "inference", (8,), "bfloat16", ("openvino",), ("timm", "timm-compile", "openvino")),
)

# Mode, model, batches, dtype, which of ours ("each" backend, or the "best" of these and of the exported
# models), and peers, each of which is at most as fast.
BARS = (
    ("inference", V1, (1, 8), "float32", "each", ("timm", "keras.applications")),
    ("inference", V2, (1, 8), "float32", "each", ("timm",)),
    ("inference", BASE, (1,), "float32", "each", ("timm",)),
    ("inference", ATTO, (1,), "float32", "each", ("timm",)),
    ("training", V1, (8,), "float32", "each", ("timm", "keras.applications")),
    ("training", ATTO, (32,), "float32", "each", ("timm",)),
    ("inference", V1, (1, 8), "float32", "best", FOREIGN),
    ("inference", V2, (1, 8), "float32", "best", FOREIGN),
    ("inference", V1, (8,), "bfloat16", "best", ("timm-compile", "openvino")),
)
V2_COST_BAR = 1.15  # time of V2 relative to V1's, at most
STAGE_BAR = 0.7  # of the floor, in each stage


def run(options: Namespace) -> int:
    """Runs `python -m benchmarks.speed all`: its cases, V2 and V1, stages, claims and bars.

    Args:
        options: what `cases.resolve` returns. Backends, image size (one), rounds, seconds, threads, output
            and JSON are free, the rest is fixed.

    Returns:
        The exit code, 0 whether the bars are met or not.
    """
    if len(options.image_size) > 1:
        raise ValueError(
            f"Expected one --image-size for `python -m benchmarks.speed all`, received {options.image_size}."
        )
    where = output.begin(options)
    size = options.image_size[0]
    groups: list[list[Measurement]] = []
    tables: list[Table] = []
    wanted = [
        [(name, Case(model, mode, batch, _side(model, size), dtype)) for name in names]
        for model, mode, batches, dtype, exported, peers in CASES
        for names in [cases.entrants([*options.backends, *exported], peers)]
        for batch in batches
    ]
    wanted.append(
        [(name, Case(model, "inference", BATCH, size)) for name in options.backends for model in (V2, V1)]
    )
    for number, entries in enumerate(wanted):
        make = v2_table if number == len(wanted) - 1 else report.case_table
        title = f"case {number + 1} of {len(wanted)}"
        found, table = cases.measure_group(options, entries, title, make)
        groups.append(found)
        tables.append(table)

    staged = stages.table(
        Case(V1, "inference", BATCH, size),
        options.backends,
        machine_rates.measure_rates(threads=options.threads),
        rounds=options.rounds,
        seconds=options.seconds * stages.SHARE,
        threads=options.threads,
        on_progress=cases.Progress("stages").show,
    )
    summary = summary_table(size, groups, staged)
    for table in (stages.as_table(staged), summary):
        tables.append(table)
        if not options.json:
            print(f"{table.text()}\n", flush=True)

    heading = cases.heading_lines(where, groups, options.rounds, options.seconds)
    if options.json:
        facts = {
            "machine": where,
            "cases": report.all_facts(groups),
            "stages": [dataclasses.asdict(row) | {"fraction": row.fraction} for row in staged.rows],
            "summary": [dict(zip(summary.titles, row, strict=True)) for row in summary.rows],
        }
        print(json.dumps(facts, indent=2))
    else:
        print("\n".join(heading))
    if options.output is not None:
        report.write(options.output, heading, where, groups, tables)
    return 0


def _side(model: str, image_size: int) -> int:
    return round(image_size * SMALL) if model == ATTO else image_size


def v2_table(found: Sequence[Measurement]) -> Table:
    """Makes the table of V2's time relative to V1's, by implementation."""
    times = {
        (one.implementation, one.case.model): f"{report.milliseconds(one):.2f}"
        for one in found
        if one.seconds
    }
    return Table(
        f"{V2} and {V1} in one run, {found[0].case.mode}, batch {found[0].case.batch}",
        ("implementation", f"{V1}, ms/image", f"{V2}, ms/image", "times V1"),
        "<>>>",
        [
            (TITLES[name], times[name, V1], times[name, V2], f"{cost:.3f}")
            for name, cost in v2_costs(found).items()
        ],
        tuple(
            f"{TITLES[one.implementation]}, {one.case.model}: {one.problem}" for one in found if one.problem
        ),
    )


def v2_costs(found: Sequence[Measurement]) -> dict[str, float]:
    """Time of V2 relative to V1's, by implementation; of those that ran both."""
    ran = {(one.implementation, one.case.model): one for one in found if one.seconds}
    return {
        name: ratio(ran[name, V1], ran[name, V2]) for name, model in ran if model == V2 and (name, V1) in ran
    }


def summary_table(
    image_size: int,
    groups: Sequence[Sequence[Measurement]],
    staged: stages.Stages,
) -> Table:
    """Makes the table of claims: each with its bar and the number that was seen.

    Args:
        image_size: of the run.
        groups: measurements of the cases; those of V2 and V1 last.
        staged: what `stages.table` returned.
    """
    rows = []
    for mode, model, batches, dtype, who, peers in BARS:
        for batch, peer in itertools.product(batches, peers):
            case = Case(model, mode, batch, _side(model, image_size), dtype)
            for name, seen in _seen(case, who, peer, groups).items():
                rows.append((f"{case.title}: {_title(who, name)}, x {peer}", ">= 1", seen, seen >= 1))
    for name, cost in v2_costs(groups[-1]).items():
        claim = f"time of {V2} relative to {V1}, inference, batch {BATCH}: {TITLES[name]}"
        rows.append((claim, f"<= {V2_COST_BAR:g}", cost, cost <= V2_COST_BAR))
    for row in staged.rows:
        if row.stage.startswith("stage"):
            claim = f"part of the floor, batch {BATCH}, {row.stage}: {TITLES[row.implementation]}"
            rows.append((claim, f">= {STAGE_BAR:g}", row.fraction, row.fraction >= STAGE_BAR))
    return Table(
        "What is claimed, and what was seen",
        ("claim", "bar", "seen", "verdict"),
        "<>><",
        [(claim, bar, *_verdict(seen, is_met)) for claim, bar, seen, is_met in rows],
    )


def _seen(case: Case, who: str, peer: str, groups: Sequence[Sequence[Measurement]]) -> dict[str, float]:
    """Returns how many times as fast as the peer ours are, for those that `who` means; NaN: not measured."""
    ratios: dict[str, float] = {}
    for group in groups:
        if {one.case for one in group} == {case}:
            for one in group:
                name = one.implementation
                if name in KERAS_BACKENDS or (who == "best" and implementations.is_ours(name)):
                    ratios[name] = report.ratios_of(one, group).get(peer, math.nan)
    measured = {name: seen for name, seen in ratios.items() if not math.isnan(seen)}
    if who == "best" and measured:
        best = max(measured, key=lambda name: measured[name])
        return {best: measured[best]}
    return ratios if ratios and who != "best" else {who: math.nan}


def _title(who: str, name: str) -> str:
    general = {"each": "ours, each backend", "best": "best of ours"}
    if name in general:
        return general[name]
    return f"best of ours ({TITLES[name].removeprefix('ours, ')})" if who == "best" else TITLES[name]


def _verdict(seen: float, is_met: bool) -> tuple[str, str]:
    if math.isnan(seen):
        return "-", "not measured"
    return f"{seen:.2f}", "met" if is_met else "MISSED"
