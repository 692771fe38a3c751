"""A server without models, threads and time: the whole host half over a cheap pure function of the prefix.

The fake model is a recurrence through a paged cache, as a real one is: the state of a slot is made of the
state in the slot before it, found through the block table, and of the token it is fed.  A wrong slot, a stale
copy or a block that two tables write is noticed where it is read or written, or gives a row that the
straight-line oracle does not have.
"""

import struct
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple, TypeVar
from zlib import crc32

import torch

from nudging import LLM, Base, Guide, Nudging, SamplingParams
from nudging.api.handle import Mailbox
from nudging.api.jobs import Jobs
from nudging.core.block_pool import BlockPool
from nudging.core.engine import Engine
from nudging.core.engine_loop import Command, EngineLoop, Submission
from nudging.core.engine_thread import EngineThread
from nudging.core.fast_path import FastPath
from nudging.core.prefix_cache import Prefix
from nudging.core.request import Request
from nudging.core.rows import Row, Rows, TokenLogprob
from nudging.core.wanted import Wanted
from nudging.core.work import Work
from nudging.errors import BadRequest, NumericalError, OutOfBlocks
from nudging.executor.model_runner import ModelRunner, by_work
from nudging.executor.sampler import logprob_of, pick_token, wanted_by
from nudging.policies.forced import Forced
from nudging.policies.protocol import Policy
from nudging.text.chat_template import plain_chat_template
from nudging.text.roles import Role
from nudging.text.tokenizer import Tokenizer
from tests.support import oracle
from tests.support.pairs import as_oracle_params, whole_characters

T = TypeVar("T")

MASK = 2**32 - 1
BYTES = [bytes((token,)) for token in range(256)]
# 0.25 and 0.4 are thresholds, too: ties occur.
TOP_PROBS = (0.1, 0.2, 0.25, 0.3, 0.4, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.97, 0.98, 0.99)
UNWRITTEN = 255
PIECES = (" a", " b", " c", " the", " of", "an", "on", "er", "in", "é", "12", ". ", *"abcdefhinorft 12.,?!")
TABLE = [b"", b"", *(piece.encode() for piece in PIECES), b"\xc3", b"\xa9", b"\xef\xbf\xbd"]
VOCAB = len(TABLE)


class SimTokenizer(Tokenizer):
    """Longest match over a small table; ids 0 and 1 are special."""

    def __init__(self) -> None:
        super().__init__(
            TABLE,
            (0, 1),
            bos_id=None,
            eos_id=0,
            drops_first_space=False,
            rules=("longest", "sim"),
            special_texts={0: "<end>", 1: "<the>"},
        )
        self._by_length = sorted(range(2, VOCAB), key=lambda token: -len(TABLE[token]))

    def _encode(self, text: str, special: bool) -> list[int]:
        return self._cut(text)

    def _cut(self, text: str) -> list[int]:
        data, at, ids = text.encode(), 0, []
        while at < len(data):
            token = next(token for token in self._by_length if data.startswith(TABLE[token], at))
            ids.append(token)
            at += len(TABLE[token])
        return ids


TOKENIZER = SimTokenizer()
TEMPLATE = plain_chat_template()
EOS = {"base": frozenset({0}), "guide": frozenset({0, 1})}


def state_of(ids: list[int]) -> int:
    """The state after `ids`: what the recurrence through the cache must arrive at."""
    return crc32(bytes(ids))


class NotFinite(Exception):
    """The oracle was asked about a row that is not finite."""


