"""The structure holds: imports go one way, README lists every file, nothing stands twice, errors show values.

When a test here fails on a new file, the message says where the file has to be entered.
"""

import ast
import graphlib
import itertools
import re
import subprocess
import sys
import tomllib
from collections import defaultdict
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from distillery.data import DATASETS

ROOT = Path(__file__).resolve().parent.parent
PRODUCT = ("distillery", "components", "pipelines")

# Lowest first. A module imports from its own layer (without a cycle) or from lower ones.
LAYERS = (
    {"errors"},
    {"artifact", "code_version", "config", "console", "device", "files", "preview", "rng", "track"},
    {"data", "nets", "store"},
    {
        "evaluate",
        "labels",
        "methods",
        "metrics",
        "neighbours",
        "recipes",
        "report",
        "statistics",
        "student",
        "teacher",
        "train",
    },
    {"checkpoints", "execution", "experiment", "history", "profiles", "regress", "sharding"},
    {"steps"},
    {"compare", "estimate", "export", "exporter", "inspection", "probe", "run"},
    {"distilled"},
    {"__main__"},
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}

# Where numbers that describe images of a dataset or of a published checkpoint may stand.
NORMALISATION_HOMES = {"distillery/data/__init__.py", "distillery/nets/pretrained.py"}
FACADE = "distillery/__init__.py"
RAISED_WITHOUT_MESSAGE = {"StopIteration", "KeyboardInterrupt", "SystemExit", "Exit", "Abort"}


def files(*folders: str) -> dict[str, str]:
    """Relative path -> source of every Python file in the folders."""
    found = sorted(p for folder in folders for p in (ROOT / folder).rglob("*.py"))
    return {p.relative_to(ROOT).as_posix(): p.read_text(encoding="utf-8") for p in found}


def module_of(path: str) -> str:
    """`distillery/data/__init__.py` -> `distillery.data`."""
    return path.removesuffix(".py").replace("/", ".").removesuffix(".__init__")


def imports(source: str, top_level: bool = False) -> set[str]:
    """Every imported dotted name; `from a import b` gives `a.b`, since `b` may be a module."""
    tree = ast.parse(source)
    found = set()
    for node in tree.body if top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def is_in(name: str, *packages: str) -> bool:
    """Whether a dotted name is one of the packages or lies in one."""
    return any(name == package or name.startswith(package + ".") for package in packages)


def part(name: str) -> str:
    """`distillery.data.real.load` -> `data`: what `LAYERS` speaks of."""
    return name.split(".")[1] if "." in name else ""


def upward(path: str, source: str) -> list[str]:
    """Imports of a library file that point to a higher layer."""
    if path == FACADE:
        return []  # `distillery.load` is imported when somebody asks for it
    own = RANK.get(part(module_of(path)), -1)
    names = {part(name) for name in imports(source) if is_in(name, "distillery")}
    return [f"{path} imports {name}" for name in sorted(names & set(RANK)) if RANK[name] > own]


def bare_raises(path: str, source: str) -> list[str]:
    """`raise` statements whose message cannot show the offending value."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Raise) or node.exc is None:
            continue
        kind = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
        name = kind.attr if isinstance(kind, ast.Attribute) else getattr(kind, "id", "")
        caught = isinstance(node.exc, ast.Name) and name.islower()
        shown = isinstance(node.exc, ast.Call) and any(not isinstance(arg, ast.Constant) for arg in node.exc.args)
        if name not in RAISED_WITHOUT_MESSAGE and not caught and not shown:
            found.append(f"{path}:{node.lineno}: {ast.unparse(node)}")
    return found


def functions(source: str) -> list[ast.FunctionDef]:
    """All functions and methods of a file."""
    return [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]


def body(function: ast.FunctionDef) -> list[ast.stmt]:
    """The statements of a function after its docstring."""
    return function.body[1:] if ast.get_docstring(function) is not None else function.body


def repeated(sources: dict[str, str], lines: int = 6) -> list[str]:
    """Functions of at least so many lines whose bodies are the same statement by statement."""
    places = defaultdict(list)
    for path, source in sources.items():
        for function in functions(source):
            rest = body(function)
            if rest and (rest[-1].end_lineno or 0) - rest[0].lineno + 1 >= lines:
                places["".join(ast.dump(statement) for statement in rest)].append(f"{path}:{function.name}")
    return [" = ".join(same) for same in places.values() if len(same) > 1]


def stray_constants(path: str, source: str, known: set[float]) -> list[str]:
    """Literals that repeat a dataset's mean or deviation."""
    literals = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Constant) and isinstance(n.value, float)]
    return [f"{path}:{node.lineno}: {node.value}" for node in literals if node.value in known]


