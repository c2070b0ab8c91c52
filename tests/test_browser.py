"""Headless Chromium on what readers open: the site's pages, checked with axe-core, and the notebooks in JupyterLab.

`make browser`; no part of `make test`. axe-core lies in the folder that AXE_CORE names, or is asked of npm.
"""

import http.client
import json
import os
import shutil
import subprocess
import time
from contextlib import closing
from pathlib import Path
from subprocess import DEVNULL

import pytest

from lab import paths
from tools import jupyterlab

pytestmark = [pytest.mark.release, pytest.mark.slow]
NOTEBOOKS = sorted(paths.NOTEBOOKS.glob("*.ipynb"))
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SECONDS = 1200  # for a notebook at smoke on a busy machine
PANEL = "[...(window.jupyterapp?.shell.widgets('main') ?? [])].find(one => one.context?.path.endsWith('.ipynb'))"
CODE = "[...panel.model.cells].filter(cell => cell.type === 'code')"


def until(true, seconds: float, what: str):
    """The first true answer; TimeoutError with `what` after some seconds."""
    end = time.monotonic() + seconds
    while not (answer := true()):
        if time.monotonic() > end:
            raise TimeoutError(f"{what}: not after {seconds} seconds")
        time.sleep(0.5)
    return answer


class Tab:
    """A tab of Chromium, driven by its DevTools protocol. `faults`: what it had to complain of."""

    def __init__(self, port: int):
        import websocket  # jupyter-server brings it

        browser = http.client.HTTPConnection("127.0.0.1", port)
        browser.request("PUT", "/json/new?about:blank")
        address = json.load(browser.getresponse())["webSocketDebuggerUrl"]
        self.socket = websocket.create_connection(
            address, timeout=SECONDS, suppress_origin=True, http_no_proxy=["127.0.0.1"]
        )
        self.sent, self.faults = 0, []
        for domain in ("Page", "Runtime", "Log"):
            self.ask(f"{domain}.enable")
        self.ask("Emulation.setFocusEmulationEnabled", enabled=True)

    def ask(self, method: str, **params) -> dict:
        self.sent += 1
        self.socket.send(json.dumps({"id": self.sent, "method": method, "params": params}))
        while (message := json.loads(self.socket.recv())).get("id") != self.sent:
            said = message["params"].get("entry", message["params"])
            if message["method"] == "Runtime.exceptionThrown" or said.get("level", said.get("type")) == "error":
                self.faults.append(json.dumps(said)[:500])
        assert "error" not in message, f"{method}: {message}"
        return message["result"]

    def js(self, expression: str):
        """The value of an expression, awaited."""
        got = self.ask("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in got, f"{expression[:200]}: {got['exceptionDetails']}"
        return got["result"].get("value")

    def open(self, address: str) -> None:
        self.ask("Page.navigate", url=address)
        until(lambda: self.js("document.readyState === 'complete'"), 300, address)

    def close(self) -> None:
        self.ask("Page.close")
        self.socket.close()


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    """The port of a headless Chromium."""
    if CHROMIUM is None:
        pytest.skip("there is no Chromium")
    folder = tmp_path_factory.mktemp("chromium")
    words = ["--headless", "--no-sandbox", "--disable-gpu", "--no-proxy-server", "--remote-debugging-port=0"]
    with subprocess.Popen([CHROMIUM, *words, f"--user-data-dir={folder}"], stdout=DEVNULL, stderr=DEVNULL) as process:
        try:
            told = until(lambda: (file := folder / "DevToolsActivePort").is_file() and file.read_text(), 120, CHROMIUM)
            yield int(told.split()[0])
        finally:
            process.terminate()


# ------------------------------------------------------------------------------------------------------ the site


@pytest.fixture(scope="module")
def axe(tmp_path_factory) -> str:
    """The script of axe-core."""
    folder = os.environ.get("AXE_CORE")
    if folder is None:
        if shutil.which("npm") is None:
            pytest.skip("there is no npm, and AXE_CORE names no folder of axe-core")
        kept = tmp_path_factory.mktemp("npm")
        done = subprocess.run(
            ["npm", "install", "--prefix", kept, "axe-core@4"], capture_output=True, text=True, check=False
        )
        if done.returncode:
            pytest.skip(f"npm gives no axe-core: {done.stderr[:200]}")
        folder = kept / "node_modules" / "axe-core"
    return Path(folder, "axe.min.js").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> list[Path]:
    from tools import pages

    return pages.build(NOTEBOOKS, tmp_path_factory.mktemp("site"))


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_axe_core_finds_nothing_serious_on_any_page(chromium, axe, site, width, theme):
    found = []
    with closing(Tab(chromium)) as tab:
        tab.ask("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        tab.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": theme}])
        for page in site:
            tab.open(page.as_uri())
            tab.js(axe)
            serious = tab.js(
                "axe.run().then(r => r.violations.filter(v => ['serious', 'critical'].includes(v.impact)).map(v =>"
                " `${v.id}, ${v.nodes.length}: ${v.nodes[0].html.slice(0, 200)} ${v.nodes[0].failureSummary}`))"
            )
            found += [f"{page.name}: {finding}" for finding in serious]
            dead = "[...document.querySelectorAll('a[href^=\"#\"]')].filter(a => !document.getElementById("
            found += [f"{page.name}: {link}" for link in tab.js(f"{dead}decodeURI(a.hash.slice(1)))).map(a => a.href)")]
            if (wide := tab.js("document.documentElement.scrollWidth")) > width:
                found.append(f"{page.name}: {wide} pixels wide")
    assert found == [] and tab.faults == []


