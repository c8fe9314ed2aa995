"""Notebooks, package, README and settings.ini say the same thing."""

import ast
import configparser
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted(path for path in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts)
MODULES = {  # module -> its notebook; "2_engine/03_generate.ipynb" comes after "1_build/04_bake.ipynb"
    re.search(r"#\|\s*default_exp ([\w.]+)", path.read_text())[1]: path
    for path in NOTEBOOKS if "default_exp" in path.read_text()
}


def cells(path: Path) -> list[dict]:
    return json.loads(path.read_text())["cells"]


def source(cell: dict) -> str:
    return "".join(cell["source"])


@pytest.fixture(scope="module")
def scratch(tmp_path_factory) -> Path:
    """A copy of everything that nbdev reads and writes."""
    copy = tmp_path_factory.mktemp("a copy")
    shutil.copytree(ROOT / "nbs", copy / "nbs")
    (copy / "sdworker").mkdir()
    shutil.copy(ROOT / "sdworker" / "__init__.py", copy / "sdworker")
    shutil.copy(ROOT / "pyproject.toml", copy)
    return copy


def nbdev(command: str, where: Path) -> None:
    subprocess.run([Path(sys.executable).with_name(command)], cwd=where, check=True, capture_output=True)


def test_package_is_what_the_notebooks_export(scratch):
    nbdev("nbdev-export", scratch)
    ours, exported = ({str(path.relative_to(root)): path.read_text() for path in (root / "sdworker").rglob("*.py")}
                      for root in (ROOT, scratch))
    assert set(ours) == set(exported), "each module comes from a notebook"
    stale = [path for path in ours if ours[path] != exported[path]]
    assert not stale, f"{stale} are not what their notebooks export; edit the notebooks and run `make notebooks`"


def test_notebooks_are_clean(scratch):
    nbdev("nbdev-clean", scratch)
    for path in NOTEBOOKS:
        assert json.loads(path.read_text()) == json.loads((scratch / path.relative_to(ROOT)).read_text()), (
            f"{path.relative_to(ROOT)} is not clean; run `make notebooks`")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: str(path.relative_to(ROOT / "nbs")))
def test_notebook_is_one_to_read(path):
    first = next(cell for cell in cells(path) if cell["cell_type"] == "markdown")
    title, _, rest = source(first).partition("\n")
    assert title.startswith("# ") and rest.strip().startswith("> "), "a title and a one-sentence summary come first"
    code = [source(cell) for cell in cells(path) if cell["cell_type"] == "code"]
    assert max(text.count("\n") + 1 for text in code) <= 40, "cells hold one idea"
    assert path.stat().st_size < 300_000
    text = path.read_text()
    assert not re.search(r'"(/home/|/root/|/Users/|/tmp/)', text), "no paths of one machine"
    assert not any(output["output_type"] == "error" for cell in cells(path) for output in cell.get("outputs", []))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: str(path.relative_to(ROOT / "nbs")))
def test_a_source_is_a_page_and_not_a_front_door(path):
    fronts = set(re.findall(r"\]\((https?://[^/)]+)/?\)", "\n".join(source(cell) for cell in cells(path))))
    assert fronts <= {"https://simpy.readthedocs.io"}, "a figure cannot be found there"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: str(path.relative_to(ROOT / "nbs")))
def test_who_shows_a_record_names_its_torch(path):
    code = "\n".join(source(cell) for cell in cells(path) if cell["cell_type"] == "code")
    shown = {name for name in re.findall(r"\.\./results(?:/([\w{}-]+)\.json)?", code)
             if not re.search("gpu|cuda|plan-trace", name)}  # these name a GPU; a simulation has no torch in it
    assert not shown or "measured_on(" in code or path.stem == "06_layers", "the image's own record lists its versions"


EXPORTS = re.compile(r"#\|\s*exports?\b")