@dataclass(frozen=True)
class FakeModel:
    """Rows as a hash of the state.  `agreement` of 16 rows have the token that all models have there.
    `seconds`: of a pass.  `nan_in`: of so many prefixes one has a row that is not finite; 0: none has.
    """

    salt: int
    vocab: int
    agreement: int = 11
    seconds: float = 1.0
    nan_in: int = 0
    weight_bytes: int = 1000
    head_share: float = 0.5
    precision: str = "of integers"

    @property
    def model(self) -> "FakeModel":
        """As a decoder it is itself."""
        return self

    def is_nan(self, state: int) -> bool:
        return bool(self.nan_in) and (state ^ self.salt) * 0x9E3779B1 % self.nan_in == 0

    def sound(self, state: int) -> int:
        """`state`; raises NotFinite where its row is none.  For the oracle."""
        if self.is_nan(state):
            raise NotFinite
        return state

    def row(self, state: int, want: Wanted) -> Row | NumericalError:
        if self.is_nan(state):
            return NumericalError("this row is NaN")
        params, seed, position, size, keeps_logits, past = want
        token = top = self.token(state, size)
        if params.chooses_tokens:
            token = pick_token(self.logits(state, size), params, seed, position, past)
        elif params.temperature or params.logit_bias:
            token = self.token(draw(state, params, params.logit_bias or {}, seed, position), size)
        return Row(token, top, self.top_prob(state), self.logits(state, size) if keeps_logits else None)

    def token(self, state: int, vocab: int) -> int:
        own = (state ^ self.salt) * 0x85EBCA6B & MASK
        said = own if own >> 28 >= self.agreement else state * 0x9E3779B1 & MASK
        token = (said >> 7) % vocab
        # An end of sequence where one in eight of them would be.
        return token + 5 if token < 2 and said & 7 else token

    def top_prob(self, state: int) -> float:
        return TOP_PROBS[(state ^ self.salt) * 0xC2B2AE35 >> 20 & 15]

    def logits(self, state: int, vocab: int) -> torch.Tensor:
        return torch.tensor([(crc32(byte, state) >> 24) / 16 for byte in BYTES[:vocab]])


def draw(state: int, params: Any, bias: Mapping[int, float], seed: int, position: int) -> int:
    """The state that a choice is made from: all that a pick depends on."""
    if params.temperature:
        p = params
        noise = (seed, position, p.temperature, p.top_k, p.top_p, p.min_p)
        state = crc32(struct.pack("<Qqdqdd", *noise), state)
    for token, amount in bias.items():
        state = crc32(struct.pack("<qd", token, amount), state)
    return state


class Answer(NamedTuple):
    """The oracle's row; its noise is keyed `offset` later, for texts that go on from earlier ones."""

    model: FakeModel
    state: int
    vocab: int
    offset: int


@oracle.choose.register
def _(row: Answer, params: oracle.Params, position: int, past: oracle.Past = oracle.NO_PAST) -> int:
    row.model.sound(row.state)
    if params.changes_rows:
        said = row.model.logits(row.state, row.vocab)
        return oracle.choose(said, params, row.offset + position, past)
    state = draw(row.state, params, params.logit_bias, params.seed, row.offset + position)
    return row.model.token(state, row.vocab)


@oracle.top_prob.register
def _(row: Answer) -> float:
    return row.model.top_prob(row.model.sound(row.state))


class SimClock:
    """Seconds that pass when somebody says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class SimCache:
    """What the slots of each block hold: the token that was fed, and the state after it."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self._unwritten = bytearray([UNWRITTEN]) * block_size
        self.tokens = [self._unwritten[:] for _ in range(num_blocks)]
        self.states = [[-1] * block_size for _ in range(num_blocks)]

    def contents(self, block: int) -> tuple[bytearray, list[int]]:
        return self.tokens[block][:], self.states[block][:]

    def fill(self, block: int, contents: tuple[bytearray, list[int]]) -> None:
        self.tokens[block], self.states[block] = contents

    def forget(self, block: int) -> None:
        self.fill(block, (self._unwritten[:], [-1] * len(self._unwritten)))

    def read(self, table: list[int], length: int) -> bytes:
        """The tokens of the first `length` slots that a table leads to."""
        return b"".join(map(self.tokens.__getitem__, table))[:length]


