"""The project's rules: imports run one way and in no circle, the wheel is vitlib alone, one lock, no addresses."""

import ast
import graphlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

from lab import paths

pytestmark = pytest.mark.check

LOCK = (paths.ROOT / "requirements.lock").read_text(encoding="utf-8")
MAKEFILE = (paths.ROOT / "Makefile").read_text(encoding="utf-8")
PROJECT = tomllib.loads((paths.ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PACKAGES = ("vitlib", "lab", "benchmarks", "tools")
# A room may import from those above it in this list, and from itself.
ROOMS = (
    ("vitlib.errors", "vitlib.draws", "vitlib.files", "vitlib.records", "vitlib.stats"),
    ("vitlib.model", "vitlib.data"),
    ("vitlib.train",),
    ("vitlib.tasks",),
    ("vitlib.__main__",),
    ("lab.paths", "lab.paper"),
    ("lab.data",),
    ("lab.runs",),
    ("lab.cost",),
    ("lab.experiments",),
    ("lab.bench",),
    ("lab.claims",),
    ("lab.report",),
    ("lab.__main__", "benchmarks"),
    ("tools",),
)


def tracked() -> list[str]:
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    done = subprocess.run(["git", "ls-files"], cwd=paths.ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    return done.stdout.split("\n")[:-1]


def modules() -> dict[str, Path]:
    """Every module of the project by its dotted name; a package has the name of its folder."""
    files = (path for package in PACKAGES for path in (paths.ROOT / package).rglob("*.py"))
    names = {".".join(path.relative_to(paths.ROOT).with_suffix("").parts): path for path in files}
    return {name.removesuffix(".__init__"): path for name, path in names.items()}


def imports(path: Path, known: set[str], typing: bool) -> set[str]:
    """The project's modules that a file imports: those in functions too; `typing`: those under TYPE_CHECKING alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    under = [n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test)]
    apart = {id(inner) for n in under for inner in ast.walk(n)}
    names: set[str] = set()
    for node in ast.walk(tree):
        if (id(node) in apart) != typing:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {
                f"{node.module}.{a.name}" if f"{node.module}.{a.name}" in known else node.module for a in node.names
            }
    return names & known


def graph(typing: bool) -> dict[str, set[str]]:
    known = modules()
    return {name: imports(path, set(known), typing) - {name} for name, path in known.items()}


def floor(module: str) -> int | None:
    """The number of the row of ROOMS that a module is in; None for the packages themselves."""
    return next((i for i, row in enumerate(ROOMS) for room in row if f"{module}.".startswith(f"{room}.")), None)


@pytest.mark.parametrize("typing", [False, True], ids=["imports", "imports for types alone"])
def test_no_module_imports_itself_through_others(typing):
    everything = graph(False)
    if typing:
        for_types = graph(True)
        everything = {name: needs | for_types[name] for name, needs in everything.items()}
    try:
        graphlib.TopologicalSorter(everything).prepare()
    except graphlib.CycleError as circle:
        pytest.fail(" -> ".join(circle.args[1]))


def test_imports_run_one_way():
    steps_back = [
        f"{name} imports {other}"
        for name, needs in graph(False).items() for other in needs
        if floor(name) is not None and floor(other) is not None and floor(other) > floor(name)
    ]  # fmt: skip
    assert steps_back == []
    assert all(floor(name) is not None for name in modules() if "." in name), "a room that ROOMS does not name"


def test_vitlib_knows_nothing_of_lab():
    assert [
        name
        for name, needs in graph(False).items()
        if name.startswith("vitlib") and any(n.startswith("lab") for n in needs)
    ] == []


def blocked(packages: str, modules: str) -> subprocess.CompletedProcess:
    """Import `modules` in a fresh process in which `packages` cannot be imported."""
    code = f"import sys; sys.modules.update(dict.fromkeys({packages.split()!r})); import {modules}"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=paths.ROOT)


NOTEBOOK_PACKAGES = "papermill datasets seaborn pandas matplotlib scipy statsmodels IPython jupyterlab nbformat"


@pytest.mark.parametrize(
    ("packages", "modules"),
    [
        (f"{NOTEBOOK_PACKAGES} timm torchvision PIL pyarrow safetensors yaml filelock tqdm", "vitlib.model"),
        (
            f"{NOTEBOOK_PACKAGES} lab",
            "vitlib.train, vitlib.data, vitlib.train.loop, vitlib.train.finetune, vitlib.stats",
        ),
        (NOTEBOOK_PACKAGES, "lab.runs.execute, lab.runs.launch, lab.cost.count"),
        (f"{NOTEBOOK_PACKAGES} resource", "lab.runs.execute, lab.runs.launch"),
    ],
    ids=["the model needs torch and numpy", "training", "runs", "runs, where the system is no Unix"],
)
def test_a_room_imports_without_what_it_does_not_need(packages, modules):
    done = blocked(packages, modules)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    done = subprocess.run(command, cwd=paths.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return next(folder.glob("*.whl"))


def test_the_wheel_is_vitlib_alone_and_small(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} - {f"vitlib-{PROJECT['version']}.dist-info"} == {"vitlib"}
    others = {name for name in names if name.startswith("vitlib/") and not name.endswith(".py")}
    assert others == {"vitlib/tasks/trunk.safetensors", "vitlib/tasks/trunk.md"}  # the trunk that ships, and its card
    assert wheel.stat().st_size < 2_700_000


def test_the_wheel_works_from_another_folder_without_the_checkout(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = (
        "import sys; sys.path = [p for p in sys.path if p != {root!r}]; sys.modules['lab'] = None; import pathlib, torch, vitlib\n"
        "from vitlib import __main__, model, train; from vitlib.data import open_folder\n"
        "assert pathlib.Path(vitlib.__file__).is_relative_to({site!r})\n"
        "config = model.vit_config('W32-2x2/4', image_size=16, num_classes=3, stem='hmlp')\n"
        "assert model.fuse(model.ViT(config))(torch.zeros(2, 3, 16, 16)).shape == (2, 3)\n"
        "sys.exit(__main__.main(['check']))"
    ).format(root=str(paths.ROOT), site=str(tmp_path / "site"))
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "installation: torch" in done.stdout, done.stderr


def test_what_vitlib_imports_is_what_it_declares():
    known = {"pillow": "PIL", "pyyaml": "yaml"}
    extras = PROJECT["optional-dependencies"]
    wanted = PROJECT["dependencies"] + extras["own"] + extras["lora"] + extras["export"]
    declared = {known.get(name, name) for name in (re.split(r"[<>=~ ]", w)[0] for w in wanted)}
    imported: set[str] = set()
    for path in (paths.ROOT / "vitlib").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        imported |= {a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        imported |= {n.module.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module}
    assert imported - set(sys.stdlib_module_names) - {"vitlib"} <= declared


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
    extras = {name: extra for name, extra in PROJECT["optional-dependencies"].items() if name != "lora"}
    wanted = PROJECT["dependencies"] + [name for extra in extras.values() for name in extra]
    pinned = set(re.findall(r"^([a-z0-9._-]+)==", LOCK, flags=re.M))
    assert {re.split(r"[<>=~ ]", w)[0] for w in wanted} <= pinned
    assert set(tomllib.loads((paths.ROOT / "pyproject.toml").read_text())["build-system"]["requires"]) <= pinned


def test_a_set_up_that_was_killed_in_its_first_second_begins_anew(tmp_path):
    """What is left then is a Python without pip, or with a part of it. The rest of the set-up is kept from the network."""
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").symlink_to(os.path.realpath(sys.executable))
    (venv / "pyvenv.cfg").write_text(f"home = {os.path.dirname(os.path.realpath(sys.executable))}\n")
    part = venv / "lib" / "python{}.{}".format(*sys.version_info) / "site-packages" / "pip"
    part.mkdir(parents=True)
    (part / "__init__.py").touch()
    command = ["make", "setup", f"VENV={venv}", f"PYTHON={sys.executable}"]
    done = subprocess.run(
        command, cwd=paths.ROOT, capture_output=True, text=True, env=os.environ | {"PIP_NO_INDEX": "1"}
    )
    assert done.returncode == 2 and "No matching distribution found for uv" in done.stderr
    assert (venv / "made").exists() and (venv / "bin" / "pip").exists() and not (venv / "ready").exists()


def test_a_set_up_goes_into_the_folder_of_the_checkout_whatever_uv_is_told_elsewhere(tmp_path):
    """Python and uv are stand-ins that say what they were called with."""
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "made").touch()
    for name in ("python", "uv"):
        told = '"$UV_SYSTEM_PYTHON$UV_PYTHON$UV_TORCH_BACKEND$PIP_TARGET$PIP_PYTHON$PYTHONPATH|$PIP_INDEX_URL|$UV_CACHE_DIR" "$@"'
        (venv / "bin" / name).write_text(f"#!/bin/sh\necho {told} >> {tmp_path}/{name}.log\n")
        (venv / "bin" / name).chmod(0o755)
    others = {
        "UV_SYSTEM_PYTHON": "1",
        "UV_PYTHON": "/usr/bin/python3",
        "UV_TORCH_BACKEND": "cu118",
        "PIP_TARGET": "/x",
        "PIP_PYTHON": "/usr/bin/python3",
        "PYTHONPATH": "/x",
        "PIP_INDEX_URL": "mirror",
        "UV_CACHE_DIR": "/cache",
    }
    command = ["make", "-s", "setup", f"VENV={venv}", f"PYTHON={sys.executable}"]
    done = subprocess.run(command, cwd=paths.ROOT, capture_output=True, text=True, env=os.environ | others)
    assert done.returncode == 0 and (venv / "ready").exists(), done.stderr
    calls = (tmp_path / "uv.log").read_text().splitlines()
    assert len(calls) == 2 and all(f"--python {venv}/bin/python " in call for call in calls)
    assert all(
        call.startswith("|mirror|/cache ") for call in calls + (tmp_path / "python.log").read_text().splitlines()
    )


def test_a_checkout_that_is_dated_in_the_future_is_set_up_once(tmp_path):
    """As an archive from another time zone is, or after a clock was set back. Python and uv are stand-ins that count."""
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        shutil.copy(paths.ROOT / name, tmp_path)
        os.utime(tmp_path / name, (2**32, 2**32))
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "made").touch()
    for name in ("python", "uv"):
        (tmp_path / ".venv" / "bin" / name).write_text(f"#!/bin/sh\necho x >> {tmp_path}/calls\n")
        (tmp_path / ".venv" / "bin" / name).chmod(0o755)
    calls = []
    for _ in range(2):
        done = subprocess.run(
            ["make", "setup", f"PYTHON={sys.executable}"], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        calls.append((tmp_path / "calls").read_text())
    assert calls[0] == calls[1]


def test_environment_yml_leads_to_the_same_lock():
    """It gives Python, make and pip and pins nothing of its own; `make setup` then reads requirements.lock."""
    environment = yaml.safe_load((paths.ROOT / "environment.yml").read_text(encoding="utf-8"))
    assert environment["dependencies"] == ["python=3.11", "make", "pip"]
    assert PROJECT["requires-python"] == ">=3.11" and "--python-version 3.11" in MAKEFILE
    setup = MAKEFILE[MAKEFILE.index("$(READY):") : MAKEFILE.index("reproduce:")]
    assert "$(UV) sync -q --python $(PY) --compile-bytecode --require-hashes requirements.lock" in setup
    assert "make setup" in (paths.ROOT / "environment.yml").read_text(encoding="utf-8")


def test_make_help_names_every_target():
    targets = set(re.findall(r"^([a-z]+):", MAKEFILE, flags=re.M))
    assert targets == set("help setup reproduce test check browser lab site refresh lint lock audit clean".split())
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
        if path.suffix in (".parquet", ".png", ".safetensors") or not path.is_file():
            continue
        text = path.read_text(encoding="utf-8")
        found += [f"{name}: {word}" for word in words if word in text]
    assert found == []


def test_no_tracked_file_is_larger_than_it_should_be():
    large = {name: size for name in tracked() if (size := (paths.ROOT / name).stat().st_size) > 2_000_000}
    for study in ("pilot", "study"):  # all of its runs
        assert large.pop(f"outputs/reference/{study}/runs.jsonl", 0) < 4_000_000
    assert large.pop("vitlib/tasks/trunk.safetensors") < 3_000_000
    assert all(name.startswith("lab/data/embedded/") for name in large)


UNPICKLED = {  # what one process of this project hands to another; embed.py calls nothing that a pickle names
    "lab/runs/launch.py", "lab/runs/execute.py", "lab/bench/runner.py", "tools/kill.py", "tools/embed.py",
    "benchmarks/train.py",
}  # fmt: skip


def runs_code(node: ast.AST) -> bool:
    """Whether a piece of code may run what it reads: a pickle, an expression, a shell's command, YAML with tags."""
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        names = {alias.name for alias in node.names}
        names |= {getattr(node, "module", None)} if names != {"UnpicklingError"} else set()
        return bool(names & {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "code"})
    if not isinstance(node, ast.Call):
        return False
    called, given = ast.unparse(node.func), {key.arg: ast.unparse(key.value) for key in node.keywords}
    if called == "torch.load":
        return given.get("weights_only") != "True"
    unsafe = (
        "eval",
        "exec",
        "os.system",
        "os.popen",
        "yaml.load",
        "yaml.unsafe_load",
        "yaml.full_load",
        "pd.read_pickle",
    )
    return called in unsafe or "shell" in given or "allow_pickle" in given


def test_nothing_that_comes_from_outside_is_run():
    """Where a pickle is read at all is listed; CIFAR's are read by torchvision, by their MD5 sums."""
    found = {
        path.relative_to(paths.ROOT).as_posix()
        for room in ("vitlib", "lab", "tools", "benchmarks") for path in (paths.ROOT / room).rglob("*.py")
        if any(map(runs_code, ast.walk(ast.parse(path.read_text(encoding="utf-8")))))
    }  # fmt: skip
    assert found == UNPICKLED
    for bad in (
        "from pickle import loads",
        "np.load(f, allow_pickle=True)",
        "torch.load(f)",
        "eval(x)",
        "run(x, shell=True)",
    ):
        assert any(map(runs_code, ast.walk(ast.parse(bad)))), bad