@pytest.mark.parametrize("name", MODULES)
def test_exported_definitions_have_an_example(name):
    """One of the next two code cells is not exported, and names the function or class."""
    code = [source(cell) for cell in cells(MODULES[name]) if cell["cell_type"] == "code"]
    missing = []
    for at, text in enumerate(code):
        examples = "\n".join(after for after in code[at + 1:at + 3] if not EXPORTS.match(after))
        defined = [node.name for node in ast.parse(text).body
                   if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
                   and not node.name.startswith("_")] if EXPORTS.match(text) else []
        missing += [definition for definition in defined if not re.search(rf"\b{definition}\b", examples)]
    assert not missing, f"no example follows {', '.join(missing)}"


def test_a_module_lies_in_its_notebooks_chapter():
    for name, path in MODULES.items():
        assert re.fullmatch(r"\d_" + name.split(".")[0], path.parent.name), f"{path} exports {name}"
        assert re.fullmatch(r"\d\d_\w+\.ipynb", path.name), f"{path.name} has no two-digit number"


def imported(name: str) -> set[str]:
    """The modules of this package that a module imports, also inside of functions: "core.settings"."""
    modules = set()
    for node in ast.walk(ast.parse((ROOT / "sdworker" / f"{name.replace('.', '/')}.py").read_text())):
        if isinstance(node, ast.ImportFrom):
            inside = f"sdworker.{name}".split(".")[:-node.level] if node.level else []  # nbdev's are relative
            module = ".".join([*inside, *([node.module] if node.module else [])])
            modules |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
    return {module.removeprefix("sdworker.") for module in modules} & set(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_only_lower_ones(name):
    """A chapter imports only chapters with a lower number; within a chapter the notebooks' numbers count."""
    assert not [other for other in imported(name) if MODULES[other] >= MODULES[name]]


def test_the_lab_is_not_imported_by_the_worker():
    """It is not in the image; two commands of the command line say so there."""
    outside = {name for name in MODULES if not name.startswith("lab.")}
    assert {name for name in outside if any(other.startswith("lab.") for other in imported(name))} == {"cli.reports"}
    left_out = {"embedded.training", "embedded.tiny_models"}
    assert not {name for name in outside - left_out if left_out & imported(name)}


@pytest.mark.parametrize("path", sorted((ROOT / "sdworker").rglob("[!_]*.py")), ids=lambda path: path.stem)
def test_a_module_binds_a_name_once(path):
    """A notebook's example runs before a later cell binds its name again; whoever imports the module gets the later."""
    names = []
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.append(node.name)
        elif isinstance(node, ast.Assign):
            names += [target.id for target in node.targets if isinstance(target, ast.Name)]
    assert sorted(names) == sorted(set(names))


def definitions(body: list[ast.stmt], owner: str = "") -> Iterator[tuple[str, ast.AST]]:
    """Public functions, methods and fields with their qualified names."""
    for node in body:
        name = getattr(node, "name", "") or ast.unparse(getattr(node, "target", ast.Name("_")))
        if name.startswith("_") and name not in ("__init__", "__call__"):
            continue
        if isinstance(node, ast.ClassDef):
            yield from definitions(node.body, f"{name}.")
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or (owner and isinstance(node, ast.AnnAssign)):
            yield f"{owner}{name}", node


def raised(body: list[ast.AST]) -> Iterator[str]:
    """Names of the exceptions that leave a function; what it catches itself, and a command's exit, are left out."""
    for node in body:
        if isinstance(node, ast.Raise) and node.exc:
            name = ast.unparse(node.exc.func if isinstance(node.exc, ast.Call) else node.exc)
            yield from [name] if re.fullmatch("[A-Z]\\w+", name) else []
        elif isinstance(node, ast.Try) and node.handlers:
            yield from raised([*node.handlers, *node.orelse, *node.finalbody])
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda):
            yield from raised(list(ast.iter_child_nodes(node)))


def methods(node: ast.ClassDef) -> dict[str, list[str]]:
    """The names of each method's parameters."""
    return {method.name: [argument.arg for argument in method.args.args]
            for method in node.body if isinstance(method, ast.FunctionDef | ast.AsyncFunctionDef)}