def listed(readme: str) -> list[str]:
    """Paths in README's tree; an indented line belongs to the last folder at the margin."""
    block = re.search(r"^## The tree\n.*?^```\w*\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    assert block, "README.md has no fenced block under '## The tree'"
    paths, folder = [], ""
    for line in filter(str.strip, block.group(1).splitlines()):
        name = line.split()[0]
        if not line.startswith(" "):
            folder = name if name.endswith("/") else ""
            paths.append(name)
        else:
            paths.append(folder + name)
    return paths


def test_every_module_has_a_layer() -> None:
    unknown = {part(module_of(path)) for path in files("distillery")} - set(RANK) - {""}
    assert not unknown, f"enter {sorted(unknown)} into LAYERS of tests/test_layers.py"


def test_imports_go_one_way() -> None:
    offences = [line for path, source in files("distillery").items() for line in upward(path, source)]
    assert not offences, offences


@pytest.mark.parametrize("module", ["", ".exporter", ".store", ".artifact"])
def test_imports_no_torch(module: str) -> None:
    """Half a gigabyte and seconds: too much for a pod that only reads records, or for a short command."""
    asked = f"import sys, distillery{module}; assert 'torch' not in sys.modules; distillery.load"
    subprocess.run([sys.executable, "-c", asked], check=True, cwd=ROOT)


def test_no_import_cycles() -> None:
    sources = {module_of(path): source for path, source in files("distillery").items()}
    graph = {}
    for module, source in sources.items():
        named = {name if name in sources else name.rpartition(".")[0] for name in imports(source, top_level=True)}
        graph[module] = {name for name in named if name in sources and name != module}
    order = list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, which names the cycle
    assert set(order) == set(sources)


def test_library_knows_nothing_of_kubeflow() -> None:
    foreign = ("kfp", "kubernetes", "components", "pipelines")
    offences = [p for p, source in files("distillery").items() if any(is_in(n, *foreign) for n in imports(source))]
    assert not offences, offences


def test_minio_is_imported_in_one_module() -> None:
    users = [path for path, source in files(*PRODUCT).items() if any(is_in(n, "minio") for n in imports(source))]
    assert users == ["distillery/store/s3.py"]


def test_torch_and_the_library_stay_out_of_pipelines_and_component_heads() -> None:
    offences = [
        f"{path}: {name}"
        for path, source in files("components", "pipelines").items()
        for name in imports(source, top_level=True)
        if is_in(name, "torch", "torchvision", "numpy") or (is_in(name, "distillery") and path.startswith("components"))
    ]
    assert not offences, offences


def test_components_are_thin_skins_over_steps() -> None:
    offences = []
    for path, source in files("components").items():
        names = imports(source)
        offences += [f"{path}: {n}" for n in names if is_in(n, "distillery") and not is_in(n, "distillery.steps")]
        outside = {n.split(".")[0] for n in imports(source, top_level=True)} - set(sys.stdlib_module_names)
        offences += [f"{path}: {n}" for n in outside - {"kfp", "components"}]
    assert not offences, offences


def test_kfp_reads_annotations_not_strings() -> None:
    offences = [
        p for p, source in files("components", "pipelines").items() if "__future__.annotations" in imports(source)
    ]
    assert not offences, f"kfp cannot read postponed annotations: {offences}"


def test_methods_do_not_import_each_other() -> None:
    offences = [
        f"{path}: {name}"
        for path, source in files("distillery/methods").items()
        for name in imports(source)
        if not path.endswith("__init__.py")
        and is_in(name, "distillery.methods")
        and not name.split(".")[2].startswith("_")
    ]
    assert not offences, f"shared code belongs into an underscore file of distillery/methods: {offences}"


def test_readme_tree_lists_every_file() -> None:
    named = listed((ROOT / "README.md").read_text(encoding="utf-8"))
    folders = tuple(path for path in named if path.endswith("/") and path.count("/") > 1)
    paths = [path for folder in PRODUCT for path in (ROOT / folder).rglob("*") if path.is_file()]
    kept = [path for path in paths if path.stat().st_size and path.suffix != ".pyc"]
    wanted = {path.relative_to(ROOT).as_posix() for path in kept}
    wanted = {path for path in wanted if path.endswith(".py") or not path.startswith(folders)}
    assert sorted(path for path in named if not (ROOT / path).exists()) == [], "README.md lists files that are gone"
    assert sorted(wanted - set(named)) == [], "README.md, 'The tree', misses files"
    assert len(named) == len(set(named)), "README.md lists a file twice"


def test_no_function_is_written_twice() -> None:
    assert not repeated(files(*PRODUCT, "tests", "benchmarks"))


def test_every_raise_shows_the_value() -> None:
    offences = [line for path, source in files(*PRODUCT).items() for line in bare_raises(path, source)]
    assert not offences, offences


def test_normalisation_stands_in_one_place() -> None:
    numbers = {v for info in DATASETS.values() for v in (*info.mean, *info.std)}
    known = {v for v in numbers if round(v, 2) != v}
    sources = {path: source for path, source in files(*PRODUCT).items() if path not in NORMALISATION_HOMES}
    offences = [line for path, source in sources.items() for line in stray_constants(path, source, known)]
    assert known
    assert not offences, offences


def test_sources_are_ascii() -> None:
    offences = [path for path, source in files(*PRODUCT, "tests", "benchmarks").items() if not source.isascii()]
    assert not offences, offences


LOCKS = ["requirements.txt", "requirements-dev.txt", "images/requirements.txt", "images/requirements-build.txt"]


@pytest.mark.parametrize("name", LOCKS)
def test_locked_requirements_are_hashed_and_name_no_index(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    blocks = re.findall(r"^[a-zA-Z].*(?:\n +--hash=sha256:[0-9a-f]{64}(?: \\)?)+", text, re.MULTILINE)
    assert len(blocks) == len(re.findall(r"^[^\s#]", text, re.MULTILINE)), f"{name}: a requirement without a hash"
    assert "://" not in text
    assert "--index" not in text


def test_what_is_imported_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needs = [*project["dependencies"], *itertools.chain(*project["optional-dependencies"].values())]
    declared = {Requirement(need).name.lower() for need in needs}
    packages = packages_distributions()
    names = {name.split(".")[0] for source in files(*PRODUCT).values() for name in imports(source)}
    foreign = names - set(sys.stdlib_module_names) - set(PRODUCT)
    offences = [n for n in foreign if not {d.lower().replace("_", "-") for d in packages.get(n, [])} & declared]
    assert not offences, f"enter {sorted(offences)} into pyproject.toml and run `make lock`"


def test_lock_answers_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    locks = {"requirements-dev.txt": extras["dev"]}
    named = ("pipeline", "report", "digits", "metrics")
    locks["requirements.txt"] = [*project["dependencies"], *(need for name in named for need in extras[name])]
    for name, wanted in locks.items():
        pins = re.findall(r"^([\w.-]+)==([\w.]+)", (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE)
        for need in map(Requirement, wanted):
            found = [version for pinned, version in pins if pinned.lower() == need.name.lower()]
            answered = bool(found) and all(version in need.specifier for version in found)
            assert answered or need.name == "distillery", f"{name} has {found} for {need}; run `make lock`"


def test_the_checks_see_what_they_are_for() -> None:
    bad = "from distillery.steps import plan\nif x:\n    raise ValueError('no value')\nmean = 0.4914\n"
    twin = "def f(x):\n    '''{}'''\n" + "".join(f"    a{i} = x + {i}\n" for i in range(6))
    assert upward("distillery/errors.py", bad) == ["distillery/errors.py imports steps"]
    assert bare_raises("a.py", bad) == ["a.py:3: raise ValueError('no value')"]
    assert bare_raises("a.py", "raise ValueError") == ["a.py:1: raise ValueError"]
    assert not bare_raises("a.py", "raise ValueError(f'{x} is not allowed')\nraise typer.Exit(2)\nraise error\nraise")
    assert stray_constants("a.py", bad, {0.4914}) == ["a.py:4: 0.4914"]
    assert repeated({"a.py": twin.format("one"), "b.py": twin.format("two")}) == ["a.py:f = b.py:f"]
    assert not repeated({"a.py": twin, "b.py": twin.replace("+ 3", "+ 4")})
    assert listed("## The tree\n\n```\nMakefile  x\na/  y\n  b.py  z\n```\n") == ["Makefile", "a/", "a/b.py"]
