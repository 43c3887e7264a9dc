"""Who may import whom, and what must never appear: the rules of the layout, read from the sources."""

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {"ringserve": ROOT / "ringserve", "ringserve_kernels": ROOT / "kernels" / "ringserve_kernels",
            "ringserve_api": ROOT / "api" / "ringserve_api", "loadtests": ROOT / "loadtests"}
OURS = ("ringserve", "ringserve_kernels", "ringserve_api")
ENGINE_SEEN_BY_THE_API = {
    "ringserve", "ringserve.async_engine", "ringserve.config", "ringserve.errors", "ringserve.llm",
    "ringserve.needle", "ringserve.outputs", "ringserve.sampling_params", "ringserve.scheduling_params",
    "ringserve.selftest", "ringserve.tokenizer"}
WIRE = {"ringserve.v1", "ringserve.client"}
"""What the gRPC API is made of, and its client: beside the engine, in the package that users import."""
WITHOUT_TORCH = {f"ringserve.{name}" for name in (
    "scheduler", "forecast", "packing", "holdings", "plan_writer", "plan", "request", "block_pool", "prefix_cache",
    "placement", "cost_model", "fit", "policy", "tenants", "simulate")}


@dataclass(frozen=True)
class Import:
    module: str
    line: int
    deferred: bool
    """Inside a function, or for type checkers only: not run when the module is imported."""


@dataclass(frozen=True)
class Source:
    module: str
    path: Path

    @property
    def tree(self) -> ast.Module:
        return parse(self.path)

    @property
    def imports(self) -> list[Import]:
        return imports_of(self.path)

    def __str__(self) -> str:
        return str(self.path.relative_to(ROOT))


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


@cache
def imports_of(path: Path) -> list[Import]:
    return list(_imports(parse(path), deferred=False))


def _imports(node: ast.AST, deferred: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, child.lineno, deferred) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"a relative import in line {child.lineno}"
            module = child.module or ""
            yield Import(module, child.lineno, deferred)
            # `from package import module` imports the module too.
            yield from (Import(f"{module}.{alias.name}", child.lineno, deferred) for alias in child.names
                        if f"{module}.{alias.name}" in MODULES)
        else:
            function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            typing = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            yield from _imports(child, deferred or function or typing)


def module_name(package: str, path: Path) -> str:
    parts = (package, *path.relative_to(PACKAGES[package]).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(package, path): Source(module_name(package, path), path)
           for package, folder in PACKAGES.items() for path in sorted(folder.rglob("*.py"))}
SOURCES = [source for source in MODULES.values() if not source.module.startswith("loadtests")]


def sources_of(package: str) -> list[Source]:
    return [s for s in MODULES.values() if s.module == package or s.module.startswith(package + ".")]


def is_wire(module: str) -> bool:
    return any(module == name or module.startswith(name + ".") for name in WIRE)


def top(module: str) -> str:
    return module.partition(".")[0]


def assert_none(broken: list[str]) -> None:
    assert not broken, "\n".join(broken)


def test_every_package_was_found() -> None:
    for package in OURS:
        assert sources_of(package), package


def test_load_tests_know_the_server_over_http_only() -> None:
    assert_none([f"{source}:{i.line} imports {i.module}" for source in sources_of("loadtests") for i in source.imports
                 if top(i.module) in OURS])


def test_the_api_touches_the_engine_through_its_front_only() -> None:
    assert_none([f"{source}:{i.line} imports {i.module}" for source in sources_of("ringserve_api")
                 for i in source.imports
                 if top(i.module) == "ringserve_kernels"
                 or (top(i.module) == "ringserve" and not is_wire(i.module)
                     and i.module not in ENGINE_SEEN_BY_THE_API)])


def test_the_engine_knows_no_web() -> None:
    web = {"fastapi", "starlette", "uvicorn", "grpc", "aiohttp", "ringserve_api"}
    assert_none([f"{source}:{i.line} imports {i.module}" for source in sources_of("ringserve")
                 for i in source.imports
                 if (top(i.module) in web or is_wire(i.module)) and not is_wire(source.module)])


def test_the_client_knows_no_engine() -> None:
    known = {"ringserve", "ringserve.errors"}
    assert_none([f"{source}:{i.line} imports {i.module}" for source in sources_of("ringserve.client")
                 for i in source.imports
                 if top(i.module) in (*OURS, "torch", "numpy", "transformers") and not is_wire(i.module)
                 and i.module not in known and not i.deferred])


def test_kernels_know_torch_and_nothing_else() -> None:
    libraries = {"torch", "numpy", "triton", "flash_attn", "flash_attn_interface"}
    known = {"ringserve_kernels", *libraries, *sys.stdlib_module_names}
    assert_none([f"{source}:{i.line} imports {i.module}" for source in sources_of("ringserve_kernels")
                 for i in source.imports if top(i.module) not in known])


