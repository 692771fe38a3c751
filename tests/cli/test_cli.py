"""The command line does what the interface says, and answers bad input with messages and statuses."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from nudging import LLM, Base, Guide, Nudging, SamplingParams
from nudging.cli.main import main
from nudging.policies import Policy

Pair = dict[str, Path]

NUDGING = [sys.executable, "-m", "nudging"]
PROMPTS = ["Hello", "Where is the café?", "12 - 5 =", "Sure,"]


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("NUDGING_")]:
        monkeypatch.delenv(name)


def run(*arguments: object, stdin: str | bytes | None = None) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments], input=stdin)


def generate(pair: Pair, *arguments: object, lines: list[Any] | None = None, status: int = 0) -> list[Any]:
    """The records that `nudging generate` writes for `lines` (strings are taken as they stand)."""
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines or []]
    flags = [f for role, path in pair.items() for f in (f"--{role}", path)]
    source = ("--input", "-") if lines is not None else ()
    result = run(
        "generate", *flags, "--kv-cache-memory", "4MiB", *source, *arguments, stdin="\n".join(texts) + "\n"
    )
    assert result.exit_code == status, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


def commands() -> Iterator[tuple[str, click.Command]]:
    context = click.Context(main)
    for name in main.list_commands(context):
        command = main.get_command(context, name)
        assert command is not None
        yield name, command


# --- Help, environment, statuses


def test_help_loads_nothing_heavy() -> None:
    """How long it takes is measured by `python -m benchmarks.startup`; this is why it is short."""
    code = (
        "import sys; from nudging.cli.main import main; main(['--help'], standalone_mode=False);"
        "print(*sys.modules, file=sys.stderr)"
    )
    bare = "import sys; print(*sys.modules, file=sys.stderr)"
    # What the interpreter's own start loads is not ours: a setuptools beside it hooks itself in.
    loaded, before = (
        set(
            subprocess.run(
                [sys.executable, "-c", one], check=True, capture_output=True, text=True
            ).stderr.split()
        )
        for one in (code, bare)
    )
    loaded -= before
    others = {name.partition(".")[0] for name in loaded} - set(sys.stdlib_module_names)
    assert {name for name in others if not name.startswith("__")} == {"click", "nudging"}
    assert not loaded & {"asyncio", "http", "multiprocessing", "ssl", "unittest", "urllib.request"}
    assert len([name for name in loaded if name.startswith("nudging")]) < 30


@pytest.mark.parametrize("path", [(), *[(name,) for name in main.commands], ("bench", "pair")])
def test_h_is_help_everywhere(path: tuple[str, ...]) -> None:
    short, long = (subprocess_or_run(path, flag) for flag in ("-h", "--help"))
    assert "sage:" in short
    assert short == long


def subprocess_or_run(path: tuple[str, ...], flag: str) -> str:
    """What a word says; benchmarks are processes of their own."""
    if len(path) > 1:
        return subprocess.run([*NUDGING, *path, flag], capture_output=True, text=True, check=True).stdout
    result = run(*path, flag)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_all_commands_are_listed() -> None:
    assert [name for name, _ in commands()] == [
        "demo",
        "generate",
        "chat",
        "serve",
        "bench",
        "inspect",
        "info",
    ]


def test_every_flag_shows_its_environment_twin() -> None:
    for name, command in commands():
        shown = re.sub(r"\s+", " ", run(name, "--help").output)
        for parameter in command.params:
            flag = parameter.opts[0].lstrip("-").replace("-", "_").upper()
            assert f"env var: NUDGING_{name.upper()}_{flag}" in shown, f"{name} {parameter.opts}"


def test_the_environment_stands_for_flags(tiny_pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ("--max-tokens", 7, "--stop", "a b", "--stop", "c", "--granularity", "token")
    expected = generate(tiny_pair, *flags, lines=[{"prompt": p} for p in PROMPTS])
    monkeypatch.setenv("NUDGING_GENERATE_MAX_TOKENS", "7")
    monkeypatch.setenv("NUDGING_GENERATE_STOP", "a b\nc")
    monkeypatch.setenv("NUDGING_GENERATE_GRANULARITY", "token")
    written = generate(tiny_pair, lines=[{"prompt": p} for p in PROMPTS])
    assert [r["token_ids"] for r in written] == [r["token_ids"] for r in expected]


def test_flags_say_what_sampling_params_say(tiny_pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = (
        "--presence-penalty", 1.5, "--frequency-penalty", 0.5, "--repetition-penalty", 1.3, "--min-tokens", 3,
        "--bad-word", "e", "--bad-word", "a b", "--logit-bias", "70=3", "--include-stop-str-in-output",
        "--no-skip-special-tokens", "--max-tokens", "none", "--max-len", 40, "--stop", "zq",
        "--prompt-logprobs", 1,
    )  # fmt: skip
    allowed = [flag for token in range(60, 320, 2) for flag in ("--allowed-token-id", token)]
    monkeypatch.setenv("NUDGING_GENERATE_STOP_TOKEN_ID", "62 64")
    [record] = generate(tiny_pair, *flags, *allowed, "--prompt", "Hello", "--ignore-eos")
    params = SamplingParams(
        max_tokens=None, presence_penalty=1.5, frequency_penalty=0.5, repetition_penalty=1.3, min_tokens=3,
        bad_words=("e", "a b"), logit_bias={70: 3}, include_stop_str_in_output=True, stop="zq",
        skip_special_tokens=False, stop_token_ids=(62, 64), allowed_token_ids=range(60, 320, 2),
        ignore_eos=True, prompt_logprobs=1,
    )  # fmt: skip
    with LLM(**tiny_pair, max_len=40) as llm:
        result = llm.generate("Hello", params)[0]
    assert record["token_ids"] == list(result.outputs[0].token_ids)
    assert record["text"] == result.outputs[0].text
    read = [one and one.logprob for one in result.prompt_logprobs or ()]
    assert [one and one["logprob"] for one in record["prompt_logprobs"]] == read


@pytest.mark.parametrize("command", ["serve", "inspect"])
def test_promised_commands_say_that_they_are_not_built(command: str) -> None:
    result = run(command, "--anything", 5)
    assert result.exit_code == 1
    assert "not built yet" in result.stderr
    assert result.stdout == ""


# --- generate: what is written


@pytest.mark.parametrize(
    ("flags", "policy"),
    [
        (("--policy", "base"), Base()),
        (("--policy", "guide"), Guide()),
        ((), Nudging()),
        (("--granularity", "token", "--threshold", 0.3, "--comparator", "<="), Nudging(0.3, "token", "<=")),
        (("--granularity", "reference"), Nudging(granularity="reference")),
    ],
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_texts_are_those_of_the_api(
    tiny_pair: Pair, tiny_llm: LLM, flags: tuple[object, ...], policy: Policy, temperature: float
) -> None:
    params = SamplingParams(max_tokens=10, temperature=temperature, seed=7, top_k=50, top_p=0.95, min_p=0.01)
    warmth = ("--temperature", temperature, "--top-k", 50, "--top-p", 0.95, "--min-p", 0.01)
    written = generate(
        tiny_pair,
        *flags,
        *("--max-tokens", 10, "--seed", 7, "--speculate", "off", *warmth),
        lines=[{"prompt": p} for p in PROMPTS],
    )
    expected = [r.outputs[0] for r in tiny_llm.generate(PROMPTS, params, policy)]
    assert [r["index"] for r in written] == list(range(len(PROMPTS)))
    for record, output in zip(written, expected, strict=True):
        assert list(record) == [
            "index", "text", "token_ids", "authors", "segments", "finish_reason", "stats",
        ]  # fmt: skip
        assert record["text"] == output.text
        assert record["token_ids"] == list(output.token_ids)
        assert record["authors"] == list(output.authors)
        assert record["segments"] == json.loads(json.dumps([dataclasses.asdict(s) for s in output.segments]))
        assert record["finish_reason"] == output.finish_reason
        assert set(record["stats"]) == {f.name for f in dataclasses.fields(output.stats)}


def test_the_drafter_is_a_flag_and_changes_no_token(tiny_pair: Pair) -> None:
    flags = ("--policy", "base", "--speculate", 4, "--max-tokens", 24, "--ignore-eos")
    lines = [{"prompt": "one two three four " * 8}]
    [plain], [looked_up] = (
        generate(tiny_pair, *flags, "--drafter", drafter, lines=lines) for drafter in ("none", "ngram")
    )
    assert looked_up["token_ids"] == plain["token_ids"]
    assert looked_up["stats"]["drafted"] > plain["stats"]["drafted"] == 0


def test_a_prompt_may_be_given_in_every_form(tiny_pair: Pair, tiny_llm: LLM) -> None:
    both = {"base": "Hello", "guide": "Sure, Hello"}
    ids = {"base": [5, 6, 7], "guide": [8, 9]}
    messages = [{"role": "user", "content": "How many apples?"}]
    written = generate(
        tiny_pair,
        "--max-tokens",
        8,
        lines=[
            {"prompt": both},
            {"prompt_token_ids": [5, 6, 7]},
            {"prompt_token_ids": ids},
            {"messages": messages},
        ],
    )
    params = SamplingParams(max_tokens=8)
    expected = tiny_llm.generate([both, [5, 6, 7], ids], params) + tiny_llm.chat(messages, params)
    assert [r["token_ids"] for r in written] == [list(r.outputs[0].token_ids) for r in expected]


def test_without_a_guide_the_base_writes(tiny_pair: Pair, tiny_llm: LLM) -> None:
    alone = {"base": tiny_pair["base"]}
    [record] = generate(alone, "--prompt", "Hello", "--max-tokens", 9)
    expected = tiny_llm.generate("Hello", SamplingParams(max_tokens=9), Base())[0].outputs[0]
    assert record["token_ids"] == list(expected.token_ids)


def test_several_texts_of_a_prompt_are_numbered(tiny_pair: Pair, tiny_llm: LLM) -> None:
    flags = ("--n", 3, "--temperature", 1, "--seed", 2, "--max-tokens", 6)
    written = generate(
        tiny_pair, *flags, lines=[{"prompt": "Hello"}, {"prompt": ""}, {"prompt": "Sure,"}], status=1
    )
    numbers = [(r["index"], r.get("sample")) for r in written]
    assert numbers == [(0, 0), (0, 1), (0, 2), (1, None), (2, 0), (2, 1), (2, 2)]
    params = SamplingParams(max_tokens=6, temperature=1.0, seed=2, n=3)
    expected = tiny_llm.generate("Hello", params)[0].outputs
    assert [r["token_ids"] for r in written[:3]] == [list(o.token_ids) for o in expected]


def test_logprobs_come_when_asked_for(tiny_pair: Pair) -> None:
    [record] = generate(tiny_pair, "--prompt", "Hello", "--logprobs", 2, "--max-tokens", 5, "--ignore-eos")
    assert len(record["logprobs"]) == 5
    for token, one in zip(record["token_ids"], record["logprobs"], strict=True):
        assert one["token"] == token
        assert one["logprob"] <= 0
        assert len(one["top"]) == 2


def test_stops_end_a_text(tiny_pair: Pair) -> None:
    flags = ("--prompt", "Hello", "--max-tokens", 12, "--ignore-eos", "--policy", "base")
    [free] = generate(tiny_pair, *flags)
    [stopped] = generate(tiny_pair, *flags, "--stop-token-id", free["token_ids"][4])
    first = free["token_ids"].index(free["token_ids"][4])
    assert (stopped["token_ids"], stopped["finish_reason"]) == (free["token_ids"][:first], "stop")


def test_a_checkpoint_without_a_tokenizer_works_with_ids(
    tiny_pair: Pair, tiny_llm: LLM, tmp_path: Path
) -> None:
    bare = {}
    for role, path in tiny_pair.items():
        bare[role] = tmp_path / role
        shutil.copytree(path, bare[role], ignore=shutil.ignore_patterns("token*", "special*"))
    flags = ("--granularity", "token", "--max-tokens", 8)
    ids, text = generate(bare, *flags, lines=[{"prompt_token_ids": [5, 6]}, {"prompt": "Hello"}], status=1)
    expected = tiny_llm.generate([5, 6], SamplingParams(max_tokens=8), Nudging(granularity="token"))[
        0
    ].outputs[0]
    assert ids["token_ids"] == list(expected.token_ids)
    assert ids["text"] is None
    assert {segment["text"] for segment in ids["segments"]} == {None}
    assert "no tokenizer" in text["error"]["message"]


def test_output_goes_to_a_file_line_by_line(tiny_pair: Pair, tmp_path: Path) -> None:
    lines = tmp_path / "in.jsonl"
    lines.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS))
    out = tmp_path / "out.jsonl"
    assert generate(tiny_pair, "--input", lines, "--output", out, "--max-tokens", 4) == []
    assert [json.loads(line)["index"] for line in out.read_text().splitlines()] == [0, 1, 2, 3]


# --- generate: what goes wrong

BAD_LINES = {
    "nope": "not JSON",
    '{"prompt": "half': "not JSON",
    "[" * 100_000: "not JSON",
    "[1]": "a list",
    "7": "a number",
    "{}": "no key",
    '{"prompt": "a", "messages": []}': "exactly one",
    '{"promt": "a"}': "did you mean 'prompt'",
    '{"prompt": "a", "max_tokens": 3}': "no option 'max_tokens'",
    '{"prompt": ["a"]}': "must be text",
    '{"prompt": 5}': "must be text",
    '{"prompt": null}': "must be text",
    '{"prompt": {"base": "a", "guide": 5}}': "prompt['guide'] is a number",
    '{"prompt": {"base": "a"}}': "'guide'",
    '{"prompt": {"base": "a", "guide": "b", "gide": "c"}}': "did you mean 'guide'",
    '{"prompt": ""}': "empty",
    '{"prompt_token_ids": "a"}': "must be a list",
    '{"prompt_token_ids": []}': "empty",
    '{"prompt_token_ids": [1.5]}': "1.5",
    '{"prompt_token_ids": [true]}': "True",
    '{"prompt_token_ids": [-1]}': "-1",
    '{"prompt_token_ids": [320]}': "from 0 to 319",
    '{"messages": []}': "at least one message",
    '{"messages": "a"}': "must be a list",
    '{"messages": [{"role": "user"}]}': "content",
    '{"messages": [{"role": "nobody", "content": "a"}]}': "nobody",
    json.dumps({"prompt_token_ids": [5] * 600}): "600",
}


def test_a_bad_line_is_its_own_error_and_the_others_go_on(tiny_pair: Pair) -> None:
    lines = [line for bad in BAD_LINES for line in (bad, '{"prompt": "Hello"}')]
    written = generate(tiny_pair, "--max-tokens", 3, lines=lines, status=1)
    assert [r["index"] for r in written] == list(range(len(lines)))
    for record, words in zip(written[::2], BAD_LINES.values(), strict=True):
        assert list(record) == ["index", "error"]
        assert record["error"]["type"] == "BadRequest"
        assert words in record["error"]["message"]
    assert len({json.dumps(r["token_ids"]) for r in written[1::2]}) == 1


def test_a_line_has_its_own_priority_and_timeout(tiny_pair: Pair) -> None:
    ids = [60, 61, 62]
    lines = [
        {"prompt_token_ids": ids, "priority": 1, "timeout": 60},
        {"prompt_token_ids": ids, "timeout": 0.02},
        {"prompt_token_ids": ids, "timeout": "soon"},
    ]
    records = generate(tiny_pair, "--max-tokens", 400, "--ignore-eos", lines=lines, status=1)
    assert len(records[0]["token_ids"]) == 400
    assert records[1]["error"]["type"] == "DeadlineExceeded"
    assert records[2]["error"]["message"].startswith("timeout is 'soon'")


def test_a_line_that_is_not_utf8_is_an_error(tiny_pair: Pair) -> None:
    result = run("generate", "--base", tiny_pair["base"], "--input", "-", stdin=b'{"prompt": "\xff"}\n')
    assert result.exit_code == 1
    assert "utf-8" in json.loads(result.stdout)["error"]["message"]


def test_a_prompt_that_the_memory_cannot_hold_is_an_error(tiny_pair: Pair) -> None:
    long = {"prompt_token_ids": [5] * 400}
    small = ("--kv-cache-memory", "96KiB", "--max-tokens", 4)
    short, refused = generate(tiny_pair, *small, lines=[{"prompt": "Hello"}, long], status=1)
    assert len(short["token_ids"]) == 4
    assert "kv_cache_memory" in refused["error"]["message"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--threshold", "nan"), "threshold is nan"),
        (("--threshold", "7"), "threshold is 7"),
        (("--threshold", "x"), "'x' is not a valid float"),
        (("--granularity", "line"), "granularity is 'line'"),
        (("--comparator", ">"), "comparator is '>'"),
        (("--policy", "both"), "'both' is not one of"),
        (("--max-tokens", "0"), "max_tokens is 0"),
        (("--temperature", "-1"), "temperature is -1"),
        (("--top-p", "0"), "top_p is 0"),
        (("--top-k", "-1"), "top_k is -1"),
        (("--min-p", "2"), "min_p is 2"),
        (("--seed", "-1"), "seed is -1"),
        (("--n", "0"), "n is 0"),
        (("--logprobs", "1000"), "logprobs is 1000"),
        (("--prompt-logprobs", "1000"), "prompt_logprobs is 1000"),
        (("--min-tokens", "17"), "min_tokens is 17; it must be a whole number from 0 to 16"),
        (("--presence-penalty", "3"), "presence_penalty is 3"),
        (("--repetition-penalty", "0"), "repetition_penalty is 0"),
        (("--bad-word", ""), "bad_words is"),
        (("--allowed-token-id", "320"), "allowed_token_ids names token 320"),
        (("--logit-bias", "5"), "--logit-bias is '5'; give ID=BIAS"),
        (("--max-tokens", "many"), "'many' is not a valid integer"),
        (("--revision", "main"), "no checkpoint comes from the hub"),
        (("--stop", ""), "stop is"),
        (("--stop-token-id", "320"), "ids go from 0 to 319"),
        (("--speculate", "-1"), "speculate is '-1'"),
        (("--speculate", "many"), "speculate is 'many'"),
        (("--drafter", "oracle"), "drafter is 'oracle'"),
        (("--dtype", "int8"), "dtype is 'int8'"),
        (("--device", "tpu"), "device is 'tpu'"),
        (("--kv-cache-memory", "much"), "kv_cache_memory is 'much'"),
        (("--kv-cache-memory", "1KiB"), "at least"),
        (("--base", "/nowhere"), "'/nowhere'"),
        (("--output", "/nowhere/out.jsonl"), "not a directory"),
        (("--input", "/nowhere"), "does not exist"),
        (("--input", "-"), "both"),
        (("--threshhold", "1"), "--threshold"),
    ],
)
def test_a_bad_flag_ends_with_a_message_and_status_2(
    tiny_pair: Pair, flags: tuple[str, str], words: str
) -> None:
    roles = [f for role, path in tiny_pair.items() for f in (f"--{role}", path)]
    result = run("generate", *roles, "--prompt", "Hello", *flags)
    assert result.exit_code == 2, result.output
    assert words in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--prompt", "a"), "--base"),
        (("--base", "BASE"), "neither"),
        (("--base", "BASE", "--prompt", "a", "--policy", "nudging"), "needs a guide"),
        (("--base", "BASE", "--prompt", "a", "--policy", "guide"), "needs a guide"),
    ],
)
def test_a_missing_flag_ends_with_a_message_and_status_2(
    tiny_pair: Pair, flags: tuple[str, ...], words: str
) -> None:
    result = run("generate", *(tiny_pair["base"] if flag == "BASE" else flag for flag in flags))
    assert result.exit_code == 2
    assert words in result.stderr


def test_the_module_and_a_pipe_work_as_the_console_script(tiny_pair: Pair) -> None:
    roles = [f for role, path in tiny_pair.items() for f in (f"--{role}", str(path))]
    done = subprocess.run(
        [*NUDGING, "generate", *roles, "--input", "-", "--max-tokens", "3", "--progress"],
        input=b'{"prompt": "Hello"}\n',
        capture_output=True,
        check=True,
    )
    assert len(json.loads(done.stdout)["token_ids"]) <= 3
    assert b"tokens/s" in done.stderr


# --- chat, info, demo


def chat(pair: Pair, *arguments: object, stdin: str | None = None) -> Result:
    roles = [f for role, path in pair.items() for f in (f"--{role}", path)]
    return run("chat", *roles, "--kv-cache-memory", "4MiB", "--max-tokens", 12, *arguments, stdin=stdin)


def test_one_message_is_answered_with_the_guide_in_brackets(tiny_pair: Pair, tiny_llm: LLM) -> None:
    result = chat(tiny_pair, "--message", "How many apples?", "--granularity", "token")
    assert result.exit_code == 0, result.output
    output = tiny_llm.chat(
        [{"role": "user", "content": "How many apples?"}],
        SamplingParams(max_tokens=12),
        Nudging(granularity="token"),
    )[0].outputs[0]
    assert {"base", "guide"} <= set(output.authors), "this pair does not show both authors"
    assert result.stdout.count("[") >= 1
    printable = {c for c in (output.text or "") if c.isprintable() and c not in "[] "}
    assert printable <= set(result.stdout)


def test_a_talk_remembers_until_it_is_reset(tiny_pair: Pair, tiny_llm: LLM) -> None:
    result = chat(tiny_pair, stdin="Hi\nHi\n/reset\nHi\n/nonsense\n\n/quit\nHi\n")
    assert result.exit_code == 0, result.output
    assert "there is no /nonsense" in result.stdout
    hi = {"role": "user", "content": "Hi"}
    params = SamplingParams(max_tokens=12)
    first = tiny_llm.chat([hi], params)[0].outputs[0]
    second = tiny_llm.chat([hi, {"role": "assistant", "content": first.text}, hi], params)[0].outputs[0]
    shown = re.findall(r"\((\d+) tokens, .* (\d+%) by the guide\)", result.stdout)
    assert shown == [(str(o.stats.tokens), f"{o.stats.nudge_rate:.0%}") for o in (first, second, first)]
    assert first.token_ids != second.token_ids


def test_a_message_that_is_too_long_does_not_end_the_talk(tiny_pair: Pair) -> None:
    result = chat(tiny_pair, stdin=f"{'x' * 3000}\nHi\n")
    assert result.exit_code == 0, result.output
    assert "/reset" in result.stdout
    assert len(re.findall(r"by the guide\)", result.stdout)) == 1


def test_info_names_versions_and_describes_a_checkpoint(tiny_pair: Pair) -> None:
    import torch

    system = run("info")
    assert system.exit_code == 0, system.output
    assert torch.__version__ in system.stdout
    about = run("info", "--base", tiny_pair["guide"])
    facts = {line[:14].strip(): line[14:].strip() for line in about.stdout.splitlines()}
    assert facts["family"] == "qwen3"
    assert facts["context"] == "512 tokens"
    # 2 x 2 layers x 2 heads x 16 channels x 4 bytes.
    assert facts["kv cache"].startswith("512 bytes a token")
    assert "parameters" in facts["weights"]
    missing = run("info", "--base", "/nowhere")
    assert (missing.exit_code, missing.stdout) == (2, "")


def test_bench_pair_passes_its_flags_on() -> None:
    done = subprocess.run([*NUDGING, "bench", "pair", "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--base-shape" in done.stdout