def undocumented(path: Path, protocol: dict[str, list[str]]) -> Iterator[str]:
    """Parameters, fields and results without a comment on their line, and exceptions that no docstring names."""
    text = path.read_text(encoding="utf-8")
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    commented = {token.start[0] for token in tokens if token.type == tokenize.COMMENT}
    tree = ast.parse(text)
    referring = {f"{node.name}.{method}" for node in tree.body if isinstance(node, ast.ClassDef)
                 and "`Engine`" in (ast.get_docstring(node) or "") for method, parameters in methods(node).items()
                 if protocol.get(method) == parameters}  # `Engine` documents these

    def has_comment(node: ast.AST) -> bool:
        return any(line in commented for line in range(node.lineno, node.end_lineno + 1))
    for name, node in definitions(tree.body):
        if isinstance(node, ast.AnnAssign):
            yield from [name] if not has_comment(node) and "description=" not in ast.unparse(node) else []
            continue
        doc = ast.get_docstring(node) or ""
        yield from (f"{name} raises {error}" for error in raised(node.body) if error not in doc)
        if name in referring:
            continue
        arguments = [argument for argument in ast.walk(node.args) if isinstance(argument, ast.arg)]
        yield from (f"{name}({argument.arg})" for argument in arguments if argument.arg not in ("self", "cls")
                    and not has_comment(argument) and "help=" not in ast.unparse(argument))  # typer's
        if node.returns and not has_comment(node.returns) and (
                not doc or re.search(r"\b(Any|dict|list|tuple)\b", ast.unparse(node.returns))):
            yield f"{name} -> {ast.unparse(node.returns)}"


def test_public_parameters_fields_results_and_exceptions_are_documented():
    """In a comment on the same line; a result's docstring is enough where its type says the rest."""
    tree = ast.parse((ROOT / "sdworker" / "engine" / "types.py").read_text(encoding="utf-8"))
    engine = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Engine")
    paths = sorted((ROOT / "sdworker").rglob("[!_]*.py"))
    missing = [f"{path.relative_to(ROOT)}: {name}" for path in paths for name in undocumented(path, methods(engine))]
    assert not missing, "\n".join(["say what these are, beside them in their notebooks:", *missing])


def test_modules_import_nothing_that_only_their_notebook_uses():
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F401", "--quiet", ROOT / "sdworker"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_importing_sdworker_is_cheap():
    heavy = "torch transformers diffusers runpod numpy pydantic".split()
    code = f"import sys, sdworker; sys.exit(', '.join(set({heavy}) & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, f"import sdworker brings {done.stderr}"


def test_the_handler_imports_only_what_refusing_a_request_needs():
    """A new name here costs every cold start: measure it (`python -X importtime`), then allow it or import it later."""
    code = "import sys, sdworker.serve.handler; print(*{name.partition('.')[0] for name in sys.modules})"
    names = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    imported_names = {name for name in names if not name.startswith("_")} - sys.stdlib_module_names
    imported_names -= {"sitecustomize"}  # Debian's interpreter brings it, whatever is imported
    assert imported_names == {"sdworker", "PIL", "defusedxml", "annotated_types", "dotenv", "pydantic", "pydantic_core",
                              "pydantic_settings", "typing_extensions", "typing_inspection"}


def test_refusing_a_request_needs_no_torch():
    code = ("import sys; from sdworker.serve.handler import handler; "
            "assert 'width' in handler({'input': {'prompt': 'x', 'width': 65}})['error']; "
            "sys.exit(1 if 'torch' in sys.modules else 0)")
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


PROGRAMS = sorted(path.relative_to(ROOT) for folder in ("sdworker", "docs") for path in (ROOT / folder).rglob("*.py")
                  if "__name__ == \"__main__\"" in path.read_text())


