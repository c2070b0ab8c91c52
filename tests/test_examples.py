"""Every example of docs/own_code.md is run as it is printed, alone, in an empty folder."""

import re
from importlib.util import find_spec

import pytest
import torch

from lab import paths

PAGE = (paths.ROOT / "docs" / "own_code.md").read_text(encoding="utf-8")
EXAMPLES = dict(re.findall(r"^## (.+?)$(?:(?!^## ).)*?^```python\n(.*?)^```$", PAGE, re.M | re.S))
DEPTH = ("depth = 36\n", "depth = 4\n")  # in the test's place; 36 works as well, and takes a minute
NEEDS = {"to_onnx": ("onnx", "onnxscript", "onnxruntime"), "transformers": ("transformers",)}  # what an example imports


@pytest.mark.parametrize("title", EXAMPLES)
def test_an_example_of_own_code_runs_as_it_is_printed(title, tmp_path, monkeypatch):
    code = EXAMPLES[title]
    packages = [
        package
        for word, needed in NEEDS.items()
        if f"import {word}" in code or f"from {word}" in code
        for package in needed
    ]
    if absent := [package for package in packages if find_spec(package) is None]:
        pytest.skip(f"{', '.join(absent)} is not installed")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
    try:
        exec(compile(code.replace(*DEPTH), title, "exec"), {"__name__": "__main__"})
    finally:
        torch.set_num_threads(threads)


def test_no_example_is_left_out():
    assert len(EXAMPLES) == PAGE.count("```python") == PAGE.count("\n## ")
    assert sum(DEPTH[0] in code for code in EXAMPLES.values()) == 2
