"""What editors, type checkers and a first look at the package see: signatures, names, versions, `repr`."""

import ast
import inspect
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_type_hints

import pytest

import nudging
from nudging import (
    LLM,
    AsyncGeneration,
    AsyncHandle,
    AsyncLLM,
    EngineClosed,
    Generation,
    Handle,
    Nudging,
    SamplingParams,
)
from nudging.api.async_handle import AsyncStream
from nudging.api.handle import Stream
from nudging.api.llm_options import LLMOptions

ROOT = Path(__file__).parents[2]


def shown(function: Any) -> dict[str, Any]:
    """The parameters that `inspect.signature` shows, by name, with their defaults."""
    return {name: p.default for name, p in inspect.signature(function).parameters.items()}


def test_constructors_show_their_parameters() -> None:
    assert shown(Nudging)["threshold"] == 0.4
    assert shown(SamplingParams)["max_tokens"] == 16
    for function in (SamplingParams, Nudging, LLM, LLM.pocket, AsyncLLM, AsyncLLM.pocket, AsyncLLM.create):
        kinds = {p.kind for p in inspect.signature(function).parameters.values()}
        assert not kinds & {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}, function
        assert all(
            p.annotation is not inspect.Parameter.empty
            for p in inspect.signature(function).parameters.values()
        )


def test_an_async_engine_is_opened_with_the_same_options() -> None:
    assert shown(AsyncLLM) == shown(AsyncLLM.create) == shown(LLM)
    assert shown(AsyncLLM.pocket) == shown(LLM.pocket)
    pocket = {"base": "pocket:base", "guide": "pocket:guide", "kv_cache_memory": "64MiB"}
    assert shown(LLM.pocket) == shown(LLM) | pocket


def test_the_options_that_are_passed_on_are_all_named() -> None:
    options = {name for name in shown(LLM) if name not in ("base", "guide")}
    assert set(LLMOptions.__annotations__) == options


