"""The site: plain pages that ask no other host for anything; and what starts JupyterLab."""

import json
import re
from html.parser import HTMLParser

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from lab import paths
from tools import jupyterlab
from tools import pages as site
from vitlib.errors import UsageError

PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


class Page(HTMLParser):
    """What a page asks for, and its pictures."""

    def __init__(self, text: str):
        super().__init__()
        self.asked, self.links, self.pictures, self.tags = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        self.links += [attrs["href"]] if tag == "a" and "href" in attrs else []
        self.asked += [attrs[key] for key in ("src", "data") if key in attrs]
        self.asked += [attrs["href"]] if tag == "link" else []
        self.pictures += [attrs] if tag == "img" else []


def notebook(path, title: str, *sources: str) -> None:
    shown = new_output("display_data", data={"image/png": PNG}, metadata={"image/png": {"alt": 'a < b & "c"'}})
    cells = [new_markdown_cell(f"# {title}\n\n{source}") for source in sources]
    cells.append(new_code_cell("price = '$5 and $6'", execution_count=1, outputs=[shown, shown]))
    nbformat.write(new_notebook(cells=cells), path)


@pytest.fixture
def pages(tmp_path):
    notebook(
        tmp_path / "00_claims.ipynb", "Answers",
        "See [31](31_fig1_branches.ipynb), [rules](../docs/judging.md) and [code](../lab/paths.py). `cost = $x$`",
    )  # fmt: skip
    notebook(
        tmp_path / "31_fig1_branches.ipynb",
        "Figure 1",
        "$$x' = x + r_1(x)$$\n\nwhere $r$ costs 5$ or $6.",
        "back: [all](00_claims.ipynb), [stem](../docs/own_code.md#the-hmlp-stem-of-signals), [photos](../docs/own_images.md)",
    )
    written = site.build(sorted(tmp_path.glob("*.ipynb")), tmp_path / "site")
    return {path.stem: path.read_text(encoding="utf-8") for path in written}


def test_there_is_a_page_per_notebook_and_document_and_every_link_leads_to_one(pages):
    docs = {path.stem for path in (paths.ROOT / "docs").glob("*.md")}
    assert {*pages} == {"index", "31_fig1_branches", "execution"} | docs
    for name, text in pages.items():
        page = Page(text)
        assert {link.partition("#")[0] for link in page.links if not link.startswith(("http", "#"))} <= {
            f"{n}.html" for n in pages
        }
        assert page.tags.count("h1") >= 1 and page.tags.count("main") == 1 and "<html lang=" in text
        assert f'<a href="{name}.html" aria-current=page>' in text
    assert 'href="own_images.html"' in pages["own_code"].partition("<main>")[2]
    assert 'href="own_code.html#the-hmlp-stem-of-signals"' in pages["31_fig1_branches"]
    assert "Own images</a>" in pages["index"] and "vitlib finetune DIR" in re.sub("<.*?>", "", pages["own_images"])
    assert "code" in pages["index"] and "paths.py" not in "".join(Page(pages["index"]).links)


def test_no_page_asks_another_host_for_anything(pages):
    for text in pages.values():
        assert all(asked.startswith("data:") for asked in Page(text).asked)
        assert not re.search(r"url\(|@import|<script|cdn", text)


def test_equations_are_mathml_and_prices_and_code_are_not(pages):
    text = pages["31_fig1_branches"]
    assert text.count('display="block"') == 1 and text.count("<math") == 2 and "$$" not in text
    assert "costs 5$ or $6" in text and "<code>cost = $x$</code>" in pages["index"]


def test_every_picture_carries_its_text(pages):
    for name in ("index", "31_fig1_branches"):
        assert [picture["alt"] for picture in Page(pages[name]).pictures] == ['a < b & "c"'] * 2


def test_what_scrolls_can_be_scrolled_by_keys(pages):
    for text in pages.values():
        wide = re.findall(r'<(?:pre|table|math[^>]* display="block")[^>]*>', text)
        assert all('tabindex="0"' in tag for tag in wide) and text.count("tabindex") == len(wide)
    assert 'tabindex="0"' in pages["31_fig1_branches"] and "<pre" in pages["index"]


def test_the_page_of_executions_says_what_reproduce_wrote(tmp_path):
    notebook(tmp_path / "31_fig1_branches.ipynb", "Figure 1", "text")
    content = nbformat.read(tmp_path / "31_fig1_branches.ipynb", 4)
    content.metadata["vitlib"] = {"profile": "cpu", "seconds": 12, "date": "2026-01-02", "commit": "abc"}
    nbformat.write(content, tmp_path / "31_fig1_branches.ipynb")
    written = site.build([tmp_path / "31_fig1_branches.ipynb"], tmp_path / "site")
    text = next(path for path in written if path.stem == "execution").read_text(encoding="utf-8")
    row = "<td>31_fig1_branches</td><td>cpu</td><td>12</td><td>2026-01-02</td><td>abc</td>"
    assert row in re.sub(r">\s+<", "><", text)


def test_what_is_no_notebook_of_ours_or_was_never_run_is_refused(tmp_path):
    with pytest.raises(UsageError, match="there are no notebooks of this project"):
        site.build([tmp_path / "37_mine.ipynb"], tmp_path / "site")
    nbformat.write(new_notebook(cells=[new_code_cell("1")]), tmp_path / "31_fig1_branches.ipynb")
    with pytest.raises(UsageError, match=r"31_fig1_branches\.ipynb was never run"):
        site.build([tmp_path / "31_fig1_branches.ipynb"], tmp_path / "site")
    (tmp_path / "32_fig2_width.ipynb").write_text("{")
    with pytest.raises(UsageError, match=r"32_fig2_width\.ipynb cannot be read"):
        site.build([tmp_path / "32_fig2_width.ipynb"], tmp_path / "site")


def test_jupyterlab_has_the_checkout_as_its_root_asks_nothing_and_takes_options(monkeypatch, tmp_path):
    monkeypatch.setenv("VITLIB_OUTPUTS", str(tmp_path))
    words = jupyterlab.command(["--no-browser", "--port=9999"])
    assert words[1:4] == ["-m", "jupyter", "lab"] and words[-2:] == ["--no-browser", "--port=9999"]
    assert f"--ServerApp.root_dir={paths.ROOT}" in words and not any("token" in w or "ip=" in w for w in words)
    assert [w for w in jupyterlab.command(["--ServerApp.root_dir=."]) if "root_dir" in w] == ["--ServerApp.root_dir=."]
    settings = json.loads((tmp_path / "jupyterlab" / "overrides.json").read_text())
    assert settings["@jupyterlab/apputils-extension:notification"]["fetchNews"] == "false"
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert "--allow-root" not in jupyterlab.command([])
