"""Cases: reads the words of `python -m benchmarks.speed` and compares implementations on any case."""

import importlib.util
import itertools
import json
import math
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence

from benchmarks.speed import implementations, output, report
from benchmarks.speed.alternating_runs import Measurement, measure_entries
from benchmarks.speed.implementations import Case
from benchmarks.speed.report import Table
from keras_convnext import _terminal
from keras_convnext._environment import processor_text
from keras_convnext._messages import unknown
from keras_convnext.variants import VARIANTS

DEFAULT_MODEL = "convnext_tiny"
DEFAULT_IMAGE_SIZE = 224
DEFAULTS: dict[str, list] = {
    "architectures": [DEFAULT_MODEL],
    "mode": ["inference"],
    "batch": [1, 8],
    "image_size": [DEFAULT_IMAGE_SIZE],
    "dtype": ["float32"],
}
# The words that WHAT may be instead of architectures, with the defaults that differ; `all` is the
# module full_run, the others have modules of their name.
WORDS: dict[str, dict[str, list]] = {
    "all": {},
    "depthwise": {"batch": [8]},
    "pointwise": {"batch": [1, 8]},
    "growth": {
        "batch": [1, 2, 4, 8, 16, 32, 64],
        "image_size": [160, 192, 224, 288, 384, 512],
        "architectures": [
            f"convnext_{size}" for size in ("atto", "femto", "pico", "nano", "tiny", "small", "base")
        ],
    },
    "stages": {"batch": [8]},
    "startup": {"batch": [1]},
}


class Progress:
    """The bar of a measurement, on a terminal only."""

    def __init__(self, title: str) -> None:
        self.bar = _terminal.Progress(title, None, "turns", is_wanted=sys.stderr.isatty())

    def show(self, what: str, done: int, total: int) -> None:
        """Shows what is done now, and how many turns of all are done."""
        self.bar.total = total
        self.bar.show(done, lambda: what)
        self.bar.draw(f"{done}/{total} turns, {what}")
        if done == total:
            self.bar.close()


def dispatch(options: Namespace) -> int:
    """Runs what the words of the command line name.

    Args:
        options: of the command line; its lists are text still, or None where not given.

    Returns:
        The exit code.

    Raises:
        ValueError: an unknown name, with near ones, or a number out of range.
    """
    words = [word for word in options.what if word in WORDS]
    if len(words) > 1:
        raise ValueError(f"Expected one of {', '.join(WORDS)}; received {' '.join(words)}.")
    word = words[0] if words else ""
    if word == "all":
        fixed = {"WHAT": len(options.what) > 1 or None}
        fixed |= {f"--{name}": getattr(options, name) for name in ("mode", "batch", "dtype", "against")}
        given = [name for name, value in fixed.items() if value is not None]
        if given or options.rematerialize:
            names = ", ".join(given or ["--rematerialize"])
            raise ValueError(f"Expected nothing but the word all, whose cases are fixed; received {names}.")
    options = resolve(options, word)
    if not word:
        return run(options)
    module = "full_run" if word == "all" else word
    return importlib.import_module(f"benchmarks.speed.{module}").run(options)


def resolve(options: Namespace, word: str = "") -> Namespace:
    """Returns the options with their lists read and checked, and the defaults of a word filled in.

    `architectures`, `backends`, `mode`, `dtype`, `against` are lists of names, `batch` and `image_size` of
    numbers.
    """
    names = [name for name in options.what if name != word]
    for name in names:
        if name not in VARIANTS:
            known = [*VARIANTS, *WORDS]
            raise ValueError(unknown("architecture", name, known))
    if not 0 < options.seconds < math.inf:
        raise ValueError(f"Expected --seconds to be a positive number, received {options.seconds:g}.")
    defaults = DEFAULTS | WORDS.get(word, {})
    values = vars(options) | {
        "architectures": names or defaults["architectures"],
        "backends": _names(options.backends, "backend", implementations.OURS),
        "mode": _names(options.mode, "mode", implementations.MODES) or defaults["mode"],
        "dtype": _names(options.dtype, "dtype", implementations.DTYPES) or defaults["dtype"],
        "against": _names(options.against, "peer", implementations.AGAINST),
        "batch": _numbers(options.batch, "--batch") or defaults["batch"],
        "image_size": _numbers(options.image_size, "--image-size") or defaults["image_size"],
    }
    values["backends"] = values["backends"] or _backends()
    if options.against is None:
        values["against"] = _default_peers()
    return Namespace(**values)


