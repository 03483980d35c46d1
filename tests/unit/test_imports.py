"""The directions in which the packages import each other, read off the source, and proved in a fresh interpreter."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LINKED = ("actors", "cluster", "kernels")

# What each package may import of ours. `env` imports nothing of ours, so that any process may ask it.
MAY_IMPORT = {
    "core": {"core"},
    "kernels": {"kernels", "core"},
    "model": {"model", "kernels", "core"},
    "cluster": {"cluster", "core", "env"},
    "actors": {"actors", "core", "kernels", "model", "cluster", "env"},
    "serving": {"serving", "core", "actors", "env"},
    "env": set(),
    "errors": {"core"},
    "config": {"core"},
}
FORBIDDEN_IN_CORE = ("ray", "triton", "fastapi", "starlette", "transformers", "uvicorn")


def sources() -> Iterator[tuple[str, Path]]:
    """Every module of ours with its dotted name below pearl_ray."""
    for folder in (ROOT / "pearl_ray", *(ROOT / name for name in LINKED)):
        for path in sorted(folder.rglob("*.py")):
            inside = path.relative_to(ROOT / "pearl_ray" if folder.name == "pearl_ray" else ROOT)
            if folder.name == "pearl_ray" and inside.parts[0] in LINKED:
                continue  # a Python that follows links would see these twice
            yield ".".join(inside.with_suffix("").parts).removesuffix(".__init__"), path


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and dotted name of every import, inside functions and TYPE_CHECKING blocks too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            if node.module == "pearl_ray":
                yield from ((node.lineno, f"pearl_ray.{alias.name}") for alias in node.names)
            elif node.module is not None:
                yield node.lineno, node.module


def violations(name: str, source: str) -> list[str]:
    """What a module of that name imports and may not."""
    found = []
    package = name.split(".")[0]
    for line, target in imported(ast.parse(source)):
        where = f"{name}:{line} imports {target}"
        top, _, rest = target.partition(".")
        if top in LINKED:
            found.append(f"{where}: write pearl_ray.{top}")
        elif top == "pearl_ray" and package in MAY_IMPORT and rest.split(".")[0] not in MAY_IMPORT[package]:
            found.append(f"{where}: {package} may only import {sorted(MAY_IMPORT[package])}")
        elif package == "core" and top in FORBIDDEN_IN_CORE:
            found.append(f"{where}: core knows no {top}")
    return found


def test_packages_import_in_one_direction_only() -> None:
    assert [bad for name, path in sources() for bad in violations(name, path.read_text("utf-8"))] == []


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("core.x", "import ray"),
        ("core.x", "def f():\n    from transformers import AutoTokenizer"),
        ("core.x", "from pearl_ray import config"),
        ("kernels.x", "from pearl_ray.model.layers import Linear"),
        ("model.x", "import pearl_ray.cluster.shm"),
        ("cluster.x", "from pearl_ray.actors import coordinator"),
        ("serving.x", "from pearl_ray.model.tokenizer import Tokenizer"),
        ("actors.x", "from actors import coordinator"),
        ("env", "from pearl_ray.core import errors"),
    ],
)
def test_the_check_finds_a_wrong_import(name: str, source: str) -> None:
    assert len(violations(name, source)) == 1


def test_the_check_sees_every_package() -> None:
    seen = {name.split(".")[0] for name, _ in sources()}
    assert {"core", "kernels", "model", "cluster", "actors"} <= seen


def test_nothing_but_env_reads_the_environment() -> None:
    readers = []
    for name, path in sources():
        if name in ("env", "cluster.ray_session", "cluster.ray_probe"):  # Ray's own variables, which those also set
            continue
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            text = ast.unparse(node) if isinstance(node, (ast.Attribute, ast.Subscript)) else ""
            is_read = isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load)
            if text in ("os.environ.get", "os.getenv") or (is_read and text.startswith("os.environ[")):
                readers.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert readers == []


def run_fresh(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_all_of_core_brings_no_ray_triton_http_or_transformers() -> None:
    modules = sorted(f"pearl_ray.{name}" for name, _ in sources() if name.split(".")[0] == "core")
    code = f"""
import importlib, sys
for name in {modules!r}:
    importlib.import_module(name)
print([name for name in {FORBIDDEN_IN_CORE!r} if name in sys.modules])
"""
    assert run_fresh(code).strip() == "[]"


def test_the_package_itself_and_its_help_import_neither_ray_nor_torch() -> None:
    code = """
import sys
import pearl_ray, pearl_ray.cli
pearl_ray.PearlConfig, pearl_ray.SamplingParams, pearl_ray.RequestOutput
print([name for name in ("ray", "torch", "transformers", "triton", "fastapi") if name in sys.modules])
"""
    assert run_fresh(code).strip() == "[]"


def test_what_asks_a_running_deployment_or_serves_http_loads_no_torch() -> None:
    names = ("pearl_ray.client", "pearl_ray.running", "pearl_ray.commands.status", "pearl_ray.serving.http_actor")
    code = f"""
import importlib, sys
for name in {names!r}:
    importlib.import_module(name)
print([name for name in ("torch", "transformers", "triton") if name in sys.modules])
"""
    assert run_fresh(code).strip() == "[]"


def test_the_lazy_names_are_the_objects_themselves() -> None:
    import pearl_ray
    from pearl_ray.config import PearlConfig
    from pearl_ray.core import errors

    assert pearl_ray.PearlConfig is PearlConfig
    assert pearl_ray.ConfigError is errors.ConfigError
    assert {"PearlEngine", "connect", "SamplingParams", "RequestOutput", "CompletionOutput"} <= set(dir(pearl_ray))
    with pytest.raises(AttributeError, match="no attribute 'PearlEngin'"):
        pearl_ray.PearlEngin  # noqa: B018


def test_every_error_has_its_public_name() -> None:
    import pearl_ray
    import pearl_ray.errors
    from pearl_ray.core import errors

    defined = {name for name, value in vars(errors).items() if isinstance(value, type)}
    assert defined == set(pearl_ray.errors.__all__)
    assert defined <= set(pearl_ray.__all__)


@pytest.mark.parametrize("name", LINKED)
def test_the_top_level_folders_are_packages_inside_pearl_ray(name: str) -> None:
    link = ROOT / "pearl_ray" / name
    assert link.is_symlink() and link.resolve() == ROOT / name