@pytest.mark.parametrize("path", PROGRAMS, ids=str)
@pytest.mark.parametrize("argument", ["--help", "--no-such-option"])
def test_a_program_begins_nothing_when_asked_for_help_or_something_unknown(path, argument, tmp_path):
    command = [ROOT / path] if path.parts[0] == "docs" else ["-m", ".".join(path.with_suffix("").parts)]
    done = subprocess.run([sys.executable, *command, argument], cwd=tmp_path, capture_output=True, text=True,
                          timeout=60)
    assert done.returncode == (0 if argument == "--help" else 2), done.stderr
    assert "usage:" in (done.stdout + done.stderr).lower() and not list(tmp_path.iterdir())


def test_readme_is_made_from_the_index():
    command = [sys.executable, ROOT / "docs" / "notebooks.py", "--readme", "-"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (ROOT / "README.md").read_text() == done.stdout, "README.md is stale; run `make notebooks`"


def test_readme_links_lead_somewhere():
    links = re.findall(r"\]\((?!https?:|#)([^)]+)\)", (ROOT / "README.md").read_text())
    assert links and not [link for link in links if not (ROOT / link).exists()]


def test_readme_lists_every_notebook():
    text = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Read on")[2]
    listed = set(re.findall(r"\]\(nbs/([\w/]+\.ipynb)\)", text))
    assert listed == {path.relative_to(ROOT / "nbs").as_posix() for path in NOTEBOOKS} - {"index.ipynb"}


def test_contributing_names_what_exists():
    """Its paragraph on where changes go names notebooks, and tables, classes and functions in their modules."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("## Some changes")[2].partition("\n## ")[0]
    quoted = re.findall(r"`([^`]+)`", text)
    notebooks = [name for name in quoted if re.match(r"\d_", name)]
    assert notebooks and all((ROOT / "nbs" / f"{name}.ipynb").exists() for name in notebooks)
    modules = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "sdworker").rglob("[!_]*.py"))
    names = [name for name in quoted if re.fullmatch(r"[A-Z]\w+|[a-z]+", name)]
    assert len(names) > 10 and not [
        name for name in names if not re.search(rf"^(class |(async )?def )?{name}\b", modules, re.MULTILINE)]


def test_the_top_level_has_nothing_else():
    """A new entry needs a reason."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a clone, so git does not say which files belong here")
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    assert {name.partition("/")[0] for name in names if name} == {
        ".ci", ".dockerignore", ".gitattributes", ".gitignore", ".runpod", "CHANGELOG.md", "CONTRIBUTING.md",
        "Dockerfile", "LICENSE", "Makefile", "README.md", "docs", "hub.json", "nbs", "pyproject.toml", "results",
        "sdworker", "settings.ini", "setup.py", "tests"}


def readme_commands() -> list[str]:
    block = re.search(r"```sh\n(make demo[^\n]*)\n(make test[^\n]*)\n```", (ROOT / "README.md").read_text())
    return [line.split("#")[0].strip() for line in block.groups()]


def test_readme_test_command_is_what_ci_runs():
    """CI runs it as it is, and then the slow tests; together they are `make test-all`."""
    assert readme_commands()[1] == "make test"
    assert (ROOT / ".ci" / "run").read_text().splitlines()[-2:] == ["make test", "make test-slow"]
    assert re.search(r"^test-all: test test-slow\b", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.skipif(not (ROOT / ".venv" / "ready").exists(), reason="not set up by make: it would install anew")
def test_readme_demo_command_works():
    """CI runs the demo too: as this test."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    done = subprocess.run(readme_commands()[0].split(), cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (ROOT / "out" / "demo" / "index.html").exists() and "6 of 6 requests" in done.stdout


def test_settings_ini_is_the_source_of_metadata():
    from importlib.metadata import metadata

    parser = configparser.ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini")
    installed, settings = metadata("sdworker"), parser["DEFAULT"]
    assert installed["Version"] == settings["version"] and installed["Summary"] == settings["description"]
    names = {re.match(r"[\w-]+", line)[0] for line in installed.get_all("Requires-Dist") if "extra ==" not in line}
    assert names == {re.match(r"[\w-]+", line)[0] for line in settings["requirements"].split()}