def test_sampling_params_says_to_editors_what_its_fields_are() -> None:
    """The constructor that type checkers see has the fields' names, order and defaults."""
    tree = ast.parse((ROOT / "engine" / "core" / "sampling_params.py").read_text())
    owner = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "SamplingParams")
    inits = [n for n in ast.walk(owner) if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
    arguments = inits[0].args
    names = [argument.arg for argument in arguments.args[1:]]
    defaults = [ast.literal_eval(default) for default in arguments.defaults]
    assert dict(zip(names, defaults, strict=True)) == shown(SamplingParams)
    assert list(names) == list(shown(SamplingParams))


@pytest.mark.parametrize("name", nudging.__all__)
def test_every_exported_name_is_there(name: str) -> None:
    assert getattr(nudging, name) is not None
    assert name in dir(nudging)


def test_results_and_policies_are_top_level() -> None:
    wanted = {"RequestOutput", "CompletionOutput", "Delta", "Handle", "Policy", "Step", "View", "Generation"}
    assert wanted <= set(nudging.__all__)
    assert nudging.__version__ == version("nudging")
    with pytest.raises(AttributeError, match="no attribute 'Nuding'"):
        nudging.Nuding  # noqa: B018


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = (
        "import sys, nudging; nudging.SamplingParams; nudging.Step; "
        "sys.exit(bool({'torch', 'numpy'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_hint_resolves() -> None:
    assert get_type_hints(LLMOptions)["drafter"] is str


TYPED = """
from nudging import LLM, AsyncLLM, Delta, Handle, RequestOutput, SamplingParams

def right(llm: LLM, stop: list[str] | None, ids: list[int]) -> list[RequestOutput]:
    SamplingParams(stop="a", stop_token_ids=ids)
    SamplingParams(stop=["a"], stop_token_ids=[1])
    SamplingParams(stop=stop, seed=None, temperature=None)
    LLM.pocket(threads=1, speculate="off")
    AsyncLLM("base", "guide", models={"expert": "c"}, threads=1)
    handle: Handle = llm.submit("a", timeout=3.0)
    return llm.generate(["a"], SamplingParams(max_tokens=3))

def wrong(llm: LLM) -> None:
    SamplingParams(stop=5)
    SamplingParams(max_token=5)
    LLM.pocket(thread=1)
    AsyncLLM("base", thread=1)
    llm.generate("a", timeot=1.0)
"""

CONFIG = """[mypy]
mypy_path = {path}
follow_imports = silent
ignore_missing_imports = True
cache_dir = {path}/cache
show_error_context = False
[mypy-torch.*,numpy.*,jinja2.*,click.*,rich.*,triton.*]
follow_imports = skip
"""


def test_type_checkers_accept_what_is_right_and_refuse_what_is_wrong(tmp_path: Path) -> None:
    """Checked against the sources under their final names, as `make types` shows them."""
    pytest.importorskip("mypy")
    package = tmp_path / "nudging"
    package.mkdir()
    for file in (ROOT / "engine").iterdir():
        (package / file.name).symlink_to(file)
    (package / "kernels").symlink_to(ROOT / "kernels")
    (tmp_path / "snippet.py").write_text(TYPED)
    (tmp_path / "mypy.ini").write_text(CONFIG.format(path=tmp_path))
    # A process of its own: mypy changes the recursion limit and the collector of the one it runs in.
    command = [sys.executable, "-m", "mypy", "--config-file", str(tmp_path / "mypy.ini")]
    done = subprocess.run(
        [*command, str(tmp_path / "snippet.py")], capture_output=True, text=True, check=False
    )
    out = done.stdout
    assert not done.stderr
    found = [int(line.split(":")[1]) for line in out.splitlines() if ": error:" in line]
    first_wrong = TYPED.splitlines().index("def wrong(llm: LLM) -> None:") + 2
    assert found == list(range(first_wrong, len(TYPED.splitlines()) + 1)), out


def public(cls: type) -> dict[str, Any]:
    """A class's public names, dunder methods of its protocols left out."""
    return {name: inspect.getattr_static(cls, name) for name in dir(cls) if not name.startswith("_")}


@pytest.mark.parametrize("name", sorted(public(LLM)))
def test_the_async_engine_has_every_public_name_with_the_same_parameters(name: str) -> None:
    ours, theirs = inspect.getattr_static(LLM, name), inspect.getattr_static(AsyncLLM, name, None)
    assert theirs is not None, f"AsyncLLM has no {name}"
    assert isinstance(ours, property) == isinstance(theirs, property)
    if not isinstance(ours, property):
        assert shown(getattr(LLM, name)) == shown(getattr(AsyncLLM, name))
        one, other = (inspect.signature(getattr(cls, name)).parameters.values() for cls in (LLM, AsyncLLM))
        assert [str(p) for p in one] == [str(p) for p in other]


@pytest.mark.parametrize(("one", "other"), [(Handle, AsyncHandle), (Generation, AsyncGeneration)])
def test_async_handles_and_texts_have_every_public_name(one: type, other: type) -> None:
    engine_side = {
        "take",
        "num_outputs",
        "add_listener",
        "abandon",
        "begin",
        "begin_score",
        "leave",
    }
    for name, value in public(one).items():
        if name not in engine_side:
            assert hasattr(other, name), f"{other.__name__} has no {name}"
            if inspect.isfunction(value) and (one, name) != (Handle, "result"):
                assert list(shown(value)) == list(shown(getattr(other, name)))


@pytest.mark.parametrize(("one", "other"), [(Stream, AsyncStream)])
def test_streams_have_the_same_names(one: type, other: type) -> None:
    assert public(other).keys() == public(one).keys() - {"close"} | {"aclose"}


def test_a_representation_says_what_is_open(tiny_pair: dict[str, Path]) -> None:
    llm = LLM(**tiny_pair, kv_cache_memory="1MiB", device="cpu")
    base, guide = (str(path) for path in tiny_pair.values())
    said = f"base={base!r} (float32), guide={guide!r} (float32) on cpu"
    assert repr(llm) == f"<LLM {said}, open>"
    llm.close()
    assert repr(llm) == f"<LLM {said}, closed>"
    assert repr(AsyncLLM(**tiny_pair)) == "<AsyncLLM, not loaded>"


def test_health_says_why_nobody_is_served(tiny_pair: dict[str, Path]) -> None:
    llm = LLM(**tiny_pair, kv_cache_memory="1MiB")
    llm.check_health()
    assert llm.is_alive
    llm.close()
    assert not llm.is_alive
    with pytest.raises(EngineClosed, match="the engine is closed"):
        llm.check_health()
    unloaded = AsyncLLM(**tiny_pair)
    assert not unloaded.is_alive
    with pytest.raises(EngineClosed, match="not loaded yet"):
        unloaded.check_health()
