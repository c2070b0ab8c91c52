"""The notebooks as a site of plain pages in outputs/site: `make site`. No page asks another host for anything.

    python -m tools.pages [--of PROFILE]

Equations become MathML, pictures carry their text, notebooks link to each other; light and dark, wide and narrow.
"""

from __future__ import annotations

import argparse
import html
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import nbformat
import pandas as pd
from nbconvert.exporters import HTMLExporter
from nbconvert.filters import markdown2html
from pygments.formatters import HtmlFormatter

from lab import paths
from lab.experiments.catalogue import NOTEBOOKS, Notebook
from lab.report import answer
from vitlib.errors import UsageError
from vitlib.files import write_whole

TITLE = "Three things everyone should know about Vision Transformers: are they true?"
DOCS = ("own_images", "own_code", "judging", "scaling", "speed", "robustness")
MATH = re.compile(r"\$\$(.+?)\$\$|(?<![\\$\w])\$([^$\n]+?)\$(?!\w)", re.S)
CODE = re.compile(r"(```.*?```|`[^`\n]*`)", re.S)
LINK = re.compile(r'(<a[^>]* href=")(?!#|https?:)(?:[^"#]*/)?([^"#./]*)(?:\.\w+)?((?:#[^"]*)?"[^>]*>(.*?)</a>)', re.S)
SCROLLS = re.compile(
    r'<(?:pre|table|math(?= [^>]*display="block"))\b'
)  # what is wider than the page; keys scroll it too
STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1b; --paper: #fff; --soft: #f3f3f1; --line: #d8d8d4; --link: #0b57a4; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e6e3; --paper: #16181a; --soft: #212427; --line: #3a3e42; --link: #8ab8f0; }
  .highlight span { color: inherit !important; } }
