"""The shape of the package in numbers, with the bars it must keep. Standard library only.

    python tools/house.py               # of this checkout
    python tools/house.py OTHER         # of another one

Exit code 1 when a bar is missed. Imports inside functions count too. The layers are those of the import
contract in pyproject.toml, top first: a module may import from its own layer and from those below.
"""

import argparse
import ast
import collections
import pathlib
import sys
import tomllib

PACKAGE = "keras_convnext"
MOST_FILES_IN_A_FOLDER = 18
MOST_ENTRIES_AT_THE_TOP = 24
MOST_LINES_OF_A_FILE = 700
MOST_LINES_OF_A_FUNCTION = 120
MOST_ARGUMENTS = 12  # but for constructors that repeat those of Keras, and `load`
CONSTRUCTORS = ("constructor", "load", "__init__")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    here = pathlib.Path(__file__).resolve().parents[1]
    parser.add_argument("checkout", nargs="?", type=pathlib.Path, default=here, help="default: this one")
    checkout = parser.parse_args(arguments).checkout
    if not (checkout / PACKAGE).is_dir():
        print(f"house: no folder {PACKAGE} in {checkout}", file=sys.stderr)
        return 2
    rows = measure(checkout)
    width = max(len(name) for name, _, _ in rows)
    for name, value, missed in rows:
        print(f"{name:<{width}}  {value}{'   <- ' + missed if missed else ''}")
    return any(missed for _, _, missed in rows)


def measure(checkout: pathlib.Path) -> list[tuple[str, str, str]]:
    """(what, value, which bar it misses or "") of a checkout."""
    root = checkout / PACKAGE
    trees = {
        path.relative_to(root).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
        for path in sorted(root.rglob("*.py"))
    }
    lines = {name: len((root / name).read_text(encoding="utf-8").splitlines()) for name in trees}
    per_folder = collections.Counter(pathlib.PurePosixPath(name).parent.as_posix() for name in trees)
    folder, most = per_folder.most_common(1)[0]
    top = {name.split("/")[0] for name in trees}
    largest = max(lines, key=lines.__getitem__)
    functions = [
        (
            (node.end_lineno or node.lineno) - node.lineno + 1,
            f"{name}:{node.lineno} {node.name}",
            _count_arguments(node),
        )
        for name, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]
    longest = max(functions)
    widest = max(functions, key=lambda function: function[2])
    wide = [place for _, place, count in functions if count > MOST_ARGUMENTS]
    others = [place for place in wide if place.split()[1] not in CONSTRUCTORS]
    imports = {name: _imported(tree, _dotted(name), trees) for name, tree in trees.items()}
    upward = _upward(imports, _layers(checkout))
    circles = _circles(imports)

    def bar(value, most):
        return f"at most {most}" if value > most else ""

    return [
        ("package lines", f"{sum(lines.values()):,} in {len(lines)} files", ""),
        ("entries at the top", str(len(top)), bar(len(top), MOST_ENTRIES_AT_THE_TOP)),
        ("modules at the top", str(per_folder["."]), ""),
        ("most files in a folder", f"{most} in {folder}", bar(most, MOST_FILES_IN_A_FOLDER)),
        ("largest file", f"{lines[largest]} {largest}", bar(lines[largest], MOST_LINES_OF_A_FILE)),
        ("longest function", f"{longest[0]} {longest[1]}", bar(longest[0], MOST_LINES_OF_A_FUNCTION)),
        ("widest signature", f"{widest[2]} {widest[1]}", ""),
        (f"above {MOST_ARGUMENTS} arguments", ", ".join(wide) or "none", bar(len(others), 0)),
        ("callers of resolve", ", ".join(_callers(trees, "resolve")), ""),
        ("upward imports", _some(upward), bar(len(upward), 0)),
        ("circles", _some(circles), bar(len(circles), 0)),
    ]


def _callers(trees: dict[str, ast.Module], function: str) -> list[str]:
    """The modules that call a function by its bare name."""

    def calls(node: ast.AST) -> bool:
        return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == function

    return [name for name, tree in trees.items() if any(calls(node) for node in ast.walk(tree))]


def _some(found: list[str]) -> str:
    return "; ".join([str(len(found)), *found[:8], *(["..."] if len(found) > 8 else [])])


def _count_arguments(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    arguments = function.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return sum(argument.arg not in ("self", "cls") for argument in named)


def _dotted(name: str) -> str:
    """ "weights/catalog.py" -> "keras_convnext.weights.catalog"; a folder's `__init__.py` is the folder."""
    parts = pathlib.PurePosixPath(name).with_suffix("").parts
    return ".".join([PACKAGE, *(parts[:-1] if parts[-1] == "__init__" else parts)])


def _imported(tree: ast.Module, importer: str, trees: dict[str, ast.Module]) -> set[str]:
    """The modules of the package that a module imports, anywhere but for type checkers."""
    modules = {_dotted(name): name for name in trees}
    found: set[str] = set()
    for node in _outside_type_checking(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in modules}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE:
            for alias in node.names:
                module = node.module or ""
                whole = f"{module}.{alias.name}"
                found.add(whole if whole in modules else module)
    return {modules[module] for module in found if module in modules and module not in (importer, PACKAGE)}


def _outside_type_checking(node: ast.AST):
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)):
            yield child
            yield from _outside_type_checking(child)


def _layers(checkout: pathlib.Path) -> dict[str, int]:
    """Name of a folder or module at the top -> its layer, 0 at the bottom; empty without a contract."""
    settings = tomllib.loads((checkout / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = settings.get("tool", {}).get("importlinter", {}).get("contracts", [])
    layers: list[str] = next((one["layers"] for one in contracts if one["type"] == "layers"), [])
    names = [layer.replace(":", "|").split("|") for layer in layers]
    return {name.strip("() "): -number for number, layer in enumerate(names) for name in layer}


def _upward(imports: dict[str, set[str]], layers: dict[str, int]) -> list[str]:
    def layer(name: str) -> int | None:
        return layers.get(name.split("/")[0].removesuffix(".py"))

    return [
        f"{importer} -> {imported}"
        for importer, all_imported in imports.items()
        for imported in sorted(all_imported)
        if layer(importer) is not None and layer(imported) is not None and layer(imported) > layer(importer)  # type: ignore[operator]
    ]


def _circles(imports: dict[str, set[str]]) -> list[str]:
    """One circle for each edge that closes one in a depth-first walk."""
    state: dict[str, int] = {}
    path: list[str] = []
    found = []

    def visit(name: str) -> None:
        state[name] = 1
        path.append(name)
        for other in sorted(imports[name]):
            if state.get(other) == 1:
                found.append(" -> ".join([*path[path.index(other) :], other]))
            elif other not in state:
                visit(other)
        path.pop()
        state[name] = 2

    for name in imports:
        if name not in state:
            visit(name)
    return found


if __name__ == "__main__":
    sys.exit(main())
