"""`train`, `plan`: training runs."""

import argparse
import dataclasses
import os

from keras_convnext.cli.shared import complain, import_quietly, print_json, print_lines, recipe_overrides


def train_command(options: argparse.Namespace) -> int:
    """Trains a model by a recipe, or goes on with an interrupted run."""
    from keras_convnext.training import failure, recipe_files, run_state, trainer

    if options.list:
        print("\n".join(recipe_files.known_recipes()))
        return 0
    if options.recipe is None or options.out is None:
        raise ValueError("Expected RECIPE and --out DIR; keras-convnext train --list names the recipes.")
    # Else PyTorch's threads spin while they wait, and take the cores from those that make the batches.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import_quietly("keras_convnext.training.trainer", "tensorflow")

    overrides = recipe_overrides(options.set)
    if options.distribute is not None:
        overrides["distribution.engine"] = options.distribute
    try:
        result = trainer.train(
            options.recipe,
            options.out,
            data=options.data,
            overrides=overrides,
            workers=options.workers,
            progress=not options.quiet,
        )
    except failure.Interrupted as stopped:
        complain(str(stopped))
        return 128 + stopped.signal_number
    except failure.NonFiniteError as error:
        complain(f"error: {error}")
        return 3
    if result.process:
        return 0
    lines: list[tuple[str, object]] = [("steps", f"{result.steps:,}, {result.seconds:,.0f} s in this run")]
    for name, title in (("loss", "training loss"), ("val_loss", "validation loss")):
        if name in result.scores:
            lines.append((title, f"{result.scores[name]:.4f}"))
    for name, title in (("val_top1", "top-1"), ("ema_val_top1", "top-1 of the EMA")):
        if name in result.scores:
            lines.append((title, f"{result.scores[name]:.2f} %"))
    lines.append(("weights", result.weights))
    lines.append(("curves", result.folder / run_state.CURVES_FILE))
    print_lines(f"{options.recipe}: {result.folder}", lines)
    return 0


def plan_command(options: argparse.Namespace) -> int:
    """Prints what a recipe takes on devices: memory, bytes between them, operations, time."""
    from keras_convnext.analysis import devices
    from keras_convnext.analysis.plan import describe, make_plan
    from keras_convnext.training import recipe_files

    overrides = recipe_overrides(options.set)
    if options.engine is not None:
        overrides["distribution.engine"] = options.engine
    if options.data is not None:
        overrides["data"] = os.path.abspath(os.path.expanduser(options.data))
    plan = make_plan(recipe_files.load_recipe(options.recipe, overrides), options.devices, options.fraction)
    if options.json:
        facts = dataclasses.asdict(plan) | {
            "step_seconds": plan.step_seconds,
            "images_per_second": plan.images_per_second,
            "source": devices.DEVICES[plan.device].source,
        }
        facts["memory"]["total"] = plan.memory.total
        for fact, exchange in zip(facts["exchanges"], plan.exchanges, strict=True):
            fact["wire_bytes"] = exchange.wire_bytes
        print_json(facts)
        return 0
    print_lines(f"{options.recipe} on {options.devices}", describe(plan, options.fraction))
    return 0
