"""What comes from the hub, and at which revision; nothing here goes there."""

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch

from nudging import LLM, BadRequest, CheckpointError
from nudging.api.loading import LoadedModel, read_dtype
from nudging.files.hub import read_revisions


@pytest.fixture
def asked(tiny_pair: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """A hub that has the tiny pair as org/base and org/guide; what it is asked for."""
    seen: list[tuple[str, Any]] = []

    def snapshot_download(hub_id: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        seen.append((hub_id, revision))
        if revision == "gone":
            raise huggingface_hub.errors.LocalEntryNotFoundError("no such revision")
        return str(tiny_pair[hub_id.removeprefix("org/")])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return seen


def test_a_revision_is_that_of_the_hub_id(asked: list[tuple[str, Any]], tiny_pair: dict[str, Path]) -> None:
    LLM("org/base", tiny_pair["guide"], revision="v2", kv_cache_memory="1MiB").close()
    LoadedModel.load("org/base", revision="v3")
    LLM("org/base", "org/guide", revision={"guide": "v4"}, kv_cache_memory="1MiB").close()
    LLM("org/base", kv_cache_memory="1MiB").close()
    assert asked == [
        ("org/base", "v2"),
        ("org/base", "v3"),
        ("org/base", None),
        ("org/guide", "v4"),
        ("org/base", None),
    ]
    with pytest.raises(CheckpointError, match="'org/base at gone' is no local directory and could not be"):
        LLM("org/base", revision="gone")


@pytest.mark.parametrize(
    ("revision", "checkpoints", "message"),
    [
        ("v1", {"base": "a/b", "guide": "a/c"}, "name each one's, as in revision={'base': 'v1'}"),
        ("v1", {"base": "pocket:base"}, "no checkpoint comes from the hub"),
        ({"guide": "v1"}, {"base": "a/b"}, "names 'guide'; from the hub comes 'base'"),
        ({"base": ""}, {"base": "a/b"}, "of 'base' is ''"),
        (3, {"base": "a/b"}, "revision is 3"),
    ],
)
def test_a_revision_of_nothing_is_refused(revision: Any, checkpoints: dict[str, str], message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        read_revisions(revision, checkpoints)


def test_one_repository_in_two_roles_has_one_revision() -> None:
    assert read_revisions("v1", {"base": "a/b", "guide": "a/b"}) == {"base": "v1", "guide": "v1"}


@pytest.mark.parametrize(
    ("names", "dtype"),
    [
        (("float32", "float", "fp32", "f32", "torch.float32", torch.float32), torch.float32),
        (("bfloat16", "bf16", "torch.bfloat16"), torch.bfloat16),
        (("float16", "half", "fp16", "f16", "torch.half"), torch.float16),
    ],
)
def test_a_dtype_has_the_names_that_people_give_it(names: tuple[Any, ...], dtype: torch.dtype) -> None:
    assert {read_dtype(name) for name in names} == {dtype}
    with pytest.raises(BadRequest, match="dtype is 'fp8'"):
        read_dtype("fp8")