def imported_at_once(module: str) -> dict[str, str]:
    """Every module that importing this one runs -> the module that imports it, through our packages."""
    reached: dict[str, str] = {}
    frontier = [module]
    while frontier:
        current = frontier.pop()
        if current not in MODULES:
            continue
        packages = [current.rsplit(".", n)[0] for n in range(1, current.count(".") + 1)]
        direct = [i.module for i in MODULES[current].imports if not i.deferred]
        for name in [*packages, *direct]:
            if name not in reached:
                reached[name] = current
                frontier.append(name)
    return reached


@pytest.mark.parametrize("module", sorted(WITHOUT_TORCH & MODULES.keys()))
def test_what_decides_imports_no_torch(module: str) -> None:
    heavy = {top(i): by for i, by in imported_at_once(module).items()
             if top(i) in ("torch", "transformers", "numpy", "ringserve_kernels")}
    assert not heavy, f"{module} imports {heavy}"


@pytest.mark.parametrize("package", OURS)
def test_triton_is_imported_on_request_only(package: str) -> None:
    """It is an extra, and how its kernels run (compiled, interpreted) is decided when it is first imported."""
    reached = imported_at_once(package)
    assert not {module: by for module, by in reached.items() if top(module) == "triton"}
    assert "ringserve_kernels.triton" not in reached


def test_nothing_dangerous_is_imported() -> None:
    forbidden = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "multiprocessing"}
    assert_none([f"{source}:{i.line} imports {i.module}" for source in SOURCES for i in source.imports
                 if top(i.module) in forbidden or i.module == "torch.multiprocessing"])


OBJECT_COLLECTIVES = {"all_gather_object", "gather_object", "scatter_object_list", "broadcast_object_list",
                      "send_object_list", "recv_object_list"}


def test_nothing_dangerous_is_called() -> None:
    broken = []
    for source in SOURCES:
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Attribute) and node.attr in OBJECT_COLLECTIVES | {"multiprocessing"}:
                broken.append(f"{source}:{node.lineno} uses {node.attr}")
            if isinstance(node, ast.Call):
                broken += [f"{source}:{node.lineno} {said}" for said in _dangerous(node)]
    assert_none(broken)


def _dangerous(call: ast.Call) -> Iterator[str]:
    name = ast.unparse(call.func)
    if name in ("time.sleep", "sleep"):
        yield "polls with sleep"
    if name in ("eval", "exec", "torch.save"):
        yield f"calls {name}"
    for keyword in call.keywords:
        value = ast.unparse(keyword.value)
        if keyword.arg == "trust_remote_code" and value != "False":
            yield f"trust_remote_code={value}"
        if keyword.arg == "weights_only" and value != "True":
            yield f"weights_only={value}"


def test_no_asyncio_loop_polls_with_sleep() -> None:
    """Waiting has an event, a queue or a socket; a sleep inside a loop is polling."""
    assert_none([f"{source}:{call.lineno} sleeps in a loop" for source in SOURCES
                 for loop in ast.walk(source.tree) if isinstance(loop, ast.While | ast.For | ast.AsyncFor)
                 for call in ast.walk(loop)
                 if isinstance(call, ast.Call) and ast.unparse(call.func) == "asyncio.sleep"])


@pytest.mark.parametrize("folder", ["kernels", "api", "."])
def test_folders_that_only_hold_packages_are_none(folder: str) -> None:
    """A top-level package named `kernels` is taken for another library that transformers looks for."""
    assert not (ROOT / folder / "__init__.py").exists()


@pytest.mark.parametrize("name", ["utils", "util", "common", "helpers", "misc"])
def test_a_helper_lives_with_its_noun(name: str) -> None:
    everywhere = [*SOURCES, *(Source("tests", path) for path in (ROOT / "tests").rglob("*.py"))]
    assert_none([str(source) for source in everywhere if source.path.stem == name or name in source.path.parts])


def test_a_step_is_schedule_execute_update() -> None:
    tree = MODULES["ringserve.engine"].tree
    [engine] = [n for n in ast.walk(tree) if isinstance(n, ast.ClassDef) and n.name == "LLMEngine"]
    [step] = [n for n in engine.body if isinstance(n, ast.FunctionDef) and n.name == "step"]
    body = [s for s in step.body if not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))]
    assert len(body) == 3
    for statement, word in zip(body, ("schedule", "execute", "update")):
        assert f".{word}(" in ast.unparse(statement)


def test_scheduler_and_runner_never_import_each_other() -> None:
    model = [s for s in sources_of("ringserve.model") for i in s.imports if i.module == "ringserve.scheduler"]
    assert not model
    assert not [i for i in imported_at_once("ringserve.scheduler") if i.startswith("ringserve.model")]


@pytest.mark.parametrize("source", SOURCES, ids=str)
def test_every_module_says_what_it_is(source: Source) -> None:
    assert ast.get_docstring(source.tree), f"{source} has no docstring"