body { margin: 0; font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--paper); }
header, main, footer { max-width: 54rem; margin: 0 auto; padding: 0 1rem; }
header { border-bottom: 1px solid var(--line); padding-block: .6rem; } nav { display: flex; flex-wrap: wrap; gap: .2rem .9rem; }
a { color: var(--link); } nav a[aria-current] { font-weight: 700; color: var(--ink); text-decoration: none; }
h1 { font-size: 1.6rem; line-height: 1.25; } h2 { margin-top: 2.2rem; font-size: 1.2rem; }
img { max-width: 100%; height: auto; background: #fff; border-radius: 4px; }
table { display: block; overflow-x: auto; border-collapse: collapse; font-size: .85rem; margin: 1rem 0; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
pre { overflow-x: auto; background: var(--soft); padding: .6rem .8rem; border-radius: 4px; font-size: .82rem; }
.highlight { background: none; } code { background: var(--soft); } :not(pre, td) > code { overflow-wrap: anywhere; }
math { font-size: 1.05rem; } math[display=block] { overflow: auto hidden; padding-block: .4rem; margin: .6rem 0; }
.jp-InputPrompt, .jp-OutputPrompt, .prompt, .anchor-link { display: none; }
footer { border-top: 1px solid var(--line); margin-top: 3rem; padding-block: 1rem; font-size: .85rem; }
"""


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.pages", description=__doc__.splitlines()[0])
    parser.add_argument("--of", metavar="PROFILE", help="as reproduce rendered them (default: as committed)")
    profile = parser.parse_args(words).of
    folder = paths.outputs() / profile / "notebooks" if profile else paths.NOTEBOOKS
    try:
        written = build(sorted(folder.glob("*.ipynb")), paths.outputs() / "site")
    except UsageError as fault:
        parser.error(str(fault))
    print(f"{len(written)} pages: {written[0]}")
    return 0


def build(notebooks: Sequence[Path], folder: Path) -> list[Path]:
    """Write a page per notebook and document, the first one as index.html too; what was written.

    Raises UsageError for a notebook that is not there or was never run.
    """
    known = {one.file: one for one in NOTEBOOKS}
    shown = [(known[path.stem], _read(path)) for path in notebooks if path.stem in known]
    if not shown:
        raise UsageError(f"there are no notebooks of this project among {', '.join(map(str, notebooks)) or 'none'}")
    menu = [("index", "Answers"), *((one.file, one.number) for one, _ in shown if one.number != "00")]
    menu += [(name, name.capitalize().replace("_", " ")) for name in (*DOCS, "execution")]
    pages = {("index" if one.number == "00" else one.file): _notebook(content) for one, content in shown}
    docs = {name: (paths.ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8") for name in DOCS}
    pages |= {name: markdown2html(text) for name, text in docs.items()}
    pages["execution"] = _execution(shown)
    folder.mkdir(parents=True, exist_ok=True)
    for name, body in pages.items():
        with write_whole(folder / f"{name}.html") as draft:
            draft.write_text(_page(name, body, menu), encoding="utf-8")
    return [folder / f"{name}.html" for name in pages]


def _read(path: Path) -> nbformat.NotebookNode:
    try:
        content = nbformat.read(path, 4)
    except (OSError, ValueError, nbformat.reader.NotJSONError) as fault:
        raise UsageError(f"the notebook {path} cannot be read: {fault}") from None
    if not any(cell.get("outputs") for cell in content.cells if cell.cell_type == "code"):
        raise UsageError(f"the notebook {path} was never run: make reproduce")
    return content


def _notebook(content: nbformat.NotebookNode) -> str:
    """The body of a notebook's page."""
    for cell in content.cells:
        if cell.cell_type == "markdown":
            cell.source = mathml(cell.source)
    return HTMLExporter(template_name="basic").from_notebook_node(content)[0]


def mathml(text: str) -> str:
    """Markdown with its equations as MathML; code stays as it is."""
    from latex2mathml.converter import convert

    def one(match: re.Match) -> str:
        return convert(match[1] or match[2], display="block" if match[1] else "inline")

    return "".join(piece if i % 2 else MATH.sub(one, piece) for i, piece in enumerate(CODE.split(text)))


def _execution(shown: Sequence[tuple[Notebook, nbformat.NotebookNode]]) -> str:
    """What was run when: from what `reproduce` writes into each notebook."""
    keys = ("profile", "seconds", "date", "commit")
    rows = [[one.file, *(content.metadata.get("vitlib", {}).get(key, "–") for key in keys)] for one, content in shown]
    table = pd.DataFrame(rows, columns=["notebook", *keys]).to_html(index=False, border=0)
    return (
        f"<h1>Execution</h1><p>{html.escape(answer.where('study'))}</p>{table}"
        "<p>A dash: committed with the project, run at profile smoke.</p>"
    )


def _page(name: str, body: str, menu: Sequence[tuple[str, str]]) -> str:
    """A whole page: head, navigation, body, foot."""
    heading = re.search(r"<h1[^>]*>(.*?)(?:<a|</h1>)", body, re.S)
    title = html.unescape(re.sub("<.*?>", "", heading[1])).strip() if heading else TITLE
    pages = dict(menu)

    def link(match: re.Match) -> str:
        """To another page, or only its text where it leads to a file of the checkout."""
        target = match[2].replace("00_claims", "index")
        return f"{match[1]}{target}.html{match[3]}" if target in pages else match[4]

    body = LINK.sub(link, body)
    current = {name: " aria-current=page"}
    links = "".join(f'<a href="{file}.html"{current.get(file, "")}>{html.escape(text)}</a>' for file, text in menu)
    body = SCROLLS.sub(r'\g<0> tabindex="0"', body)
    words = html.escape(f"{title}: {TITLE}"[:155], quote=True)
    highlight = HtmlFormatter(style="xcode").get_style_defs(".highlight")
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title><meta name="description" content="{words}"><link rel="icon" href="data:,">
<style>{highlight}{STYLE}</style></head>
<body><header><nav aria-label="Pages">{links}</nav></header>
<main>{body}</main>
<footer>Touvron et al., <cite>Three things everyone should know about Vision Transformers</cite>, arXiv 2203.09795, re-run at a
small scale. A small scale is no reproduction of the paper.</footer></body></html>
"""


if __name__ == "__main__":
    sys.exit(main())