class SimPool(BlockPool):
    """A pool whose blocks forget what they held before they are written, and whose allocations can fail."""

    def __init__(self, total: int, block_size: int, prefix_caching: bool) -> None:
        super().__init__(total, block_size, prefix_caching)
        self.cache = SimCache(total, block_size)
        self.allocations = 0
        self.fails_at = -1
        self._fresh: list[int] = []

        # Whether anything happened since it was checked.
        self._is_changed = True

    def check(self) -> None:
        if self._is_changed:
            super().check()
            self._is_changed = False

    def share(self, block: int) -> None:
        self._is_changed = True
        super().share(block)

    def release(self, block: int) -> None:
        self._is_changed = True
        super().release(block)

    def register(self, parent: Prefix, tokens: list[int], block: int) -> Prefix:
        self._is_changed = True
        return super().register(parent, tokens, block)

    def forget(self, block: int) -> None:
        self._is_changed = True
        super().forget(block)

    def allocate(self) -> int:
        self._is_changed = True
        self.allocations += 1
        if self.allocations == self.fails_at:
            raise OutOfBlocks(f"allocation {self.fails_at} is made to fail")
        block = super().allocate()
        self._fresh.append(block)
        return block

    def begin(self, copies: list[tuple[int, int]]) -> None:
        """What was given out since the last pass forgets what it held, and is then copied into."""
        contents = [self.cache.contents(source) for source, _ in copies]
        if self._fresh:
            for block in self._fresh:
                self.cache.forget(block)
            self._fresh.clear()
        for (_, to), content in zip(copies, contents, strict=True):
            self.cache.fill(to, content)


class Span(NamedTuple):
    """ids: what is fed from `start` to `end`; `table`: the blocks; `prefix`: what stands before, if known."""

    start: int
    end: int
    first_row: int
    ids: list[int]
    table: list[int]
    prefix: bytes | None = None


def span_of(work: Work) -> Span:
    sequence = work.request.sequences[work.role]
    ids = sequence.tokens
    prefix = bytes(ids[: work.start])
    span = ids[work.start : work.end]
    return Span(work.start, work.end, work.first_row, span, sequence.block_table.ids, prefix)


