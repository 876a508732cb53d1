"""Nothing in the source can run what a file says: no pickle, eval or shell, seen on the syntax tree of every file."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
SOURCES = sorted(p for folder in ("compiler", "schedules", "targets") for p in (ROOT / folder).rglob("*.py"))

MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "jsonpickle", "yaml"}
BUILTINS = {"eval", "exec", "__import__"}
FUNCTIONS = {("os", "system"), ("os", "popen"), ("subprocess", "getoutput"), ("subprocess", "getstatusoutput")}
KEYWORDS = {"shell", "allow_pickle"}


def dangers(tree: ast.AST) -> Iterator[str]:
    """What a reader of foreign files must not hold, with its line."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                found = [a.name for a in names if a.name.partition(".")[0] in MODULES]
            case ast.ImportFrom(module=str(module), names=names):
                found = [module] if module.partition(".")[0] in MODULES else []
                found += [a.name for a in names if (module, a.name) in FUNCTIONS or module == "builtins"]
            case ast.Name(id=name) if name in BUILTINS | {"__builtins__"}:
                found = [name]
            case ast.Attribute(value=ast.Name(id=owner), attr=name):
                found = [f"{owner}.{name}"] if (owner, name) in FUNCTIONS or owner == "builtins" else []
            case ast.keyword(arg=str(name), value=value) if name in KEYWORDS:
                found = [] if isinstance(value, ast.Constant) and value.value is False else [f"{name}=…"]
            case _:
                found = []
        yield from (f"{getattr(node, 'lineno', '?')}: {name}" for name in found)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_runs_what_a_file_says(path: Path) -> None:
    assert list(dangers(ast.parse(path.read_text(encoding="utf8")))) == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "import a, pickle as b",
        "from pickle import loads",
        "import joblib.numpy_pickle",
        "from yaml import load",
        "x = eval(y)",
        "run = exec",
        "import builtins\nbuiltins.eval('1')",
        "from builtins import eval as e",
        "__import__('os')",
        "os.system('ls')",
        "from os import system",
        "subprocess.run('ls', shell=True)",
        "subprocess.run('ls', shell=yes)",
        "numpy.load(f, allow_pickle=True)",
        "def f():\n    import marshal",
    ],
)
def test_each_would_be_seen(line: str) -> None:
    assert list(dangers(ast.parse(line)))


@pytest.mark.parametrize("line", ["numpy.load(f, allow_pickle=False)", "re.compile('x')", "model.eval()", "import os"])
def test_the_harmless_is_not(line: str) -> None:
    assert not list(dangers(ast.parse(line)))