# ------------------------------------------------------------------------------------------------------ JupyterLab


@pytest.fixture(scope="module")
def lab(chromium, tmp_path_factory):
    """JupyterLab as `make lab` starts it, on copies of the notebooks: its folder, address and token."""
    folder = tmp_path_factory.mktemp("lab")
    shutil.copytree(paths.NOTEBOOKS, folder / "notebooks", ignore=shutil.ignore_patterns(".*"))
    own = {f"JUPYTER_{name}_DIR": str(folder / name.lower()) for name in ("RUNTIME", "DATA", "CONFIG")}
    words = f"--no-browser --ServerApp.port=0 --LabApp.expose_app_in_browser=True --ServerApp.root_dir={folder}"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in own.items():
            patch.setenv(name, value)
        subprocess.run([*jupyterlab.TRUST, *NOTEBOOKS], check=True, stdout=DEVNULL)
        process = subprocess.Popen(jupyterlab.command(words.split()), stdout=DEVNULL, stderr=DEVNULL)
    with process:
        try:
            told = until(lambda: next((folder / "runtime").glob("jpserver-*.json"), None), 300, "JupyterLab")
            yield folder, json.loads(told.read_text())
        finally:
            process.terminate()


@pytest.mark.parametrize("name", [path.stem for path in NOTEBOOKS])
def test_a_notebook_opens_unmodified_and_run_all_runs_it(chromium, lab, name):
    folder, server = lab
    file = folder / "notebooks" / f"{name}.ipynb"
    before = file.read_bytes()
    with closing(Tab(chromium)) as tab:
        tab.open(f"{server['url']}lab/workspaces/{name}/tree/notebooks/{name}.ipynb?token={server['token']}")
        until(lambda: tab.js(f"Boolean(window.panel = {PANEL})"), 300, "the notebook")
        until(lambda: tab.js("panel.sessionContext.session?.kernel?.status === 'idle'"), 300, "the kernel")
        tab.js("panel.sessionContext.session.kernel.info.then(() => new Promise(done => setTimeout(done, 3000)))")
        assert not tab.js("panel.model.dirty") and file.read_bytes() == before
        assert tab.js(f"{CODE}.every(cell => cell.trusted)")

        tab.js("jupyterapp.commands.execute('notebook:clear-all-cell-outputs')")
        tab.js("void jupyterapp.commands.execute('notebook:run-all-cells').then(well => (window.ended = [well]))")
        until(lambda: tab.js("window.ended"), SECONDS, "Run all")
        cells = tab.js(f"{CODE}.map(cell => [cell.executionCount, cell.outputs.toJSON()])")
        assert [count for count, _ in cells] == [*range(1, len(cells) + 1)]
        outputs = [output for _, shown in cells for output in shown]
        assert [output for output in outputs if output["output_type"] == "error"] == []
        alts = [out["metadata"]["image/png"]["alt"] for out in outputs if "image/png" in out.get("data", {})]
        pictures = "[...panel.node.querySelectorAll('.jp-RenderedImage img')].map(image => image.alt)"
        assert all(alts)
        until(lambda: tab.js(pictures) == alts, 60, "the texts of all pictures")
        tab.js("panel.sessionContext.shutdown()")