class SimRunner(ModelRunner):
    """A fake model over a paged cache in plain Python."""

    def __init__(self, model: FakeModel, pool: SimPool, clock: SimClock) -> None:
        self.decoder: Any = model
        self.pool: SimPool = pool
        self.cache: Any = pool.cache
        self.clock = clock
        self._flash = None
        self.passes_made = 1
        self.passes = 0
        self.rows_made = 0
        # Rows, counted from the first one ever made, that come out as NaN.
        self.nan_rows: set[int] = set()

    def execute(
        self, works: list[Work], wanted: list[Wanted], fast_path: FastPath | None = None
    ) -> list[Rows | None]:
        self.passes += 1
        self.pool.begin([pair for work in works for pair in work.copies])
        written: set[int] = set()
        tokens = 0
        if fast_path is not None:
            tokens = fast_path.num_tokens
            carried = [Span(*numbers[2:-1]) for numbers in fast_path.core.spans()]
            fast_path.take(self._rows(carried, wanted_by(fast_path), written))
        tokens += sum([work.end - work.start for work in works])
        rows = self._rows(list(map(span_of, works)), wanted, written) if works else []
        self.clock.now += self.decoder.seconds + 0.01 * tokens
        return [*by_work(rows, works)]

    def _rows(self, spans: list[Span], wanted: list[Wanted], written: set[int]) -> list[Row | NumericalError]:
        wants = iter(wanted)
        rows: list[Row | NumericalError] = []
        size, cache = self.pool.block_size, self.cache
        for start, _, first_row, ids, table, prefix in spans:
            state = self._read(start, table, prefix)
            block, at, is_claimed = start // size, start % size, False
            for position, token in enumerate(ids, start + 1):
                if at == size:
                    block, at, is_claimed = block + 1, 0, False
                if not is_claimed:
                    self._claim(table[block], written)
                    is_claimed = True
                state = crc32(BYTES[token], state)
                cache.tokens[table[block]][at] = token
                cache.states[table[block]][at] = state
                at += 1
                if position >= first_row:
                    rows.append(self._row(state, next(wants)))
        assert next(wants, None) is None, "more rows were wanted than there are"
        return rows

    def _claim(self, block: int, written: set[int]) -> None:
        """Assert that a block that is written is nobody else's."""
        assert not self.pool.is_shared(block), f"block {block} is written and shared"
        assert block not in written, f"block {block} is written twice"
        written.add(block)

    def _read(self, start: int, table: list[int], known: bytes | None) -> int:
        """The state before a span, read from the cache; asserts that the cache holds the whole prefix."""
        prefix = self.cache.read(table, start)
        assert known is None or prefix == known, f"{list(prefix)} is read for {list(known or b'')}"
        if not start:
            return 0
        last, size = start - 1, self.pool.block_size
        state: int = self.cache.states[table[last // size]][last % size]
        assert state == crc32(prefix), "a state of another prefix is read"
        return state

    def _row(self, state: int, want: Wanted) -> Row | NumericalError:
        self.rows_made += 1
        if self.nan_rows and self.rows_made - 1 in self.nan_rows:
            return NumericalError("this row is made to be NaN")
        model: FakeModel = self.decoder
        return model.row(state, want)


class InlineLoop(EngineLoop):
    """Counts how often each request's end was reported."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine, records_ahead=False)
        self.ends: dict[str, int] = {}

    def post(self, command: Command) -> None:
        if isinstance(command, Submission):
            command._mailbox.notify = partial(self._count, command._mailbox)  # type: ignore[method-assign]
        super().post(command)

    def _count(self, mailbox: Mailbox, request: Request) -> None:
        if request.is_finished:
            self.ends[request.id] = self.ends.get(request.id, 0) + 1
        Mailbox.notify(mailbox, request)


class InlineThread(EngineThread):
    """The engine's thread without a thread: who calls `turn` is it."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self._will.detach()
        self.loop = InlineLoop(engine)

    def _start(self) -> threading.Thread:
        return threading.current_thread()

    def call(self, function: Callable[[], T]) -> T:
        """As on a thread, what was asked for before comes first."""
        while not self.loop.commands.empty():
            self.loop.commands.get().run()
        return function()

    def check_may_wait(self, what: str) -> None:
        """Nobody waits here for what is not there."""

    def turn(self) -> None:
        """What the thread does between two looks at whether there is work."""
        self.loop.turn()

    def close(self) -> None:
        super().close()
        self.loop.end()


@dataclass(frozen=True)
class Setup:
    """The size of everything.  `one_model`: both roles are one model in one pool; `carries`: see Engine."""

    block_size: int = 4
    blocks: tuple[int, int] = (64, 64)
    max_batch_tokens: int = 2048
    max_len: int = 256
    one_model: bool = False
    # How many ids more the guide's embedding has than the base's.
    padding: int = 3
    agreement: int = 11
    has_text: bool = True
    prefix_caching: bool = True
    drafter: str = "guide"
    carries: bool = True
    # What a pass of the guide takes beside its rows; one of the base takes 1.
    guide_seconds: float = 1.0
    # See FakeModel.
    nan_in: int = 0


class SimLLM(LLM):
    """An LLM over fake models, in one thread; see Setup."""

    _described = "fake models"

    def __init__(self, setup: Setup, threaded: bool = False) -> None:
        names = ("base", "base" if setup.one_model else "guide")
        self.clock = SimClock()
        runners = {name: self._runner(setup, i) for i, name in enumerate(dict.fromkeys(names))}
        self.runners = list(runners.values())
        tokenizer = TOKENIZER if setup.has_text else None
        self.roles = {
            role: Role(role, name, tokenizer, TEMPLATE, EOS[role], runners[name].decoder.vocab, setup.max_len)
            for role, name in zip(("base", "guide"), names, strict=True)
        }
        self._foresee(runners)
        models_of = {role.name: role.model for role in self.roles.values()}
        self._engine = Engine(
            dict(runners), models_of, setup.max_batch_tokens, clock=self.clock, carries=setup.carries
        )
        self._thread = (
            EngineThread(self._engine, on_stop=self._engine.close) if threaded else InlineThread(self._engine)
        )
        self._jobs = Jobs(self._engine, self._thread, self.roles, None, setup.drafter)

    def _runner(self, setup: Setup, index: int) -> Any:
        """That of the base (0) or the guide (1)."""
        seconds = (1.0, setup.guide_seconds)[index]
        size = VOCAB + index * setup.padding
        model = FakeModel(0x1234567 * index, size, setup.agreement, seconds, setup.nan_in)
        pool = SimPool(setup.blocks[index], setup.block_size, setup.prefix_caching)
        return SimRunner(model, pool, self.clock)

    def _foresee(self, runners: dict[str, Any]) -> None:
        """Whatever runs ahead of the host."""


@dataclass(frozen=True)
class Expected:
    """What a request must write; at text level token ids and authors are not told apart (None)."""

    token_ids: list[int] | None
    authors: list[str] | None
    finish_reason: str
    text: str | None
    logprobs: list[TokenLogprob] = field(default_factory=list)
    error: type[Exception] = BadRequest


def expect(llm: LLM, request: Request, seed: int) -> Expected:
    """What the straight-line twins write for a request."""
    params, policy = request.params, request.policy
    p = as_oracle_params(replace(params, seed=seed, max_tokens=None), TOKENIZER, request.max_tokens)
    if isinstance(policy, Nudging) and policy.granularity == "reference":
        return _expect_text(llm, request, p, policy)
    roles = {}
    vocab = min(llm.roles[name].vocab_size for name in policy.roles)
    for name in policy.roles:
        logits, role = straight_rows(llm, name, vocab, request.first_position), llm.roles[name]
        ids, earlier = list(request.prompts[name].ids), request.first_position
        roles[name] = oracle.Role(logits, ids, role.eos_ids, role.max_len, earlier)
    written = _write(policy, roles, p)
    cut = cut_at_stop(written, params, llm.roles["base"].tokenizer)
    logprobs: list[TokenLogprob] = []
    if params.logprobs is not None:
        for i, (token, author) in enumerate(zip(cut.token_ids or [], cut.authors or [], strict=True)):
            row = roles[author].row(written.token_ids[:i])
            assert isinstance(row, Answer)
            logprobs.append(logprob_of(row.model.logits(row.state, vocab), token, params.logprobs))
    return Expected(cut.token_ids, cut.authors, cut.finish_reason, cut.text, logprobs)


def expect_scores(llm: LLM, request: Request) -> Expected:
    """What a text that is scored must come to: its tokens, whose they are, and their log-probabilities."""
    forced = request.policy
    assert isinstance(forced, Forced)
    vocab = min(llm.roles[name].vocab_size for name in forced.roles)
    rows = {name: straight_rows(llm, name, vocab, 0) for name in forced.roles}
    ids, authors, logprobs, in_word = list(forced.tokens[: request.max_tokens]), [], [], 0
    for i, token in enumerate(ids):
        answers = {name: row(list(request.prompts[name].ids) + ids[:i]) for name, row in rows.items()}
        author, in_word = _owner(forced.policy, answers, token, in_word)
        authors.append(author)
        answer = answers[author]
        logprobs.append(logprob_of(answer.model.logits(answer.state, vocab), token, 0))
    text = None if request.tokenizer is None else TOKENIZER.text_of(ids)
    return Expected(ids, authors, "length", text, logprobs)


def _owner(policy: Any, answers: dict[str, Answer], token: int, in_word: int) -> tuple[str, int]:
    """Who would write at a position of a given text, and how many tokens of its word are the guide's."""
    if not isinstance(policy, Nudging):
        return policy.writer, 0
    is_inside = 0 < in_word < policy.lookahead and not TOKENIZER.starts_with_space(token)
    if policy.granularity == "word" and is_inside:
        return "guide", in_word + 1
    gate = oracle.Gate(policy.threshold, policy.comparator)
    return ("guide", 1) if gate.is_unsure(oracle.top_prob(answers["base"])) else ("base", 0)


def straight_rows(llm: LLM, role: str, vocab: int, offset: int) -> Callable[[list[int]], Any]:
    model: Any = llm._engine.runners[llm.roles[role].model].decoder.model
    return lambda ids: Answer(model, state_of(ids), vocab, offset)


def _write(policy: Policy, roles: dict[str, oracle.Role], params: oracle.Params) -> oracle.Written:
    if isinstance(policy, Base):
        return oracle.base(roles["base"], params)
    if isinstance(policy, Guide):
        return oracle.guide(roles["guide"], params)
    assert isinstance(policy, Nudging)
    gate = oracle.Gate(policy.threshold, policy.comparator)
    if policy.granularity == "token":
        return oracle.nudging_token(roles["base"], roles["guide"], params, gate)
    return oracle.nudging_word(roles["base"], roles["guide"], params, gate, TOKENIZER.starts_with_space)


def _expect_text(llm: LLM, request: Request, params: oracle.Params, policy: Nudging) -> Expected:
    clients = {}
    for name in policy.roles:
        role, text = llm.roles[name], request.prompts[name].text
        assert text is not None
        logits = straight_rows(llm, name, role.vocab_size, 0)
        clients[name] = oracle.text_client(
            logits, TOKENIZER.encode, TOKENIZER.token_bytes, role.eos_ids, text, params, role.max_len
        )
    prompts = {name: request.prompts[name].text or "" for name in policy.roles}
    gate = oracle.Gate(policy.threshold, policy.comparator)
    try:
        written = oracle.nudging_reference(
            clients["base"],
            clients["guide"],
            prompts["base"],
            prompts["guide"],
            gate,
            lambda text: len(TOKENIZER.encode_continuation(text)),
            params.max_tokens,
        )
    except oracle.ContextFull:
        return Expected(None, None, "error", None)
    ids = TOKENIZER.encode_continuation(written.text)
    cut = cut_at_stop(oracle.Written(ids, [""] * len(ids), written.finish_reason), request.params, TOKENIZER)
    return Expected(None, None, cut.finish_reason, cut.text)


def cut_at_stop(written: oracle.Written, params: SamplingParams, tokenizer: Tokenizer | None) -> Expected:
    """The text up to the first stop string, and the tokens up to the one that completes it."""
    ids, authors, finish = written
    if tokenizer is None:
        return Expected(ids, authors, finish, None)
    shown = tokenizer.token_bytes if params.skip_special_tokens else tokenizer.shown_bytes
    pieces = [shown(token) for token in ids]
    whole = b"".join(pieces).decode("utf-8", "replace")
    # So many characters stand there once so many tokens do.
    reach = [len(whole_characters(b"".join(pieces[:n]))) for n in range(len(ids) + 1)]
    found = first_stop(whole, params.stop, reach[min(params.min_tokens, len(ids))])
    if found is None:
        return Expected(ids, authors, finish, whole)
    used = next((n for n, length in enumerate(reach) if length >= found[1]), len(ids))
    text = whole[: found[1] if params.include_stop_str_in_output else found[0]]
    return Expected(ids[:used], authors[:used], "stop", text)


def first_stop(text: str, stops: tuple[str, ...], begin: int = 0) -> tuple[int, int] | None:
    """Where the stop string that is complete first begins and ends; of several at once, the longest.  Those
    that end with the first `begin` characters are none.
    """
    for end in range(begin + 1, len(text) + 1) if stops else ():
        lengths = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if lengths:
            return end - max(lengths), end
    return None
