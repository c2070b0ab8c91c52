"""The project's own rules: imports run one way, one lock, no addresses, files that belong together agree."""

import ast
import re
import subprocess
import sys

import pytest
import yaml

from lab import paths

LOCK = (paths.ROOT / "requirements.lock").read_text(encoding="utf-8")
MAKEFILE = (paths.ROOT / "Makefile").read_text(encoding="utf-8")
ROOMS = {"floor": 0, "model": 1, "data": 1, "train": 2, "lab": 3, "__main__": 4}


def tracked() -> list[str]:
    done = subprocess.run(["git", "ls-files"], cwd=paths.ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    return done.stdout.split("\n")[:-1]


def room(module: str) -> str:
    part = module.split(".")[1] if "." in module else "floor"
    return part if part in ROOMS else "floor"


def imports(path) -> set[str]:
    """The vitlib modules that a file imports, inside functions too."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{a.name}" if node.module == "vitlib" else node.module for a in node.names}
    return {name for name in names if name.split(".")[0] == "vitlib"}


def test_imports_run_one_way():
    steps_back = []
    for path in paths.ROOT.glob("vitlib/**/*.py"):
        own = room(".".join(path.relative_to(paths.ROOT).with_suffix("").parts))
        for name in imports(path):
            other = room(name)
            if other != own and ROOMS[other] >= ROOMS[own]:
                steps_back.append(f"{path.name} ({own}) imports {name}")
    assert steps_back == []


def test_training_imports_without_the_notebook_packages():
    blocked = "papermill datasets seaborn pandas matplotlib scipy statsmodels IPython jupyterlab nbformat".split()
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({blocked!r})); "
        "import vitlib.train.loop, lab.runs, lab.runs.launch, lab.cost.count"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_lock_is_universal_hashed_and_without_addresses():
    assert "://" not in LOCK and "--index" not in LOCK and ("--find" + "-links") not in LOCK
    pins = re.findall(r"^([a-z0-9._-]+)==(\S+)", LOCK, flags=re.M)
    assert len(pins) > 100
    for block in re.split(r"^(?=[a-z0-9._-]+==)", LOCK, flags=re.M)[1:]:
        assert "--hash=sha256:" in block
    assert "sys_platform" in LOCK  # universal
    assert ("torch", "2.13.0") in pins and ("torchvision", "0.28.0") in pins
    assert {"hatchling", "uv", "nbval", "jupyterlab", "papermill", "seaborn", "datasets"} <= {name for name, _ in pins}


def test_every_requirement_of_pyproject_is_in_the_lock():
    import tomllib

    project = tomllib.loads((paths.ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    wanted = project["project"]["dependencies"] + project["project"]["optional-dependencies"]["dev"]
    pinned = set(re.findall(r"^([a-z0-9._-]+)==", LOCK, flags=re.M))
    assert {re.split(r"[<>=~ ]", w)[0] for w in wanted} <= pinned
    assert set(project["build-system"]["requires"]) <= pinned
    assert "torch==2.13.0" in wanted and "torchvision==0.28.0" in wanted


def test_environment_yml_leads_to_the_same_lock():
    """It gives Python, make and pip and pins nothing of its own; `make setup` then reads requirements.lock."""
    import tomllib

    environment = yaml.safe_load((paths.ROOT / "environment.yml").read_text(encoding="utf-8"))
    assert environment["dependencies"] == ["python=3.11", "make", "pip"]
    project = tomllib.loads((paths.ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["requires-python"] == ">=3.11" and "--python-version 3.11" in MAKEFILE
    setup = MAKEFILE[MAKEFILE.index("$(READY):") : MAKEFILE.index("reproduce:")]
    assert "pip sync -q --compile-bytecode --require-hashes requirements.lock" in setup
    assert "make setup" in (paths.ROOT / "environment.yml").read_text(encoding="utf-8")


def test_make_help_names_every_target():
    targets = set(re.findall(r"^([a-z]+):", MAKEFILE, flags=re.M))
    assert targets == {"help", "setup", "reproduce", "test", "lab", "refresh", "lint", "lock", "clean"}
    shown = subprocess.run(["make", "-s"], cwd=paths.ROOT, capture_output=True, text=True, check=True).stdout
    assert all(f"  {target} " in shown for target in targets)


def test_ci_calls_make_test():
    assert "make test" in (paths.ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_no_file_names_a_registry_a_machine_or_a_lock_with_addresses():
    files = tracked()
    assert "uv.lock" not in files
    # Written in pieces, so that this file does not name them either.
    words = [
        "pypi" + ".org",
        "python" + "hosted",
        "extra-index" + "-url",
        "find" + "-links",
        "/ro" + "ot/",
        "/ho" + "me/",
        "/wo" + "rk/",
    ]
    found = []
    for name in files:
        path = paths.ROOT / name
        if path.suffix in (".parquet", ".png") or not path.is_file():
            continue
        text = path.read_text(encoding="utf-8")
        found += [f"{name}: {word}" for word in words if word in text]
    assert found == []


def test_no_tracked_file_is_larger_than_it_should_be():
    large = {name: size for name in tracked() if (size := (paths.ROOT / name).stat().st_size) > 2_000_000}
    kept = "outputs/reference/pilot/runs.jsonl"  # a whole study: 4.5 kB a run
    assert large.pop(kept, 0) < 4_000_000
    assert all(name.startswith("lab/data/embedded/") for name in large)
