"""What a policy may ask of its view where something is in the way: no tokenizer, a full context."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from nudging import BadRequest, Base, Nudging, SamplingParams
from nudging.core.need import Need
from nudging.core.policy_view import MissingRow, RequestView
from nudging.core.rows import Row
from nudging.core.speculation.ledger import Ledger
from nudging.executor.sampler import TorchSampler
from nudging.policies import Step, View
from tests.core.test_scheduler import request, small_engine
from tests.support.fake import FixedCosts
from tests.support.simulated import Setup, SimLLM, SimTokenizer
from tests.support.simulation import Broken, World

CLIENT = Nudging(0.4, "reference", overshoot=True)


@dataclass(frozen=True)
class Asks(Broken):
    """A caller's policy that says of itself it reads no text, and does."""

    question: Callable[[View], Any] = lambda view: None

    def step(self, view: View, state: int) -> Step:
        self.question(view)
        return Step(finish="stop")


@pytest.mark.parametrize(
    ("question", "message"),
    [
        (lambda view: view.starts_with_space(3), "words need a tokenizer and this checkpoint has none"),
        (lambda view: view.complete("base", "", 4), "this policy works on text and 'base' has no tokenizer"),
        (lambda view: view.count_tokens("a"), "this policy works on text and 'base' has no tokenizer"),
    ],
)
def test_who_asks_for_text_where_there_is_none_is_told_and_nobody_else_is(
    question: Callable[[View], Any], message: str
) -> None:
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    with SimLLM(Setup(has_text=False), threaded=True) as llm:
        outputs = [r.outputs[0] for r in llm.generate([[2], [3]], params, [Asks("", 0, question), Base()])]
    assert isinstance(outputs[0].error, BadRequest)
    assert message in str(outputs[0].error)
    assert "use granularity='token'" in str(outputs[0].error)
    assert (outputs[1].error, len(outputs[1].token_ids)) == (None, 4)


def test_a_text_that_fills_a_context_says_whose() -> None:
    """The guide writes a whole block before the base reads it."""
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    with SimLLM(Setup(max_len=48), threaded=True) as llm:
        prompts = [{"base": "?" * length, "guide": "?"} for length in (10, 20)]
        outputs = [result.outputs[0] for result in llm.generate(prompts, params, CLIENT)]
    assert (outputs[0].error, outputs[0].finish_reason) == (None, "length")
    assert isinstance(outputs[1].error, BadRequest)
    assert str(outputs[1].error) == "the text fills the context of 'base' (48 tokens); lower max_tokens"


def test_a_client_may_begin_with_token_ids() -> None:
    """No token begins with "?" and goes on: the text is cut alike with the prompt and behind it."""
    params = SamplingParams(max_tokens=20)
    with SimLLM(Setup(), threaded=True) as llm:
        for text in ("?", "the of 12?", "an é?"):
            ids = SimTokenizer().encode(text)
            outputs = [llm.generate(prompt, params, CLIENT)[0].outputs[0] for prompt in (text, ids)]
            assert outputs[0].error is None
            assert (outputs[0].text, outputs[0].segments) == (outputs[1].text, outputs[1].segments)


def test_a_clients_texts_are_cut_once_and_rows_of_earlier_ones_dropped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encode, cut = SimTokenizer.encode, []

    def counted(tokenizer: SimTokenizer, text: str, special: bool = True) -> list[int]:
        cut.append(text)
        return encode(tokenizer, text, special)

    world = World(Setup(blocks=(400, 400)))
    job = world.submit("a?", SamplingParams(max_tokens=60, ignore_eos=True), CLIENT)
    monkeypatch.setattr(SimTokenizer, "encode", counted)
    most = 0
    while not job.handle.is_finished:
        world.turn()
        most = max([most, *(len(sequence.rows) for sequence in job.requests[0].sequences.values())])
    assert len(job.requests[0].output) >= 60
    assert max(map(cut.count, cut)) <= 2, "each of the roles reads a text once"
    assert most <= 17


def test_the_reserve_of_a_client_holds_whatever_it_writes() -> None:
    """It looks at the length between rounds of blocks: short texts outgrow theirs by the most."""
    world = World(Setup(blocks=(2000, 2000)))
    for threshold in (0.25, 0.6, 1.5):
        for length in range(1, 6):
            for word in ("a", " the", "é", "12"):
                world.submit(
                    word * length,
                    SamplingParams(max_tokens=length),
                    Nudging(threshold, "reference", overshoot=True),
                )
    world.drain()
    assert world.finished["error"] == 0


def test_a_row_that_is_missing_says_whose_it_is_and_where() -> None:
    assert str(MissingRow(Need("guide", 7, 9))) == "guide has not answered at 7 yet"


def test_a_known_path_ends_where_the_text_took_another_token() -> None:
    engine, roles = small_engine(20)
    job = request(roles, "r", [2, 3, 5], 9, Nudging(0.4, "word"))
    engine.add(job)
    view = RequestView(job, Ledger({role: FixedCosts(1.0) for role in roles}), TorchSampler())
    guide = job.sequences["guide"]
    assert view.known_path("guide") == (0, 3)
    guide.rows[3], guide.rows[4], guide.rows[5] = (Row(token, token, 0.9) for token in (7, 8, 9))
    guide.set_context(3, (7, 6))
    guide.rows[4] = Row(8, 8, 0.9)
    assert view.known_path("guide") == (2, 5), "its own token behind the seven is known, too"
    guide.set_context(3, (6,))
    guide.rows[3] = Row(7, 7, 0.9)
    assert view.known_path("guide") == (1, 4)
