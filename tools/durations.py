"""The longest tests of the last `make test` or `make test-all`, from the JUnit files in out/tests.

python tools/durations.py > tests/durations.md
"""

import argparse
import collections
import pathlib
import sys
import xml.etree.ElementTree as ElementTree

ROOT = pathlib.Path(__file__).resolve().parents[1]
LONG_SECONDS = 10
sys.path.insert(0, str(ROOT))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", type=pathlib.Path, default=ROOT / "out/tests")
    files = sorted(parser.parse_args().folder.glob("*.xml"))
    if not files:
        print("durations: no JUnit files there; run `make test` first", file=sys.stderr)
        return 2
    from keras_convnext import _environment

    seconds: dict[str, dict[str, float]] = collections.defaultdict(lambda: collections.defaultdict(float))
    long = []
    totals = []
    for file in files:
        cases = list(ElementTree.parse(file).getroot().iter("testcase"))
        totals.append((file.stem, len(cases), sum(float(case.get("time", 0)) for case in cases)))
        for case in cases:
            took = float(case.get("time", 0))
            place = case.get("classname", "").replace(".", "/") + ".py"
            seconds[place][file.stem] += took
            if took >= LONG_SECONDS:
                long.append((took, file.stem, f"{place}::{case.get('name')}"))
    print("# Test time\n")
    features = sorted(_environment.cpu_flags() & {"avx2", "avx512f", "avx512_bf16", "amx_bf16"})
    print(f"One run on {_environment.cpu_name()} ({', '.join(features)}), two cores, two processes")
    print("at a time; written by `python tools/durations.py`.\n")
    print("| process | tests | seconds |\n|---|--:|--:|")
    for name, count, total in totals:
        print(f"| {name} | {count} | {total:.0f} |")
    names = [name for name, _, _ in totals]
    print("\n| file, above 5 s | " + " | ".join(names) + " |\n|---|" + "--:|" * len(names))
    for place, found in sorted(seconds.items(), key=lambda item: -sum(item[1].values())):
        if sum(found.values()) > 5:
            print(
                f"| {place} | "
                + " | ".join(f"{found[name]:.0f}" if name in found else "" for name in names)
                + " |"
            )
    print(f"\n| test, {LONG_SECONDS} s and more | process | seconds |\n|---|---|--:|")
    for took, name, test in sorted(long, reverse=True):
        print(f"| {test} | {name} | {took:.0f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
