"""A notebook as a page of the site: what nbdev hides is gone, exported code is marked, names in backticks are links."""
import ast
import re
from dataclasses import dataclass
from pathlib import Path

import reference
from fastcore.nbio import NbCell, mk_cell, new_nb, write_nb
from nbdev.process import NBProcessor
from nbdev.processors import clean_magics, filter_stream_, hide_, hide_line

Targets = dict[str, str]  # a name in backticks -> where it leads


@dataclass
class Chapter:
    "A notebook, with its place in the site."
    path: Path
    cells: list[NbCell]  # without nbdev's directives and what they hide
    title: str
    promise: str  # the quote under the title
    module: str  # what it exports to, such as "sdworker.engine.generate"; empty without an export
    source: str  # of that module

    @property
    def address(self) -> str:
        "The path of its page in the site: that of the notebook in `nbs`."
        folder = self.path.parent.name
        return f"{folder}/{self.path.name}" if folder[0].isdigit() else self.path.name


def read(path: Path, package: Path) -> Chapter:
    "Read a notebook and the module it exports to."
    processor = NBProcessor(path, procs=[hide_, hide_line, filter_stream_, clean_magics])
    processor.process()
    exports = [cell.directives_["default_exp"] for cell in processor.nb.cells if "default_exp" in cell.directives_]
    cells = [cell for cell in processor.nb.cells if cell.source.strip()]
    title = re.match(r"# (.+)\n*(?:> (.+))?", cells[0].source)
    if not title:
        raise SystemExit(f"{path.name} must begin with a Markdown cell: `# Title` and, under it, `> promise`.")
    module = f"{package.name}.{exports[0]}" if exports else ""
    source = (package / f"{exports[0].replace('.', '/')}.py").read_text(encoding="utf-8") if exports else ""
    return Chapter(path, cells, title[1].strip(), (title[2] or "").strip(), module, source)


def name_targets(chapters: list[Chapter], current: Chapter) -> Targets:
    "Map each exported name to its reference; of equal names that of `current`, or else the first, is taken."
    targets = {}
    for chapter in sorted(chapters, key=lambda chapter: chapter is not current):
        for name in reference.public(chapter.source):
            target = f"#{chapter.module}.{name}"
            parts = target[1:].split(".")  # sdworker, chapter, module, name
            targets |= {".".join(parts[k:]): target for k in range(3)}
            targets.setdefault(name, target)
    return targets


def module_targets(chapters: list[Chapter], current: Chapter) -> Targets:
    "Map each module to its notebook."
    pages = {chapter.module: f"/{chapter.address}" for chapter in chapters
             if chapter.module and chapter is not current}
    return pages | {module.partition(".")[2]: page for module, page in pages.items()}


def link(text: str, targets: Targets) -> str:
    "Make names in backticks links, except in code blocks, headings and links; unlink what lies outside the site."
    def replace(match: re.Match) -> str:
        target = targets.get(match["name"] or "")
        return f"[{match[0]}]({target})" if target else match[0]
    text = re.sub(r"\[([^\]]*)\]\((?:\.\./)+(?!\d|index|images)[^)]*\)", r"\1", text)
    leave = r"^(?P<fence>```+|~~~+).*?^(?P=fence)|^#.*?$|``.+?``|\[[^\]]*\]\([^)]*\)"
    return re.sub(rf"{leave}|`(?P<name>[\w.]+)(?:\(\))?`", replace, text, flags=re.MULTILINE | re.DOTALL)


def exported(cell: NbCell) -> dict[str, ast.stmt]:
    "The names that a cell defines for the module."
    return reference.definitions(cell.source) if {"export", "exports"} & cell.directives_.keys() else {}


def labels(chapter: Chapter) -> Targets:
    "The names that a notebook exports, each with the label of the cell that defines it."
    return {name: f"cell-{cell.id}" for cell in chapter.cells for name in exported(cell)}


def code(cell: NbCell) -> list[NbCell]:
    "A code cell for the site: an exported one is marked, labelled, and folded unless its directive is `exports`."
    names = exported(cell)
    cell.source = re.sub(r"^#\s*NBVAL_\w+\s*?(\n|\Z)", "", cell.source, flags=re.MULTILINE)
    if {"export", "exports"} & cell.directives_.keys():
        cell.metadata["tags"] = [*cell.metadata.get("tags", []), "exported"]
    if "export" in cell.directives_:
        cell.metadata["tags"].append("hide-input")
        says = reference.docstring(*names.values()).partition("\n")[0].replace("`", "") if len(names) == 1 else ""
        prompt = (f"Source of {', '.join(names)}" if names else "Imports") + (f": {says}" if says else "")
        cell.metadata["mystnb"] = {"code_prompt_show": prompt, "code_prompt_hide": prompt}
    return [mk_cell(f"(cell-{cell.id})=", "markdown"), cell] if names else [cell]


def about(chapter: Chapter) -> str:
    "The line under the promise: the reference of the module, and the notebook itself."
    module = f"Reference: [`{chapter.module}`](/api/{chapter.module}.md) · " if chapter.module else ""
    up = "../" * (2 + chapter.address.count("/"))
    return f":::{{div}} page-links\n{module}{{download}}`Download the notebook <{up}nbs/{chapter.address}>`\n:::"


def page(chapter: Chapter, all_chapters: list[Chapter], folder: Path, more: str = "") -> None:
    "Write a notebook as a page into `folder`, with `more` Markdown at its end and links to `all_chapters`."
    targets = name_targets(all_chapters, chapter) | module_targets(all_chapters, chapter)
    head, *rest = chapter.cells
    cells = [head, mk_cell(about(chapter), "markdown")]
    for cell in rest:
        if cell.cell_type == "markdown":
            cell.source = link(cell.source, targets)
        cells += code(cell) if cell.cell_type == "code" else [cell]
    language = {"language_info": {"name": "python", "pygments_lexer": "ipython3"}}
    write_nb(new_nb([*cells, mk_cell(more, "markdown")], language), folder / chapter.address)