def _names(text: str | None, kind: str, known: Sequence[str]) -> list[str]:
    names = [] if text is None else [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise ValueError(unknown(kind, name, known))
    return list(dict.fromkeys(names))


def _numbers(text: str | None, option: str) -> list[int]:
    words = [] if text is None else [word.strip() for word in text.split(",") if word.strip()]
    for word in words:
        if not word.isdecimal() or int(word) < 1:
            raise ValueError(f"Expected {option} to be whole numbers from 1 up, received {word!r}.")
    return [int(word) for word in words]


def run(options: Namespace) -> int:
    """Measures the cases that the options name, prints a table of each, writes the files.

    Args:
        options: what `resolve` returns.

    Returns:
        The exit code, 0.
    """
    cases = [
        Case(model, mode, batch, size, dtype, options.rematerialize and mode == "training")
        for model, mode, dtype, size, batch in itertools.product(
            options.architectures,
            options.mode,
            options.dtype,
            options.image_size,
            options.batch,
        )
    ]
    where = output.begin(options)
    names = entrants(options.backends, options.against)
    groups, tables = [], []
    for number, case in enumerate(cases):
        entries = [(name, case) for name in names]
        title = f"case {number + 1} of {len(cases)}"
        found, table = measure_group(options, entries, title, report.case_table)
        groups.append(found)
        tables.append(table)
    heading = heading_lines(where, groups, options.rounds, options.seconds)
    if options.json:
        print(json.dumps({"machine": where, "cases": report.all_facts(groups)}, indent=2))
    else:
        print("\n".join(heading))
    if options.output is not None:
        report.write(options.output, heading, where, groups, tables)
    return 0


def entrants(backends: Sequence[str], against: Sequence[str]) -> list[str]:
    """Implementations of a run: ours on each backend, then the peers that --against names.

    Example:
        >>> entrants(["jax", "torch"], ["timm", "keras.applications", "openvino"])
        ['jax', 'torch', 'timm', 'keras.applications:jax', 'keras.applications:torch', 'openvino-timm']
    """
    names = list(backends)
    for word in against:
        if word == "keras.applications":
            names += [
                f"{word}:{backend}" for backend in backends if backend in implementations.KERAS_BACKENDS
            ]
        else:
            names.append("openvino-timm" if word == "openvino" else word)
    return list(dict.fromkeys(names))


def _backends() -> list[str]:
    backends = implementations.installed_backends()
    if not backends:
        raise ImportError("Expected a backend of Keras. Run pip install tensorflow, jax or torch.")
    return backends


def _default_peers() -> list[str]:
    if importlib.util.find_spec("timm") is not None:
        return ["timm"]
    print(
        "warning: measured without a peer: timm is not installed. Run pip install -e "
        "'.[bench]' -c constraints.txt, or name others by --against.",
        file=sys.stderr,
    )
    return []


def measure_group(
    options: Namespace, entries: Sequence[tuple[str, Case]], title: str, table: Callable
) -> tuple[list[Measurement], Table]:
    """Measures one group of implementations in turns and prints `table` of it, unless JSON is wanted."""
    show = Progress(title).show
    found = measure_entries(entries, options.rounds, options.seconds, options.threads, show)
    made = table(found)
    if not options.json:
        print(f"{made.text()}\n", flush=True)
    return found, made


def heading_lines(
    where: dict[str, str], measured: Sequence[Sequence[Measurement]], rounds: int, seconds: float
) -> list[str]:
    """Machine, versions, rounds: what the times depend on."""
    found = [one for group in measured for one in group if one.seconds]
    versions: dict[str, str] = {}
    for one in found:
        versions |= one.versions
    devices = sorted({one.device for one in found})
    commit = f", commit {where['commit']}" * bool(where["commit"])
    lines = [
        f"{processor_text()}, threads: {where['threads']}, device: {', '.join(devices)}",
        f"keras-convnext {where['keras_convnext']}{commit}, Python {where['python']}, "
        + ", ".join(f"{name} {version}" for name, version in sorted(versions.items())),
        f"{where['time']}, load before {where['load']}; in turns, rounds: {rounds}, about {seconds:g} s a "
        "turn; medians. x PEER: times as fast as the peer, median over the rounds of the same run",
    ]
    if warning := output.busy_warning(where):
        lines.append(f"warning: {warning}")
    return lines
