"""`roadmap` prints what each step from ResNet-50 to ConvNeXt changes and costs, or trains some of them."""

import argparse
from collections.abc import Callable

from keras_convnext import roadmap
from keras_convnext.cli import shared

ROADMAP_EXAMPLES = """examples:
  keras-convnext roadmap
  keras-convnext roadmap --regime base --json
  keras-convnext roadmap --train flowers/ --out runs/road --steps 1 5 7 13 16 --seeds 3

The steps are those of "A ConvNet for the 2020s" (Liu et al. 2022), tables 10 and 11: tiny from ResNet-50 to
ConvNeXt-T, base from ResNet-200 to ConvNeXt-B. atto is a small road of our own, which --train takes where
nothing else is said. --train trains each step with the same recipe and the same seeds, each in a folder of
its own inside DIR, and the same command resumes; DIR gets road.csv and road.png, which say what is within the
noise of the seeds. Images of 64 pixels leave a last map of 2x2, for which the steps of the kernel size mean
nothing. In Python: keras_convnext.roadmap.build("kernel size 7")."""


def roadmap_options(option: Callable) -> None:
    option("--regime", "NAME", f"{', '.join(roadmap.REGIMES)}; default tiny, or atto with --train")
    option("--json")
    option("--train", "PATH", "train on these images: a folder of class folders, for example")
    option("--out", "DIR", "folder of the runs, with --train")
    option("--steps", "STEP", "places or names, with --train; default 1 5 7 13 16", nargs="+")
    option("--seeds", "N", "runs of each step, with --train; default 3", type=shared.positive)
    for name in ("--set", "--quiet"):
        option(name)


def roadmap_command(options: argparse.Namespace) -> int:
    if options.train is None:
        if options.out or options.steps or options.seeds or options.set:
            raise ValueError(
                "Expected --train PATH beside --out, --steps, --seeds or --set, which belong to it."
            )
        return _print_table(options.regime or "tiny", options.json)
    if options.out is None:
        raise ValueError("Expected --out DIR, the folder of the runs, beside --train.")
    shared.import_quietly("keras_convnext.models", "tensorflow")
    from keras_convnext.training import road

    found = road.train_road(
        options.train,
        options.out,
        options.steps or ("1", "5", "7", "13", "16"),
        seeds=options.seeds or 3,
        regime=options.regime or "atto",
        overrides=shared.recipe_overrides(options.set),
        progress=not options.quiet,
    )
    lines = road.comparisons(found)
    if options.json:
        rows = [
            {"step": rung.step, "name": rung.name, "top1": rung.scores, "mean": rung.mean} for rung in found
        ]
        shared.print_json({"steps": rows, "noise": road.noise(found), "comparisons": lines})
        return 0
    cells = [
        (rung.step, rung.name, f"{rung.mean:.2f}", *(f"{one:.2f}" for one in rung.scores)) for rung in found
    ]
    seeds = [f"seed {number}" for number in range(len(found[0].scores))]
    shared.print_table(("step", "name", "top-1, %", *seeds), "><>" + ">" * len(seeds), cells)
    print("\n" + "\n".join(lines or ["one step: nothing to compare"]))
    print(f"{options.out}/{road.PICTURE}, {options.out}/{road.TABLE}")
    return 0


def _print_table(regime: str, as_json: bool) -> int:
    rows: list[dict] = []
    cells: list[tuple] = []
    for number, step in enumerate(roadmap.STEPS):
        (top1, printed), cost = step.published(regime), roadmap.cost(number, regime)
        is_misfit = (regime, step.name) in roadmap.MISFITS
        changes = roadmap.changes(number, regime)
        facts = {"step": number, "name": step.name, "kept": step.kept, "changes": changes, "why": step.why}
        std = step.top1_std if regime == "tiny" else None
        facts |= {"top1": top1, "top1_std": std, "gflops": printed}
        facts["gflops_fit"] = None if printed is None else not is_misfit
        rows.append(facts | cost._asdict())
        score = "-" if top1 is None else f"{top1:.2f}"
        score += f" +-{std:.2f}" if std is not None else " " * 7
        flops = "-" if printed is None else f"{printed:.2f}"
        sizes = flops + ("*" if is_misfit else " "), f"{cost.multiply_adds / 1e9:.3f}", f"{cost.weights:,}"
        name = step.name if step.kept else f"({step.name})"
        cells.append((number, name, score, *sizes, _changes_text(changes) if number else ""))
    if as_json:
        shared.print_json(rows)
        return 0
    titles = ("", "step", "top-1, %", "printed G ", "G", "weights", "changes")
    shared.print_table(titles, "><>>>><", cells)
    print(f"\nG: 10^9 multiply-adds of an image of 224 pixels. (...): not kept. {_source(regime)}")
    if any(row["gflops_fit"] is False for row in rows):
        print(
            "*: what no reading of the paper gives. 4.46 is what the next step has, as if the column were "
            "shifted\n   by a row; the column from ResNet-200 has no such values."
        )
    return 0


def _changes_text(changes: dict) -> str:
    words = (f"{field.replace('_', ' ')}: {_value_text(value)}" for field, value in changes.items())
    return "; ".join(words)


def _value_text(value) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def _source(regime: str) -> str:
    tables = {"tiny": "10, from ResNet-50, three seeds", "base": "11, from ResNet-200, one seed"}
    if regime not in tables:
        return "A road of our own: nothing is published."
    return f"Published: Liu et al. 2022, table {tables[regime]}."
