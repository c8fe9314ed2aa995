"""Build the docs site from the notebooks and modules that are there: `python docs/build.py` makes `_docs/index.html`.

Each notebook becomes a page, each chapter's folder a page that lists them, each module a reference page.
Notebooks are not executed; they bring their outputs. What Sphinx reads is written to `_proc/site`, anew each time.
"""
import argparse
import shutil
import sys
from pathlib import Path

import chapters
import reference
from chapters import Chapter
from sphinx.cmd.build import main as sphinx

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS, PACKAGE, SCRATCH, HTML = ROOT / "nbs", ROOT / "sdworker", ROOT / "_proc", ROOT / "_docs"
SITE = SCRATCH / "site"
GROUPS = {  # folder of a chapter -> title, what it is about
    "0_core": ("Core", "Settings, families of models, and what else everything stands on."),
    "1_build": ("Build", "What is inside the image."),
    "2_engine": ("Engine", "From a request to pixels with diffusers, and its switches."),
    "3_aot": ("Compiled ahead of time", "The engine that starts without diffusers."),
    "4_start": ("Start", "From exec to ready."),
    "5_serve": ("Serve", "From a job to its answer."),
    "6_operate": ("Operate", "From one worker to an endpoint."),
    "7_embedded": ("Embedded model", "A tiny model to test everything with, without a GPU."),
    "8_lab": ("Lab", "Evidence: what was measured, how, and what it says of each claim."),
    "9_cli": ("Command line", "The `sdworker` command."),
}


def write(name: str, *parts: str) -> None:
    "Write a Markdown page."
    path = SITE / f"{name}.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def sidebar(pages: list[str]) -> str:
    "List the pages that the sidebar shows below a page."
    return "\n".join(["```{toctree}", ":hidden:", *pages, "```"])


def cards(titles_and_texts: list[tuple[str, str]]) -> str:
    "A grid of cards."
    return "\n".join(["::::{grid} 1 1 2 2", ":gutter: 3", ":padding: 0", *(
        f":::{{grid-item-card}} {title}\n{text}\n:::" for title, text in titles_and_texts), "::::"])


def group_page(folder: str, title: str, text: str, inside: list[Chapter]) -> tuple[str, str]:
    "Write the page of a chapter; returns the card that links to it."
    write(f"{folder}/index", f"# {title}", f"> {text}", sidebar([chapter.path.stem for chapter in inside]),
          cards([(f"[{chapter.title}]({chapter.path.name})", chapter.promise) for chapter in inside]))
    links = (f"- [{chapter.title}]({folder}/{chapter.path.name})" for chapter in inside)
    return f"[{title}]({folder}/index.md)", "\n".join([text, "", *links])


def reference_pages(title: str, text: str, all_chapters: list[Chapter]) -> tuple[str, str]:
    "Write each module's reference and the page that lists them; returns the card that links to that page."
    modules = [chapter for chapter in all_chapters if chapter.module]
    for chapter in modules:
        labels = chapters.labels(chapter)
        links = {name: f"[In the notebook](#{label})." for name, label in labels.items()}
        page = reference.page(chapter.module, chapter.source, links)
        write(f"api/{chapter.module}", chapters.link(page, chapters.name_targets(all_chapters, chapter)))
    write("api/index", f"# {title}", f"> {text}", sidebar([chapter.module for chapter in modules]),
          cards([(f"[{chapter.module}]({chapter.module}.md)", chapter.promise) for chapter in modules]))
    return f"[{title}](api/index.md)", text


def write_site() -> None:
    "Write all pages, from what is in `nbs/` now."
    shutil.rmtree(SITE, ignore_errors=True)
    shutil.copytree(NOTEBOOKS, SITE, ignore=shutil.ignore_patterns("*.ipynb", "*.cfg", "*.py", "*.yml", ".*", "_*"))
    all_chapters = [chapters.read(path, PACKAGE) for path in sorted(NOTEBOOKS.glob("*_*/*.ipynb"))]
    tour = chapters.read(NOTEBOOKS / "00_tour.ipynb", PACKAGE)
    parts = [(f"[{tour.title}]({tour.path.name})", tour.promise)]
    parts += [group_page(folder, *about, [chapter for chapter in all_chapters if chapter.path.parent.name == folder])
              for folder, about in GROUPS.items()]
    parts.append(reference_pages("Reference", "Every public name of every module.", all_chapters))
    for chapter in [tour, *all_chapters]:
        chapters.page(chapter, all_chapters, SITE)
    pages = [tour.path.stem, *(f"{folder}/index" for folder in GROUPS), "api/index"]
    chapters.page(chapters.read(NOTEBOOKS / "index.ipynb", PACKAGE), all_chapters, SITE,
                  f"## The book\n\n{cards(parts)}\n\n{sidebar(pages)}")


def main() -> int:
    "Write the pages and have Sphinx turn them into HTML; its warnings are errors, and leave the old site where it is."
    write_site()
    shutil.rmtree(SCRATCH / "html", ignore_errors=True)
    failed = sphinx(["-q", "-W", "-E", "-c", str(Path(__file__).parent), "-d", str(SCRATCH / "doctrees"),
                     str(SITE), str(SCRATCH / "html")])
    if failed:
        print("The docs site was not built.", file=sys.stderr)
        return failed
    shutil.rmtree(HTML, ignore_errors=True)
    (SCRATCH / "html").rename(HTML)
    print(f"The docs site: {HTML / 'index.html'}")
    return 0


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()  # which takes --help, and nothing else
    sys.exit(main())
