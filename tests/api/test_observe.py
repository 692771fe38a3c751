"""What an engine tells about itself: statistics, Prometheus figures and the timeline."""

import asyncio
import io
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from prometheus_client import CollectorRegistry, Gauge, generate_latest

from nudging import LLM, AsyncLLM, BadRequest, Base, EngineClosed, Nudging, SamplingParams
from nudging.cli.main import main
from nudging.core.trace import Trace, Tracer
from nudging.server.metrics import Metrics

PROMPTS = ["Question: What is 3 + 4?\nAnswer:", "Once there was a"]
PARAMS = SamplingParams(max_tokens=12, ignore_eos=True)


@pytest.fixture
def pair() -> Any:
    with LLM.pocket(speculate=2) as llm:
        yield llm


def values(registry: CollectorRegistry, name: str) -> dict[tuple[str, ...], float]:
    """The samples of that name, by the values of their labels other than the model's name."""
    return {
        tuple(v for k, v in sample.labels.items() if k != "model_name"): sample.value
        for family in registry.collect()
        for sample in family.samples
        if sample.name == f"nudging:{name}"
    }


def test_stats_are_the_sum_of_the_outputs(pair: LLM) -> None:
    outputs = [r.outputs[0] for r in pair.generate(PROMPTS, PARAMS, [Nudging(), Base()])]
    stats = pair.stats()
    totals = stats.totals
    assert (stats.running, stats.waiting) == (0, 0)
    assert stats.kv_cache_usage == {"base": 0.0, "guide": 0.0}
    assert totals.generated_tokens == 24
    assert totals.tokens.get("guide", 0) == sum(o.stats.nudged_tokens for o in outputs)
    assert totals.passes["base"] == sum(o.stats.base_passes for o in outputs)
    assert totals.passes["guide"] == sum(o.stats.guide_passes for o in outputs)
    assert (totals.drafted, totals.accepted) == (
        sum(o.stats.drafted for o in outputs),
        sum(o.stats.accepted for o in outputs),
    )
    assert totals.drafts == sum(sum(o.stats.accepted_lengths) for o in outputs)
    assert totals.finished == {"length": 2}
    assert totals.nudge_rate == pytest.approx(totals.tokens.get("guide", 0) / 24)
    assert totals.prompt_tokens == sum(len(pair.roles["base"].tokenizer.encode(p)) for p in PROMPTS)


def test_stats_count_a_running_request_once_at_every_step() -> None:
    """Totals never fall, whatever stands between running and finished."""
    with LLM.pocket() as llm:
        seen = []
        llm.on_end(lambda request: seen.append(llm.stats().totals.generated_tokens))
        handles = llm.submit_all(PROMPTS * 4, SamplingParams(max_tokens=20, ignore_eos=True))
        read = [0]
        while not all(handle.is_finished for handle in handles):
            read.append(llm.stats().totals.generated_tokens)
        assert read == sorted(read)
        assert seen == sorted(seen)
        assert seen[-1] == llm.stats().totals.generated_tokens == 160


def test_prometheus_sees_what_the_engine_did(pair: LLM) -> None:
    registry = CollectorRegistry()
    metrics = Metrics(pair, "pocket", registry)
    pair.generate(PROMPTS, PARAMS)
    totals = pair.stats().totals
    assert values(registry, "generation_tokens_total") == {(): 24}
    assert values(registry, "author_tokens_total") == {(r,): n for r, n in totals.tokens.items()}
    assert values(registry, "request_passes_total") == {(r,): n for r, n in totals.passes.items()}
    assert values(registry, "request_success_total") == {("length",): 2}
    assert values(registry, "spec_decode_num_drafts_total") == {(): totals.drafts}
    assert values(registry, "spec_decode_num_draft_tokens_total") == {(): totals.drafted}
    assert values(registry, "spec_decode_num_accepted_tokens_total") == {(): totals.accepted}
    assert values(registry, "num_requests_running") == {(): 0}
    assert values(registry, "kv_cache_usage_perc") == {("base",): 0, ("guide",): 0}
    for name in ("time_to_first_token", "inter_token_latency", "e2e_request_latency"):
        assert values(registry, f"{name}_seconds_count") == {(): 2}
        assert values(registry, f"{name}_seconds_sum")[()] > 0
    assert values(registry, "request_nudge_rate_count") == {(): 2}
    metrics.close()
    assert list(registry.collect()) == []


def test_engines_share_a_registry_by_their_names(pair: LLM) -> None:
    registry = CollectorRegistry()
    with LLM.pocket() as other:
        metrics = [Metrics(pair, "one", registry), Metrics(other, "two", registry)]
        pair.generate(PROMPTS, PARAMS)
        other.generate(PROMPTS[:1], PARAMS)
        text = generate_latest(registry).decode()
        for name, count in (("one", 2), ("two", 1)):
            assert f'nudging:generation_tokens_total{{model_name="{name}"}} {12.0 * count}' in text
            assert f'nudging:e2e_request_latency_seconds_count{{model_name="{name}"}} {float(count)}' in text
        assert text.count("# TYPE nudging:num_requests_running gauge") == 1, "a family stands there once"
        with pytest.raises(BadRequest, match="model_name is 'one', which another engine has"):
            Metrics(other, "one", registry)
        metrics[0].close()
        metrics[0].close()
        pair.generate(PROMPTS[:1], PARAMS)
        assert 'model_name="one"' not in generate_latest(registry).decode()
        assert 'model_name="two"' in generate_latest(registry).decode()
        metrics[1].close()
    assert list(registry.collect()) == []


