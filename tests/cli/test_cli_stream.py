"""`nudging generate` as a filter: lines stream through it in order, cut off and taken up anywhere."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from nudging import LLM, BadRequest, SamplingParams
from nudging.cli import input as cli_input
from nudging.cli import stream as cli_stream
from nudging.cli.input import BOM, read_line, read_lines, split_lines
from nudging.cli.main import main
from nudging.cli.progress import Meter
from nudging.cli.signals import Interrupted, Signals
from nudging.cli.stream import Stream
from tests.support.waiting import PATIENCE, wait_until

Pair = dict[str, Path]
NUDGING = [sys.executable, "-m", "nudging"]
PARAMS = SamplingParams()


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("NUDGING_")]:
        monkeypatch.delenv(name)


def flags(pair: Pair, *more: object) -> list[str]:
    roles = [flag for role, path in pair.items() for flag in (f"--{role}", path)]
    return ["generate", *map(str, (*roles, "--kv-cache-memory", "4MiB", "--max-tokens", 4, *more))]


def run(pair: Pair, *more: object, stdin: bytes = b"", status: int = 0) -> Result:
    result = CliRunner().invoke(main, flags(pair, *more), input=stdin)
    assert result.exit_code == status, result.output
    return result


def records(pair: Pair, stdin: bytes, *more: object, status: int = 0) -> list[Any]:
    result = run(pair, "--input", "-", *more, stdin=stdin, status=status)
    return [json.loads(line) for line in result.stdout.splitlines()]


def jsonl(*lines: object) -> bytes:
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


# --- What lines ask for


HELLO = b'{"prompt": "Hello"}'


@pytest.mark.parametrize(
    "data",
    [
        BOM + HELLO + b"\n" + HELLO,
        HELLO + b"\r\n\r\n" + HELLO + b"\r\n",
        b"\n\n  \n" + HELLO + b"\n\t\n\n" + HELLO + b"\n\n",
        HELLO + b"\n" + BOM + HELLO,
    ],
)
def test_marks_and_blank_lines_are_no_lines(tiny_pair: Pair, data: bytes) -> None:
    written = records(tiny_pair, data)
    assert [record["index"] for record in written] == [0, 1]
    assert written[0]["token_ids"] == written[1]["token_ids"]


@pytest.mark.parametrize("size", [1, 2, 7, 1 << 16])
def test_lines_are_the_same_however_they_come(size: int) -> None:
    rng = random.Random(size)
    data = bytes(rng.choices(b"ab\n\r \x00", k=2000))
    rest = [data]

    def read(most: int) -> bytes:
        found, rest[0] = rest[0][: min(size, most)], rest[0][min(size, most) :]
        return found

    assert list(split_lines(read)) == data.split(b"\n")


def test_a_line_without_end_takes_no_memory_and_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_input, "LINE_LIMIT", 1000)
    monkeypatch.setattr(cli_input, "CHUNK", 100)
    sizes = iter([100] * 5000)

    class Endless:
        def read(self, most: int) -> bytes:
            return b"x" * min(next(sizes, 0), most)

    [line] = read_lines(Endless())  # type: ignore[arg-type]
    assert 1000 < len(line) <= 1200
    with pytest.raises(BadRequest, match="more than 1000 bytes"):
        read_line(line, PARAMS)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"prompt": NaN}', "NaN is no JSON number"),
        (b'{"prompt": "a", "timeout": -Infinity}', "-Infinity is no JSON number"),
        (b'{"prompt": "a", "timeout": 1e999}', "not JSON|timeout"),
        (b'{"prompt": "a", "prompt": "b"}', "'prompt' is there twice"),
        (b"\x00", "not JSON"),
        (b'"Hello"', "the line is text"),
        (b"null", "the line is null"),
        (b'[{"prompt": "a"}]', "the line is a list"),
        (b'{"prompt": "a", "id": 1.5}', "id is a number"),
        (b'{"prompt": "a", "id": true}', "id is true or false"),
        (b'{"prompt": "a", "sampling": []}', "sampling is a list"),
        (b'{"prompt": "a", "sampling": {"top_q": 1}}', "no option 'top_q'.*did you mean"),
        (b'{"prompt": "a", "sampling": {"max_tokens": 0}}', "max_tokens is 0"),
        (b'{"prompt": "a", "sampling": {"stop": 5}}', "stop is 5"),
        (b'{"prompt": "a", "sampling": {"temperature": 1e999}}', "temperature is inf"),
        (b'{"prompt": "a", "sampling": {"logit_bias": {"x": 1}}}', "'x'"),
        (b'{"prompt": "a", "sampling": {"logit_bias": [1]}}', "logit_bias is"),
        (b'{"prompt": "a", "sampling": {"n": 1000}}', "n is 1000"),
    ],
)
def test_a_bad_line_says_what_is_wrong(tiny_pair: Pair, line: bytes, words: str) -> None:
    import re

    [error] = records(tiny_pair, line, status=1)
    assert list(error) == ["index", "error"]
    assert error["error"]["type"] == "BadRequest"
    assert re.search(words, error["error"]["message"]), error


def test_an_id_comes_back_with_texts_and_errors(tiny_pair: Pair) -> None:
    lines = [
        {"id": "a", "prompt": "Hi"},
        {"id": 7, "prompt": ""},
        {"prompt": "Hi"},
        {"id": "a", "promt": "b"},
    ]
    written = records(tiny_pair, jsonl(*lines), status=1)
    assert [list(record)[:3] for record in written] == [
        ["index", "id", "text"],
        ["index", "id", "error"],
        ["index", "text", "token_ids"],
        ["index", "id", "error"],
    ]
    assert [record.get("id") for record in written] == ["a", 7, None, "a"]


def test_a_line_has_sampling_of_its_own(tiny_pair: Pair, tiny_llm: LLM) -> None:
    own = {"max_tokens": 6, "temperature": 0.9, "seed": 5, "stop": ["zq"], "logit_bias": {"7": 2.5}, "n": 2}
    lines = [
        {"prompt": "Hi", "sampling": own},
        {"prompt": "Hi"},
        {"prompt": "Hi", "sampling": {"seed": None}},
    ]
    written = records(tiny_pair, jsonl(*lines), "--temperature", 0.5, "--seed", 3)
    assert [(record["index"], record.get("sample")) for record in written] == [
        (0, 0), (0, 1), (1, None), (2, None),
    ]  # fmt: skip
    params = SamplingParams(6, temperature=0.9, seed=5, stop="zq", logit_bias={7: 2.5}, n=2)
    flagged = SamplingParams(4, temperature=0.5, seed=3)
    expected = [*tiny_llm.generate("Hi", params)[0].outputs, *tiny_llm.generate("Hi", flagged)[0].outputs * 2]
    assert [record["token_ids"] for record in written] == [list(output.token_ids) for output in expected]


def test_text_is_the_texts_alone(tiny_pair: Pair, tiny_llm: LLM) -> None:
    lines = jsonl({"prompt": "Hi"}, {}, {"prompt": "Où"})
    result = run(tiny_pair, "--format", "text", "--input", "-", stdin=lines, status=1)
    params = SamplingParams(max_tokens=4)
    texts = [tiny_llm.generate(prompt, params)[0].outputs[0].text or "" for prompt in ("Hi", "Où")]
    assert result.stdout_bytes.decode() == f"{texts[0]}\n\n{texts[1]}\n"
    assert result.stderr.startswith("line 2: BadRequest: the line has no key")


# --- What files may be


def test_no_file_is_written_over_another_one(tiny_pair: Pair, tmp_path: Path) -> None:
    lines, other = tmp_path / "in.jsonl", tmp_path / "other"
    lines.write_bytes(jsonl({"prompt": "Hi"}))
    os.link(lines, other)
    for more in (
        ("--input", lines, "--output", lines),
        ("--input", lines, "--output", other),
        ("--input", lines, "--output", other, "--resume"),
        ("--input", lines, "--output", tmp_path / "new", "--trace", lines),
    ):
        result = run(tiny_pair, *more, status=2)
        assert "overwrite" in result.stderr, more
    assert lines.read_bytes() == jsonl({"prompt": "Hi"})


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--input", "."), "directory"),
        (("--prompt", "a", "--output", "."), "directory"),
        (("--prompt", "a", "--resume"), "--output FILE"),
        (("--prompt", "a", "--resume", "--output", "out", "--format", "text"), "--format jsonl"),
        (("--prompt", "a", "--format", "xml"), "'xml' is not one of"),
    ],
)
def test_what_cannot_be_written_is_said_before_anything_is_loaded(
    tiny_pair: Pair, more: tuple[str, ...], words: str
) -> None:
    result = run(tiny_pair, *more, "--base", "/nowhere", status=2)
    assert words in result.stderr
    assert "nowhere" not in result.stderr


# --- Resuming


LINES = jsonl(
    {"id": "a", "prompt": "Hello"},
    {"prompt": ""},
    {"prompt": "Where is", "sampling": {"n": 3}},
    {"id": 4, "prompt": "Sure,"},
)


def without_times(data: bytes) -> list[Any]:
    found = [json.loads(line) for line in data.splitlines()]
    return [{key: value for key, value in record.items() if key != "stats"} for record in found]


@pytest.fixture(scope="module")
def whole(tiny_pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """An input, and its whole output."""
    folder = tmp_path_factory.mktemp("resume")
    (folder / "in.jsonl").write_bytes(LINES)
    run(tiny_pair, "--input", folder / "in.jsonl", "--output", folder / "out.jsonl", status=1)
    return folder / "in.jsonl", (folder / "out.jsonl").read_bytes()


@pytest.mark.parametrize("cut", ["nothing", "key", "half", "lines", "samples", "all samples", "all"])
def test_a_run_is_taken_up_wherever_it_ended(
    tiny_pair: Pair, whole: tuple[Path, bytes], tmp_path: Path, cut: str
) -> None:
    source, data = whole
    lines = data.splitlines(keepends=True)
    kept = {
        "nothing": (b"", 0),
        "key": (data[:5], 0),
        "half": (data[: len(lines[0]) + 20], 1),
        "lines": (b"".join(lines[:2]), 2),
        "samples": (b"".join(lines[:4]), 2),
        "all samples": (b"".join(lines[:5]), 2),
        "all": (data, 4),
    }[cut]
    out = tmp_path / "out.jsonl"
    out.write_bytes(kept[0])
    result = run(tiny_pair, "--input", source, "--output", out, "--resume", status=1)
    assert f"{kept[1]} lines are answered" in result.stderr
    assert without_times(out.read_bytes()) == without_times(data)
    whole_lines = kept[0][: kept[0].rfind(b"\n") + 1] if cut not in ("samples", "all samples") else lines[0]
    assert out.read_bytes().startswith(whole_lines), "what was there stays"


def test_an_output_that_is_not_there_is_begun(
    tiny_pair: Pair, whole: tuple[Path, bytes], tmp_path: Path
) -> None:
    run(tiny_pair, "--input", whole[0], "--output", tmp_path / "new", "--resume", status=1)
    assert without_times((tmp_path / "new").read_bytes()) == without_times(whole[1])


@pytest.mark.parametrize(
    ("there", "asked", "words"),
    [
        (b"my notes\n", LINES, "line 1 .* is not what generate would have written"),
        (b"my notes", LINES, "line 1 .* is not what generate would have written"),
        (b'{"index": 1, "text": ""}\n', LINES, "line 1 .* is not what"),
        (b'{"index": 0, "id": "a"}\n{"index": 2}\n', LINES, "line 2 .* is not what"),
        (b'{"index": 0, "id": "b"}\n', LINES, "has the id 'a' and its answer in --output has 'b'"),
        (b'{"index": 0}\n', LINES, "has the id 'a' and its answer in --output has None"),
        (
            b'{"index": 0, "id": "a"}\n{"index": 1}\n',
            jsonl({"id": "a", "prompt": "b"}),
            "2 lines .* input has 1",
        ),
        (b'{"index": 0, "text": ""}\n', b"nonsense\n", "asks for nothing that could be answered"),
    ],
)
def test_an_output_of_something_else_is_left_alone(
    tiny_pair: Pair, tmp_path: Path, there: bytes, asked: bytes, words: str
) -> None:
    import re

    out = tmp_path / "out"
    out.write_bytes(there)
    result = run(tiny_pair, "--input", "-", "--output", out, "--resume", stdin=asked, status=2)
    assert re.search(words, result.stderr), result.stderr
    assert out.read_bytes() == there


# --- The stream itself


class Texts:
    """An engine whose texts end when they are told to, and a writer that keeps what it is given."""

    def __init__(self) -> None:
        self.open: dict[int, FakeHandle] = {}
        self.begun = 0
        self.most = 0
        self.written: list[int] = []
        self.failed = 0

    def submit(self, ask: Any) -> Any:
        self.open[self.begun] = handle = FakeHandle(self.begun)
        self.begun += 1
        self.most = max(self.most, len(self.open))
        return handle

    def write(self, index: int, own_id: object, result: Any) -> None:
        assert result == index
        self.written.append(index)

    def end(self, index: int) -> None:
        self.open.pop(index).end()


class FakeHandle:
    num_outputs = 1

    def __init__(self, index: int) -> None:
        self.index = index
        self.is_finished = False
        self.listeners: list[Callable[[], None]] = []

    def add_listener(self, listener: Callable[[], None]) -> None:
        self.listeners.append(listener)
        listener()

    def end(self) -> None:
        self.is_finished = True
        for listener in self.listeners:
            listener()

    def result(self) -> int:
        return self.index


class Steered(Stream):
    """A stream of which nothing happens but what `steps` yields; reading is done in between."""

    def __init__(self, lines: Iterator[bytes], texts: Texts) -> None:
        super().__init__(lines, PARAMS, texts.submit, texts, Meter(shown=False))  # type: ignore[arg-type]

    def _next_event(self) -> Callable[[], None]:
        if self._events.empty() and not self.is_waiting():
            self.idle()
        return super()._next_event()

    def is_waiting(self) -> bool:
        """Whether the reader may still bring a line."""
        return not self._all_read and self._allowed > self._begun

    def idle(self) -> None:
        raise NotImplementedError


def test_few_are_under_way_at_once_and_all_come_out_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_stream, "WINDOW", 40)
    rng, texts = random.Random(1), Texts()

    class Random(Steered):
        def idle(self) -> None:
            texts.end(rng.choice(list(texts.open)))

    Random(iter([HELLO] * 1000), texts).run()
    assert texts.written == list(range(1000))
    assert texts.most == 40


def test_the_first_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    texts, under_way = Texts(), []

    class Ordered(Steered):
        def idle(self) -> None:
            under_way.append(len(texts.open))
            texts.end(min(texts.open))

    Ordered(iter([HELLO] * 600), texts).run()
    assert under_way[0] == cli_stream.FIRST
    assert max(under_way) == cli_stream.WINDOW


def test_behind_one_that_takes_long_so_many_are_held_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_stream, "HELD", 300)
    texts, begun_at = Texts(), []

    class OneIsLong(Steered):
        def idle(self) -> None:
            others = [index for index in texts.open if index]
            if not others and not begun_at:
                begun_at.append(texts.begun)
                assert texts.written == []
            texts.end(others[-1] if others else 0)

    OneIsLong(iter([HELLO] * 1000), texts).run()
    assert begun_at == [300]
    assert texts.written == list(range(1000))


def test_what_reading_raises_is_raised_behind_what_was_read() -> None:
    texts = Texts()

    def lines() -> Iterator[bytes]:
        yield HELLO
        raise OSError("the disk is gone")

    class Ordered(Steered):
        def idle(self) -> None:
            texts.end(min(texts.open))

    with pytest.raises(OSError, match="the disk is gone"):
        Ordered(lines(), texts).run()
    assert texts.begun == 1


# --- Signals


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Interrupts arrive, here and in child processes, even where the tests were started in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_signal_is_heard_and_the_second_one_raises(number: signal.Signals) -> None:
    before, heard = signal.getsignal(number), []
    with Signals(heard.append):
        signal.raise_signal(number)
        assert heard == [number]
        with pytest.raises(Interrupted) as raised:
            signal.raise_signal(number)
    assert raised.value.status == 128 + number
    assert signal.getsignal(number) is before


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Signals(lambda number: pytest.fail("it was heard")):
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_no_handlers_are_set_on_another_thread() -> None:
    def enter() -> None:
        with Signals(lambda number: None):
            entered.append(signal.getsignal(signal.SIGTERM))

    entered: list[object] = []
    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert entered == [signal.getsignal(signal.SIGTERM)]


@pytest.mark.usefixtures("interruptible")
def test_texts_come_while_the_input_is_open_and_a_signal_leaves_those_that_ended(tiny_pair: Pair) -> None:
    process = subprocess.Popen(
        [*NUDGING, *flags(tiny_pair, "--input", "-")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    for index in range(3):
        process.stdin.write(HELLO + b"\n")
        process.stdin.flush()
        assert json.loads(process.stdout.readline())["index"] == index
    process.send_signal(signal.SIGINT)
    # It waits for a line that never comes, and still ends.
    assert process.wait(timeout=PATIENCE) == 130
    rest, stderr = process.communicate()
    assert rest == b""
    assert stderr == b"\nSIGINT: 3 lines are answered\n"


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_run_that_a_signal_ends_leaves_whole_lines_and_is_taken_up(
    tiny_pair: Pair, tmp_path: Path, number: signal.Signals, status: int
) -> None:
    lines, out = tmp_path / "in.jsonl", tmp_path / "out"
    asked = [{"id": i, "prompt": "Hello"} for i in range(60)]
    lines.write_bytes(jsonl(*asked))
    process = subprocess.Popen(
        [*NUDGING, *flags(tiny_pair, "--input", "-", "--output", out)],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdin is not None
    # The last texts take long, and the input never ends.
    long = {"max_tokens": 400, "ignore_eos": True}
    process.stdin.write(jsonl(*asked[:9], *({**one, "sampling": long} for one in asked[9:])))
    process.stdin.flush()
    wait_until(lambda: process.poll() is not None or (out.exists() and out.stat().st_size))
    assert process.poll() is None, "it ended by itself"
    process.send_signal(number)
    assert process.wait(timeout=PATIENCE) == status
    stderr = process.communicate()[1].decode()
    data = out.read_bytes()
    indices = [json.loads(line)["index"] for line in data.splitlines()]
    assert data.endswith(b"}\n")
    assert indices == list(range(len(indices)))
    assert stderr == f"\n{number.name}: {len(indices)} lines are answered; --resume goes on behind them\n"
    run(tiny_pair, "--input", lines, "--output", out, "--resume")
    assert out.read_bytes().startswith(data)
    assert [json.loads(line)["id"] for line in out.read_bytes().splitlines()] == list(range(60))


# --- Readers that go away


def shell(script: str, *arguments: str, **options: Any) -> "subprocess.CompletedProcess[bytes]":
    command = ["bash", "-c", script, "bash", *NUDGING, *arguments]
    return subprocess.run(command, capture_output=True, check=False, timeout=PATIENCE, **options)


@pytest.mark.parametrize("word", ["generate", "info", "chat", "demo", "help"])
def test_a_reader_that_goes_away_ends_it_quietly(tiny_pair: Pair, word: str) -> None:
    arguments = {
        "generate": flags(tiny_pair, "--input", "-"),
        "info": ["info"],
        "chat": ["chat", "--base", str(tiny_pair["base"]), "--max-tokens", "2"],
        "demo": ["demo", "--questions", "2"],
        "help": ["--help"],
    }[word]
    lines = HELLO + b"\n"
    # It begins once the reader is gone.
    script = 'exec 3> >(true); wait $!; "$@" >&3; echo "$?"'
    done = shell(script, *arguments, input=lines * 20)
    assert done.stderr == b""
    assert done.stdout == b"141\n"


@pytest.mark.parametrize(
    ("script", "status", "words"),
    [
        ('"$@" >&-', 2, b"standard output is closed"),
        ('"$@" <&-', 2, b"standard input is closed"),
        ('"$@" > /dev/full', 1, b"No space left"),
    ],
)
def test_a_stream_that_is_not_there_is_said(tiny_pair: Pair, script: str, status: int, words: bytes) -> None:
    done = shell(script, *flags(tiny_pair, "--input", "-"), input=HELLO)
    assert done.returncode == status, done.stderr
    assert words in done.stderr
    assert b"Traceback" not in done.stderr
    assert b"Exception ignored" not in done.stderr


def test_help_that_cannot_be_written_is_a_failure_and_no_traceback() -> None:
    done = shell('"$@" > /dev/full', "--help")
    assert (done.returncode, done.stderr) == (1, b"Error: [Errno 28] No space left on device\n")


# --- chat


def test_a_talk_takes_any_bytes_and_any_ends_of_lines(tiny_pair: Pair) -> None:
    lines = b"Hi \xff there\r\n\x00\r\n" + b"Hello\r\n/quit\r\n"
    arguments = ["chat", "--base", str(tiny_pair["base"]), "--kv-cache-memory", "4MiB", "--max-tokens", "2"]
    done = subprocess.run(
        [*NUDGING, *arguments], input=lines, capture_output=True, check=False, timeout=PATIENCE
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.count(b" by the guide)") == 3


def test_a_talk_without_an_input_is_refused_before_anything_is_loaded() -> None:
    done = shell('"$@" <&-', "chat", "--base", "/nowhere")
    assert (done.returncode, done.stderr) == (2, b"Error: standard input is closed; give --message\n")


def test_characters_that_the_output_does_not_have_are_replaced(tiny_pair: Pair) -> None:
    arguments = ["chat", "--base", str(tiny_pair["base"])]
    result = CliRunner(charset="ascii").invoke(main, arguments, input=b"/\xc3\xa9\n")
    assert result.exit_code == 0, result.output
    assert "there is no /??" in result.stdout


def test_the_form_of_conversations_is_a_flag(tiny_pair: Pair, tiny_llm: LLM, tmp_path: Path) -> None:
    template = "{% for message in messages %}<{{ message.content }}>{% endfor %}"
    short = "{{ messages[0].role }}"
    (tmp_path / "form.jinja").write_text(template)
    messages = [{"role": "user", "content": "Hello"}]
    lines = jsonl({"messages": messages}, {"messages": messages, "chat_template": short})
    own, other = records(tiny_pair, lines, "--chat-template", tmp_path / "form.jinja")
    params = SamplingParams(max_tokens=4)
    expected = [tiny_llm.chat(messages, params, chat_template=one)[0].outputs[0] for one in (template, short)]
    assert [own["token_ids"], other["token_ids"]] == [list(output.token_ids) for output in expected]
