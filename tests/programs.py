"""The programs of benchmarks/ and demo/ as modules, loaded as when they are run as scripts."""

import importlib.util
import pathlib
import sys

BENCHMARKS = pathlib.Path(__file__).parents[1] / "benchmarks"


def load(name, folder=BENCHMARKS):
    specification = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
    if str(BENCHMARKS) not in sys.path:  # as when it is run
        sys.path.append(str(BENCHMARKS))
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module