def test_a_registry_with_such_figures_is_refused_and_left_as_it_was(pair: LLM) -> None:
    registry = CollectorRegistry()
    Gauge("nudging:request_nudge_rate", "Somebody else's.", registry=registry)
    with pytest.raises(BadRequest, match="the registry has such figures already"):
        Metrics(pair, "one", registry)
    assert [family.name for family in registry.collect()] == ["nudging:request_nudge_rate"]
    for wrong in ("", None, 5):
        with pytest.raises(BadRequest, match="model_name is"):
            Metrics(pair, wrong, registry)
    with pytest.raises(BadRequest, match="registry is None"):
        Metrics(pair, "one", None)


def test_metrics_that_fail_leave_their_name_free(pair: LLM) -> None:
    registry = CollectorRegistry()
    for wrong in (None, 5, "llm", LLM, object(), pair.stats()):
        with pytest.raises(BadRequest, match="llm is .*; give an open LLM or AsyncLLM"):
            Metrics(wrong, "ok", registry)
    with pytest.raises(EngineClosed, match="not loaded yet"):
        Metrics(AsyncLLM.pocket(), "ok", registry)
    assert list(registry.collect()) == []
    metrics = Metrics(pair, "ok", registry)
    with pytest.raises(EngineClosed, match="not loaded yet"):
        Metrics(AsyncLLM.pocket(), "other", registry)
    assert 'model_name="other"' not in generate_latest(registry).decode()
    metrics.close()


def test_an_async_engine_is_watched_like_any_other() -> None:
    async def use() -> None:
        registry = CollectorRegistry()
        async with AsyncLLM.pocket() as llm:
            Metrics(llm, "pocket", registry)
            await llm.generate(PROMPTS, PARAMS)
            assert values(registry, "generation_tokens_total") == {(): 24}
            assert values(registry, "e2e_request_latency_seconds_count") == {(): 2}

    asyncio.run(use())


def test_a_request_without_a_token_is_in_no_token_histogram(pair: LLM) -> None:
    registry = CollectorRegistry()
    Metrics(pair, "pocket", registry)
    handle = pair.submit(PROMPTS[0], SamplingParams(max_tokens=1000, ignore_eos=True))
    handle.cancel()
    written = len(handle.result().outputs[0].token_ids)
    assert values(registry, "e2e_request_latency_seconds_count") == {(): 1}
    # A figure with labels exists from its first observation on.
    assert values(registry, "time_to_first_token_seconds_count") == ({(): 1} if written else {})


def spans(events: list[dict[str, Any]], track: str) -> list[dict[str, Any]]:
    names = {e["tid"]: e["args"]["name"] for e in events if e["ph"] == "M"}
    return [e for e in events if e["ph"] == "X" and names[e["tid"]] == track]


def test_a_trace_shows_the_parts_of_every_cycle(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    with LLM.pocket(speculate=2, trace=path) as llm:
        stats = llm.generate(PROMPTS[0], PARAMS)[0].outputs[0].stats
    events = json.loads(path.read_text())
    assert len(spans(events, "base")) == stats.base_passes
    assert len(spans(events, "guide")) == stats.guide_passes
    parts = spans(events, "engine")
    assert {e["name"] for e in parts} == {"admit", "plan", "decide and commit"}
    # On the engine's one thread nothing overlaps.
    whole = sorted(parts + spans(events, "base") + spans(events, "guide"), key=lambda e: e["ts"])
    assert all(a["ts"] + a["dur"] <= b["ts"] for a, b in zip(whole, whole[1:], strict=False))
    begin, end = (next(e for e in events if e["ph"] == ph) for ph in "be")
    assert begin["id"] == end["id"]
    assert end["args"] == {"finish_reason": "length", "tokens": 12}
    verify = [e for e in spans(events, "base") if e["args"]["rows"] == 3]
    assert verify
    assert verify[0]["args"][f"{begin['id']} base"].endswith(", 3 answers")


def test_a_trace_that_was_cut_off_is_whole_up_to_there() -> None:
    file = io.StringIO()
    trace = Trace(file, clock=iter(range(100)).__next__)
    with trace.span("base", "pass", lambda: {"rows": 1}):
        pass
    trace.level("requests", running=1)
    # Viewers close the array themselves.
    events = json.loads(file.getvalue() + "]")
    assert [e["ph"] for e in events] == ["M", "X", "C"]
    assert (events[1]["ts"], events[1]["dur"], events[1]["args"]) == (1e6, 1e6, {"rows": 1})
    for _ in range(2):
        trace.close()
        trace.level("requests", running=0)


def test_without_a_trace_nothing_is_described() -> None:
    with Tracer().span("base", "pass", lambda: pytest.fail("nobody listens")):
        pass


def test_the_command_line_writes_a_trace(tmp_path: Path) -> None:
    path, out = tmp_path / "trace.json", tmp_path / "out.jsonl"
    arguments = ["generate", "--base", "pocket:base", "--max-tokens", "4", "--trace", str(path)]
    done = CliRunner().invoke(
        main, [*arguments, "--input", "-", "--output", str(out)], input='{"prompt": "Once"}\n'
    )
    assert done.exit_code == 0, done.output
    assert spans(json.loads(path.read_text()), "pocket:base") or spans(json.loads(path.read_text()), "base")
