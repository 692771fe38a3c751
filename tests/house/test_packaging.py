"""Wheel, sdist and editable installs hold the package `nudging`, all of it and nothing beside it.

Everything is built and installed offline, in copies of the source and in throw-away environments that see the
libraries of the running one, but not its `nudging`.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOT_SOURCE = (".*", "build", "dist", "shared", "*.so", "*.egg-info", "__pycache__")
PIP = [sys.executable, "-m", "pip", "--no-input", "--disable-pip-version-check", "-q"]


def run(*command: object, cwd: Path = Path("/"), path: Path | None = None) -> str:
    """The standard output of a command that must succeed, away from the repository unless `cwd` says so."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PIP_", "NUDGING_"))}
    environment = {**kept, "PIP_NO_INDEX": "1", **({"PYTHONPATH": str(path)} if path else {})}
    done = subprocess.run(
        [str(c) for c in command], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def copy_source(target: Path) -> Path:
    shutil.copytree(ROOT, target, ignore=shutil.ignore_patterns(*NOT_SOURCE))
    return target


def build_wheel(source: Path, out: Path) -> Path:
    run(*PIP, "wheel", source, "--no-build-isolation", "--no-deps", "-w", out)
    [wheel] = out.glob("*.whl")
    return wheel


class Environment:
    """A fresh virtual environment that sees the running one's libraries, after its own."""

    def __init__(self, path: Path) -> None:
        run(sys.executable, "-m", "venv", "--without-pip", path)
        self.bin = path / "bin"
        [self.site] = (path / "lib").glob("python*/site-packages")
        # A plain path in a .pth file brings no .pth files of its own: editable installs stay behind.
        libraries = [p for p in sys.path if p.endswith(("site-packages", "dist-packages"))]
        (self.site / "libraries.pth").write_text("\n".join(libraries) + "\n")

    def install(self, *what: object) -> None:
        run(*PIP[:3], "--python", self.bin / "python", *PIP[3:], "install", "--no-deps", *what)

    def python(self, code: str, cwd: Path = Path("/")) -> str:
        return run(self.bin / "python", "-c", code, cwd=cwd).strip()


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    source = copy_source(folder / "source")
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
    run(sys.executable, "-c", code, cwd=source)
    [archive] = folder.glob("*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel built from the sdist: what the sdist lacks, the wheel cannot have."""
    folder = tmp_path_factory.mktemp("wheel")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    [source] = (path for path in folder.iterdir() if path.is_dir())
    return build_wheel(source, folder)


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    return Environment(tmp_path / "venv")


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def metadata_of(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        [name] = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode())


def expected_files() -> set[str]:
    """Every module, type stub and data file of the source, by its place in a wheel."""
    files = set()
    for folder, package in ((ROOT / "engine", "nudging"), (ROOT / "kernels", "nudging/kernels")):
        for file in folder.rglob("*"):
            inside = file.relative_to(folder)
            is_data = inside.parts[0] == "pocket" or file.suffix in (".py", ".pyi") or file.name == "py.typed"
            if file.is_file() and is_data and "__pycache__" not in inside.parts:
                files.add(f"{package}/{inside.as_posix()}")
    return files


def test_the_wheel_holds_all_of_the_package_and_no_more(wheel: Path) -> None:
    names = {name for name in names_in(wheel) if ".dist-info/" not in name}
    extensions = {name for name in names if name.startswith("nudging/_C.") and name.endswith((".so", ".pyd"))}
    assert len(extensions) == 1, extensions
    assert names - extensions == expected_files()
    assert {"nudging/py.typed", "nudging/kernels/op.py", "nudging/pocket/questions.jsonl"} <= names


def test_the_wheel_claims_one_top_level_name(wheel: Path) -> None:
    """A top-level `kernels` or `engine` would overwrite other people's packages of that name."""
    assert {name.partition("/")[0].partition("-")[0] for name in names_in(wheel)} == {"nudging"}
    with zipfile.ZipFile(wheel) as archive:
        [top_level] = (name for name in archive.namelist() if name.endswith("top_level.txt"))
        assert archive.read(top_level).decode().split() == ["nudging"]


def test_the_wheel_asks_for_what_it_needs_and_pins_no_build_of_torch(wheel: Path) -> None:
    metadata = metadata_of(wheel)
    needed = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert "torch>=2.10" in needed
    for line in needed:
        requirement = line.partition(";")[0]
        assert not any(word in requirement for word in ("cuda", "nvidia", "cu1", "<", "==", "~=")), line
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["License-Expression"] == "Apache-2.0"


def test_an_installed_wheel_runs_next_to_hugging_faces_kernels(wheel: Path, environment: Environment) -> None:
    hub = environment.site / "kernels"
    hub.mkdir()
    (hub / "__init__.py").write_text("OWNER = 'hub'\n")
    environment.install(wheel)
    assert (hub / "__init__.py").read_text() == "OWNER = 'hub'\n"
    code = "import kernels, nudging, nudging.kernels.linear; print(kernels.OWNER, nudging.__file__)"
    assert environment.python(code) == f"hub {environment.site / 'nudging' / '__init__.py'}"
    assert "generate" in run(environment.bin / "nudging", "--help")
    assert "cpu kernels" in run(environment.bin / "nudging", "info")


def test_transformers_works_with_the_repository_on_the_path() -> None:
    """From here `kernels` is our folder: whoever probes for the hub's package must find that it is not it."""
    code = (
        "import transformers, kernels, sys; from transformers import LlamaConfig, LlamaForCausalLM;"
        "config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,"
        " num_attention_heads=1);"
        "print(LlamaForCausalLM(config).num_parameters() > 0, kernels.__file__)"
    )
    assert run(sys.executable, "-c", code, path=ROOT).split() == [
        "True",
        str(ROOT / "kernels" / "__init__.py"),
    ]


@pytest.mark.slow
def test_a_wheel_of_the_source_tree_is_that_of_the_sdist(wheel: Path, tmp_path: Path) -> None:
    direct = build_wheel(copy_source(tmp_path / "source"), tmp_path / "dist")
    assert names_in(direct) == names_in(wheel)


@pytest.mark.slow
@pytest.mark.parametrize("is_editable", [False, True])
def test_an_install_from_source_runs(environment: Environment, tmp_path: Path, is_editable: bool) -> None:
    source = copy_source(tmp_path / "source")
    environment.install("--no-build-isolation", *(["-e"] if is_editable else []), source)
    home = source / "engine" if is_editable else environment.site / "nudging"
    op = source / "kernels" if is_editable else environment.site / "nudging" / "kernels"
    code = (
        "import importlib.util as u, nudging, nudging.kernels, nudging._C;"
        "print(nudging.__path__[0], nudging.kernels.__path__[0], nudging._C.available_isas()[-1].name,"
        " u.find_spec('kernels'), u.find_spec('engine'))"
    )
    assert environment.python(code) == f"{home} {op} portable None None"
    assert "generate" in run(environment.bin / "nudging", "--help")
