"""The GPU's benchmark, rehearsed without one: every part runs, and none takes another one along."""

import json
import os
import re
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from benchmarks.gpu import kernels, parts
from benchmarks.gpu.__main__ import OTHERS, main
from benchmarks.gpu.agreement import disturbed
from benchmarks.gpu.goals import Goal, best, goals_of, lowest, of_copy, value
from benchmarks.gpu.pairs import Pair
from benchmarks.gpu.parts import Figure, Found, Part, run_parts
from benchmarks.gpu.rivals import of_files
from benchmarks.gpu.sanitize import TESTS, errors_of, run_tools
from benchmarks.gpu.scale import TINY
from benchmarks.gpu.tiles import MOST_SHARED, candidates
from nudging import LoadedModel
from tests.kernels.test_triton import AGREE
from tests.support.waiting import PATIENCE


def test_every_part_runs_on_tiny_models_and_has_its_figures(tmp_path: Path) -> None:
    (tmp_path / "gpu_tests.xml").write_text(
        '<testsuites><testsuite tests="9" failures="1" errors="0" skipped="2"/></testsuites>'
    )
    (tmp_path / "sanitizer.json").write_text('{"memcheck": {"errors": 3, "why": ""}}')
    done = CliRunner().invoke(main, ["--device", "cpu", "--tiny", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert done.exit_code == 0, done.output
    others = {f"tiny, {arm}" for _, arm in OTHERS} | {"rounding"}
    assert {name for name, part in found.items() if part["state"] != "measured"} == others
    assert {found[name]["state"] for name in others} == {"missing"}
    assert all(part["figures"] for name, part in found.items() if name != "device" and name not in others)
    figures = {f["what"]: f for part in found.values() for f in part["figures"]}
    assert (figures["tests: failures"]["value"], figures["sanitizer: memcheck"]["value"]) == (1, 3)
    # One computation of one text, whoever computes it.
    assert figures["texts that are ours"]["value"] == 1
    assert figures["read"]["value"] > 1e8
    assert all(f["value"] > 0 for name, f in figures.items() if f["unit"] in ("us", "tok/s"))
    bounded = ("linear", "gated_linear", "lm_head", "paged_attention", "pass", "path")
    assert figures["recordings made"]["value"] > 10
    assert all(f["bound"] > 0 for name, f in figures.items() if name.startswith(bounded))
    assert found["tiny, kernels of the base"]["details"]["pass"]
    table = (tmp_path / "gpu.md").read_text().splitlines()
    goals, rows = table[: table.index("")], table[table.index("") + 1 :]
    assert len(rows) == 2 + len(others) + sum(len(part["figures"]) for part in found.values())
    assert any("| tiny, vllm bf16 | missing: " in row for row in rows)
    # Six tokens of one question hold no step in which authors change and one in which they do not.
    missing = [row for row in goals if "not measured" in row]
    assert all("a step in which authors change" in row for row in missing), missing
    assert len(goals) == 2 + len(goals_of(TINY))


def test_goals_are_read_from_the_figures_they_name() -> None:
    def part(*figures: Figure, **details: object) -> dict[str, object]:
        return {"figures": [asdict(f) | {"share": f.share} for f in figures], "details": details}

    arms = [
        {"name": name, "relative": r} for name, r in (("lazy", 3.0), ("adaptive", 1.5), ("speculative", 1.7))
    ]
    done = {
        "memory": part(Figure("read", 5.0, "B/s"), Figure("copied, read and written", 4.0, "B/s")),
        "p": part(
            Figure("pass: 1", 10.0, "us", 7.2),
            Figure("idle, 2", 0.01, ""),
            Figure("idle, 4", 0.03, ""),
            arms=arms,
        ),
        "p, 1 at once": part(Figure("over, 1", 1.2, "x")),
        "p, 8 at once": part(Figure("over, 8", 0.9, "x")),
    }
    assert of_copy("p", "pass")(done) == (pytest.approx(0.9), "p: pass: 1")
    assert value("p", "idle")(done) == (0.03, "p: idle, 4")
    assert lowest("p, ", " at once", "over")(done) == (0.9, "over, 8")
    assert best("p")(done) == (1.7, "p: speculative")
    assert [read(done) for read in (of_copy("q", ""), value("q", ""), lowest("q", "", ""), best("q"))] == [
        None
    ] * 4
    least, most = Goal("speed", 1.0, "x", best("p")), Goal("idle", 0.02, "%", value("p", "idle"), True)
    assert least.row(done) == "| speed | at least 1 x | 1.7 x | yes | p: speculative |"
    assert most.row(done) == "| idle | at most 2.0% | 3.0% | no | p: idle, 4 |"
    assert Goal("speed", 1.0, "x", best("q")).row(done) == "| speed | at least 1 x | not measured |  |  |"


def test_an_engine_in_a_process_of_its_own_is_measured_or_says_why_not(tmp_path: Path) -> None:
    pair = Pair(TINY.pairs["tiny"], torch.device("cpu"), TINY, tmp_path)
    found = of_files(pair, 1e10, "transformers", "transformers bf16", 120)
    figures = {figure.what: figure.value for figure in found.figures}
    assert figures["texts that are ours"] == 1
    assert figures["transformers bf16"] > 0
    assert figures["ours over it"] == pytest.approx(
        figures["ours, base alone"] / figures["transformers bf16"]
    )
    with pytest.raises(RuntimeError, match="no such arm ended with 1: (.|\n)*not enough values to unpack"):
        of_files(pair, 1e10, "transformers", "no such arm", 120)
    with pytest.raises(TimeoutError, match=r"transformers bf16 took more than 0 s"):
        of_files(pair, 1e10, "transformers", "transformers bf16", 0.1)
    pair.close()


def test_a_guide_is_disturbed_and_then_as_it_was() -> None:
    model = LoadedModel.load("pocket:guide", device="cpu")
    norm = model.decoder.weights.norm
    assert norm is not None
    kept, rows = norm.clone(), model.decoder.logits([5, 6, 7])
    with disturbed(model, 2.0):
        assert not torch.equal(model.decoder.logits([5, 6, 7]), rows)
    assert torch.equal(norm, kept)
    assert torch.equal(model.decoder.logits([5, 6, 7]), rows)


def test_a_part_that_fails_or_would_take_too_long_stops_no_other(tmp_path: Path) -> None:
    path, ran = tmp_path / "gpu.json", []

    def part(name: str, seconds: float = 0) -> Part:
        def run() -> Found:
            ran.append(name)
            if name == "bad":
                raise ValueError("what | happened")
            return Found([Figure("speed", 2.0, "tok/s", 4.0), Figure("time", 4.0, "us", 2.0)])

        return Part(name, seconds, run)

    listed = [part("first"), part("bad"), part("long", 60), part("last")]
    assert not run_parts(listed, path, 1030.0, lambda: True, lambda line: None, clock=lambda: 1000.0)
    assert ran == ["first", "bad", "last"]
    found = json.loads(path.read_text())
    assert [found[one.name]["state"] for one in listed] == ["measured", "failed", "skipped", "measured"]
    assert "in run\n    raise ValueError" in found["bad"]["error"]
    assert [figure["share"] for figure in found["last"]["figures"]] == [0.5, 0.5]
    assert "| bad | failed: ValueError: what / happened |" in path.with_suffix(".md").read_text()
    # What is in the file is not run again.
    run_parts([*listed, part("new")], path, 1030.0, lambda: True, lambda line: None, clock=lambda: 1000.0)
    assert ran[3:] == ["new"]


def test_a_lost_device_is_left_behind_with_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Replaced(BaseException):
        pass

    commands: list[list[str]] = []

    def execv(program: str, command: list[str]) -> None:
        commands.append(command)
        raise Replaced

    def run() -> Found:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(os, "execv", execv)
    monkeypatch.setattr(sys, "argv", ["benchmarks.gpu", "--tiny"])
    with pytest.raises(Replaced):
        run_parts([Part("bad", 0, run)], tmp_path / "gpu.json", 2e9, lambda: False, lambda line: None)
    assert json.loads((tmp_path / "gpu.json").read_text())["bad"]["state"] == "failed"
    assert commands[0][2:] == ["benchmarks.gpu", "--tiny", "--resume", "--until", "2000000000.0"]
    assert parts.device_is_well(torch.device("cpu"))


def test_the_kernel_that_reads_reads_all() -> None:
    x = torch.randint(-(2**31), 2**31 - 1, (3 * kernels.BLOCK - 5,), dtype=torch.int32)
    out = torch.empty(3, dtype=torch.int32)
    kernels.read(x, out)
    assert out.tolist() == [int(part.sum().to(torch.int32)) for part in x.split(kernels.BLOCK)]
    kernels.nothing(x)


@pytest.mark.parametrize(
    ("output", "errors"),
    [
        ("========= ERROR SUMMARY: 0 errors\n", 0),
        ("========= ERROR SUMMARY: 1 error\n", 1),
        ("========= RACECHECK SUMMARY: 3 hazards displayed (2 errors, 1 warning)\n", 2),
        ("========= Device not supported\n", None),
    ],
)
def test_what_the_sanitizer_counts_is_read(output: str, errors: int | None) -> None:
    assert errors_of(output) == errors


def test_without_a_sanitizer_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert {one["errors"] for one in run_tools(1).values()} == {None}


def test_a_tool_that_is_not_done_in_time_is_stopped_with_what_it_started(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(
        '#!/bin/sh\nshift 2; [ "$1" = slow ] && sleep 7d & echo "========= ERROR SUMMARY: 2 errors"; wait\n'
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert {one["errors"] for one in run_tools(PATIENCE, ["quick"]).values()} == {2}
    # A week would pass if one of them were waited for.
    slow = run_tools(0.5, ["slow"])
    assert {one["why"] for one in slow.values()} == {"stopped after 0 s"}


def test_every_name_that_the_sanitizer_chooses_by_is_a_case() -> None:
    names = [word for word in re.split(r"[\s()]+", str(TESTS[-1])) if "-" in word]
    assert len(names) > 8
    assert all(any(str(case).startswith(name) for case in AGREE) for name in names)


def test_tiles_that_are_tried_fit_and_hold_what_is_shipped() -> None:
    from nudging.kernels.gpu.common.configs import DEFAULT
    from nudging.kernels.gpu.common.tile import SHARES

    for rows in (8, 16):
        shapes = candidates(rows)
        assert len(shapes) == len(set(shapes)) > 8
        assert all(
            SHARES.value * (rows + cols) * depth * 2 * (stages - 1) <= MOST_SHARED
            for _, cols, depth, stages in shapes
        )
        shipped = {tile[1:3] for tile in DEFAULT.products[2, 2][rows].values()}
        assert shipped <= {shape[1:3] for shape in shapes}
