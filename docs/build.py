"""Build the docs site from the notebooks and modules that are there: `python docs/build.py` makes `_docs/index.html`.

Each notebook becomes a page, each group of ten a page that lists them, each module a reference page. Notebooks are not
executed; they bring their outputs. What Sphinx reads is written to `_proc/site`, anew each time.
"""
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
GROUPS = {  # first digit of a notebook's number -> title, what it is about
    "0": ("Foundations", "What everything stands on."),
    "1": ("Build", "What is inside the image."),
    "2": ("Draw", "From weights to pixels, fast."),
    "3": ("Start", "From exec to ready."),
    "4": ("Serve", "From a job to its answer."),
    "5": ("Operate", "From one worker to an endpoint."),
    "9": ("Lab", "Evidence, and the command line."),
}


def write(name: str, *parts: str) -> None:
    "Write a Markdown page."
    path = SITE / f"{name}.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def sidebar(pages: list[str]) -> str:
    "What the sidebar shows below a page."
    return "\n".join(["```{toctree}", ":hidden:", *pages, "```"])


def cards(titles_and_texts: list[tuple[str, str]]) -> str:
    "A grid of cards."
    return "\n".join(["::::{grid} 1 1 2 2", ":gutter: 3", ":padding: 0", *(
        f":::{{grid-item-card}} {title}\n{text}\n:::" for title, text in titles_and_texts), "::::"])


def group_page(title: str, text: str, inside: list[Chapter]) -> tuple[str, str]:
    "Write the page of a group; the card that leads there."
    name = title.lower()
    write(name, f"# {title}", f"> {text}", sidebar([chapter.path.stem for chapter in inside]),
          cards([(f"[{chapter.title}]({chapter.path.name})", chapter.promise) for chapter in inside]))
    return f"[{title}]({name}.md)", "\n".join([text, "", *(f"- [{c.title}]({c.path.name})" for c in inside)])


def reference_pages(title: str, text: str, found: list[Chapter]) -> tuple[str, str]:
    "Write the reference of each module, and the page that lists them; the card that leads there."
    modules = [chapter for chapter in found if chapter.module]
    for chapter in modules:
        labels = chapters.labels(chapter)
        links = {name: f"[In the notebook](#{label})." for name, label in labels.items()}
        page = reference.page(chapter.module, chapter.source, links)
        write(f"api/{chapter.module}", chapters.link(page, chapters.name_targets(found, chapter)))
    write("api/index", f"# {title}", f"> {text}", sidebar([chapter.module for chapter in modules]),
          cards([(f"[{chapter.module}]({chapter.module}.md)", chapter.promise) for chapter in modules]))
    return f"[{title}](api/index.md)", text


def write_site() -> None:
    "Write all pages, from what is in `nbs/` now."
    shutil.rmtree(SITE, ignore_errors=True)
    shutil.copytree(NOTEBOOKS, SITE, ignore=shutil.ignore_patterns("*.ipynb", "*.cfg", "*.py", "*.yml", ".*", "_*"))
    found = [chapters.read(path, PACKAGE) for path in sorted(NOTEBOOKS.glob("[0-9]*.ipynb"))]
    groups = [(*about, [chapter for chapter in found if chapter.path.name.startswith(digit)])
              for digit, about in GROUPS.items()]
    groups = [group for group in groups if group[-1]]
    parts = [group_page(*group) for group in groups]
    parts.append(reference_pages("Reference", "Every public name of every module.", found))
    for chapter in found:
        chapters.page(chapter, found, SITE)
    pages = [*(title.lower() for title, *_ in groups), "api/index"]
    chapters.page(chapters.read(NOTEBOOKS / "index.ipynb", PACKAGE), found, SITE,
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
    sys.exit(main())
