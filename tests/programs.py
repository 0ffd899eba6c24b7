"""The programs of benchmarks/, which are no package, as modules."""

import importlib.util
import pathlib
import sys

BENCHMARKS = pathlib.Path(__file__).parents[1] / "benchmarks"


def load(name):
    specification = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    if str(BENCHMARKS) not in sys.path:  # as when it is run
        sys.path.append(str(BENCHMARKS))
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module
