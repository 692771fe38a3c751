"""What a caller may ask of one request."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nudging.checks import is_int, is_number, is_text, require, strict
from nudging.core.frozen import FrozenMap

MAX_TOKENS_LIMIT = 1 << 20
N_LIMIT = 128
STOP_LIMIT = 16
BAD_WORDS_LIMIT = 1024
LOGPROBS_LIMIT = 64
TOP_K_LIMIT = (1 << 31) - 1
# Whole numbers for which None is a value of its own.
TAKES_NONE = frozenset(("max_tokens", "seed", "logprobs", "prompt_logprobs"))


@strict
@dataclass(frozen=True)
class SamplingParams:
    """How one request samples and stops: a value, which keeps nothing of what it is made from.

    `max_tokens`: the most tokens of the text; None lets it go as far as the context does.  `min_tokens`: with
    fewer, end-of-sequence tokens and `stop_token_ids` cannot be picked; stop strings that are complete with
    the last of them or before do not end the text (as in vLLM).
    `temperature` 0 is greedy, as is anything below 2^-17.  `top_k` 0, `top_p` 1 and `min_p` 0 are
    off.  The noise of output position t is a function of (`seed`, t) alone; without a seed one is drawn.

    `stop` strings and `stop_token_ids` end the text and are not part of it, unless with
    `include_stop_str_in_output`.  `ignore_eos`: end-of-sequence tokens are tokens like any other.
    `skip_special_tokens`: such tokens have no text; else they are written out.

    What a model says is changed in this order before a token is picked: `allowed_token_ids` are all that is
    left; of `bad_words` the last token of each spelling, alone or with a space before it, is excluded where
    the output ends with those before it; `min_tokens` excludes the ends; `logit_bias` is added (token id to
    -100 .. 100); the logit of tokens of prompt and output is divided by `repetition_penalty` (multiplied if
    it is negative), then lessened by `frequency_penalty` for each time that the token is in the output, and
    by `presence_penalty` where it is there at all; then come temperature, top_k, top_p of those, and min_p.
    That is vLLM's order but for min_p, which is before top_k and top_p there: here filters follow each other
    as in transformers.  All of it acts on the row of whichever role owns the position, with that role's own
    prompt; how sure the base is, is read before any of it.  All of it is a function of the text alone: a
    rejected draft leaves no trace.  In an open generation what was written before is output, and `min_tokens`
    and `max_tokens` count what a call adds.  What a policy picks itself (`View.pick`) is changed alike, under
    the prompt of its first role and the ends of all.  The client that `granularity="reference"` follows may
    end a text before `min_tokens` by rules of its own.

    `logprobs` asks for the owner's log-probability of each token and of that many likeliest others, at
    temperature 1 and before all changes; `prompt_logprobs` likewise for the prompt, as the base reads it (or
    the first role of a policy without it).  Ids are those of the role that a position belongs to, where the
    roles have unlike tokenizers.

    Raises BadRequest for a value out of range; None is the default of every option but max_tokens.
    """

    max_tokens: int | None = 16
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    logit_bias: Mapping[int, float] | None = None
    n: int = 1
    min_tokens: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    bad_words: tuple[str, ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    prompt_logprobs: int | None = None

    if TYPE_CHECKING:
        # What the constructor takes, where that is more than what the fields hold.
        def __init__(
            self,
            max_tokens: int | None = 16,
            temperature: float | None = 0.0,
            top_p: float | None = 1.0,
            top_k: int | None = 0,
            min_p: float | None = 0.0,
            seed: int | None = None,
            stop: str | Iterable[str] | None = (),
            stop_token_ids: Iterable[int] | None = (),
            ignore_eos: bool | None = False,
            logprobs: int | None = None,
            logit_bias: Mapping[int, float] | None = None,
            n: int | None = 1,
            min_tokens: int | None = 0,
            presence_penalty: float | None = 0.0,
            frequency_penalty: float | None = 0.0,
            repetition_penalty: float | None = 1.0,
            bad_words: str | Iterable[str] | None = (),
            allowed_token_ids: Iterable[int] | None = None,
            include_stop_str_in_output: bool | None = False,
            skip_special_tokens: bool | None = True,
            prompt_logprobs: int | None = None,
        ) -> None: ...

    def __post_init__(self) -> None:
        self._check_lengths()
        self._check_numbers()
        self._check_flags()
        self._freeze_lists()
        self._freeze_bias()

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is picked, whatever the noise."""
        return self.temperature == 0 and not self.changes_logits

    @property
    def changes_logits(self) -> bool:
        """Whether a token is picked from other logits than the model's own."""
        return bool(self.logit_bias) or self.chooses_tokens

    @property
    def chooses_tokens(self) -> bool:
        """Whether the logits are changed by more than biases: so that perhaps no token is left."""
        return self.allowed_token_ids is not None or self.reads_text

    @property
    def reads_text(self) -> bool:
        """Whether the logits are changed by what stands before them."""
        penalties = self.presence_penalty, self.frequency_penalty, self.repetition_penalty
        return self.min_tokens > 0 or bool(self.bad_words) or penalties != (0, 0, 1)

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _whole(self, name: str, low: int, high: int, limit: str = "") -> None:
        value = getattr(self, name)
        if value is not None or name not in TAKES_NONE:
            limit = limit or f"a whole number from {low} to {high}"
            if name in TAKES_NONE:
                limit = f"None or {limit}"
            require(is_int(value) and low <= value <= high, name, value, limit)

    def _number(self, name: str, low: float, high: float, limit: str, without_low: bool = False) -> None:
        value = getattr(self, name)
        fine = is_number(value) and low <= value <= high and not (without_low and value == low)
        require(fine, name, value, limit)
        self._set(name, float(value))

    def _check_lengths(self) -> None:
        self._whole("max_tokens", 1, MAX_TOKENS_LIMIT)
        most = MAX_TOKENS_LIMIT if self.max_tokens is None else self.max_tokens
        within = "" if self.max_tokens is None else f" (max_tokens={most})"
        self._whole("min_tokens", 0, most, f"a whole number from 0 to {most}{within}")
        self._whole("logprobs", 0, LOGPROBS_LIMIT)
        self._whole("prompt_logprobs", 0, LOGPROBS_LIMIT)
        self._whole("n", 1, N_LIMIT)
        self._whole("seed", 0, (1 << 64) - 1, "a whole number from 0 to 2^64 - 1")
        self._whole("top_k", 0, TOP_K_LIMIT, f"a whole number from 0 to {TOP_K_LIMIT} (0 is off)")

    def _check_numbers(self) -> None:
        self._number("temperature", 0, 100, "a number from 0 (greedy) to 100")
        self._number("top_p", 0, 1, "a number in (0, 1]", without_low=True)
        self._number("min_p", 0, 1, "a number in [0, 1]")
        for name in ("presence_penalty", "frequency_penalty"):
            self._number(name, -2, 2, "a number from -2 to 2 (0 is off)")
        self._number("repetition_penalty", 0.01, 100, "a number from 0.01 to 100 (1 is off)")

    def _check_flags(self) -> None:
        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens"):
            value = getattr(self, name)
            require(isinstance(value, bool), name, value, "True or False")

    def _freeze_lists(self) -> None:
        for name, most in (("stop", STOP_LIMIT), ("bad_words", BAD_WORDS_LIMIT)):
            value = getattr(self, name)
            words = self._tuple(name, (value,) if isinstance(value, str) else value, "strings")
            fine = all(isinstance(word, str) and word and is_text(word) for word in words)
            rule = f"at most {most} strings, none of them empty or with a lone surrogate"
            require(fine and len(words) <= most, name, value, rule)
        ids = self._tuple("stop_token_ids", self.stop_token_ids, "token ids")
        require(all(is_int(i) and i >= 0 for i in ids), "stop_token_ids", ids, "token ids >= 0")
        if self.allowed_token_ids is not None:
            ids = self._tuple("allowed_token_ids", self.allowed_token_ids, "token ids")
            fine = len(ids) > 0 and all(is_int(i) and i >= 0 for i in ids)
            require(fine, "allowed_token_ids", ids, "at least one token id >= 0, or None for all")

    def _tuple(self, name: str, value: Any, of: str) -> tuple[Any, ...]:
        fine = isinstance(value, Iterable) and not isinstance(value, (str, bytes, Mapping))
        require(fine, name, value, f"a list of {of}, or None for none")
        self._set(name, tuple(value))
        return tuple(getattr(self, name))

    def _freeze_bias(self) -> None:
        if self.logit_bias is None:
            return
        require(
            isinstance(self.logit_bias, Mapping), "logit_bias", self.logit_bias, "a map from id to number"
        )
        biases: dict[int, float] = {}
        for key, bias in self.logit_bias.items():
            # JSON has no other keys than strings.
            token = int(key) if isinstance(key, str) and key.isascii() and key.isdecimal() else key
            fine = is_int(token) and token >= 0 and is_number(bias) and abs(bias) <= 100
            require(fine, "logit_bias", {key: bias}, "token ids >= 0 with numbers from -100 to 100")
            biases[token] = float(bias)
        self._set("logit_bias", FrozenMap(biases))
