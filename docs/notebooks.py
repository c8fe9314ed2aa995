"""Run the notebooks and renew everything that is made from them: outputs, package, README.md."""

import argparse
import re
import subprocess
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbconvert import MarkdownExporter
from rich.progress import track

ROOT = Path(__file__).parent.parent
NBS = ROOT / "nbs"


def nbdev(command: str) -> None:
    """Run one of nbdev's commands from this environment in the repository."""
    subprocess.run([Path(sys.executable).with_name(command)], cwd=ROOT, check=True)


def worth_keeping(output: nbformat.NotebookNode) -> bool:
    """Whether an output is more than a log line or a progress bar."""
    if output.output_type == "stream":
        return output.name == "stdout"
    if "application/vnd.jupyter.widget-view+json" in output.get("data", {}):
        return False
    text = output.get("data", {}).get("text/plain", "an error")
    return bool(text.strip()) and ("━" not in text or "┏" in text)  # rich's bars, but not its tables


def run(path: Path) -> None:
    """Execute a notebook and keep its outputs, progress bars and log lines excepted."""
    notebook = nbformat.read(path, 4)
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(path.parent)}}).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if worth_keeping(output)]
    notebook.metadata.pop("widgets", None)  # the state of progress bars
    nbformat.write(notebook, path)


def readme() -> str:
    """README.md from index.ipynb: its code and pictures, without directives, with links that work one folder up."""
    notebook = nbformat.read(NBS / "index.ipynb", 4)
    notebook.cells = [cell for cell in notebook.cells if not re.match(r"#\|\s*hide\b", cell.source)]
    notebook.metadata["language_info"] = {"name": "python"}
    text, _ = MarkdownExporter().from_notebook_node(notebook)
    text = re.sub(r"^#\s*NBVAL_\w+\n", "", text, flags=re.MULTILINE)
    text = re.sub(r"\]\((?!https?:|#)([^)]+)\)", r"](nbs/\1)", text).replace("](nbs/../", "](")
    return "<!-- Made from nbs/index.ipynb by `make notebooks`; edit that. -->\n\n" + text.strip() + "\n"


def main() -> None:
    """Renew what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("notebooks", nargs="*",
                        help="parts of notebook names to run, such as 2_engine or 05_attention; default: all")
    parser.add_argument("--readme", metavar="FILE", help="only write the README to this file; - for standard output")
    options = parser.parse_args()
    if options.readme:
        (sys.stdout if options.readme == "-" else open(options.readme, "w", encoding="utf-8")).write(readme())
        return
    nbdev("nbdev-export")
    parts = options.notebooks or [""]
    paths = [path for path in sorted(NBS.rglob("*.ipynb")) if ".ipynb_checkpoints" not in path.parts
             and any(part in str(path.relative_to(NBS)) for part in parts)]
    if not paths:
        raise SystemExit(f"no notebook is called so: {', '.join(parts)}")
    try:
        for path in track(paths, "running notebooks"):
            run(path)
    finally:
        nbdev("nbdev-clean")
    (ROOT / "README.md").write_text(readme(), encoding="utf-8")


if __name__ == "__main__":
    main()
