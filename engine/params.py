"""What a caller may ask of one request."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nudging.errors import BadRequest
from nudging.options import strict

MAX_TOKENS_LIMIT = 1 << 20
N_LIMIT = 128
STOP_LIMIT = 16
LOGPROBS_LIMIT = 64


def require(holds: bool, name: str, value: object, limit: str) -> None:
    """Raise BadRequest naming the option, its value and its limit unless `holds`."""
    if not holds:
        raise BadRequest(f"{name} is {value!r}; it must be {limit}")


def is_int(value: object) -> bool:
    """True for an int that is not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """True for a finite int or float that is not a bool."""
    return (is_int(value) or isinstance(value, float)) and math.isfinite(value)  # type: ignore[arg-type]


@strict
@dataclass(frozen=True)
class SamplingParams:
    """How one request samples and stops.

    `temperature` 0 is greedy.  `top_k` 0, `top_p` 1 and `min_p` 0 are off.  The noise of output position
    t is a function of (`seed`, t) alone; without a seed one is drawn.  `stop` strings and
    `stop_token_ids` end the text and are not part of it.  `logprobs` asks for the owner's
    log-probability of each token and of that many likeliest others.  Raises BadRequest for a value out
    of range; None is the default of every option.
    """

    max_tokens: int = 16
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
        ) -> None: ...

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        for name, value in (("stop", stop), ("stop_token_ids", self.stop_token_ids)):
            require(isinstance(value, Iterable), name, value, "a list, or None for none")
            object.__setattr__(self, name, tuple(value))
        self._check_numbers()
        self._check_stops()
        self._check_bias()

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is picked, whatever the noise."""
        return self.temperature == 0 and not self.logit_bias

    def _check_numbers(self) -> None:
        whole = is_int(self.max_tokens) and 1 <= self.max_tokens <= MAX_TOKENS_LIMIT
        require(whole, "max_tokens", self.max_tokens, f"a whole number from 1 to {MAX_TOKENS_LIMIT}")
        warm = is_number(self.temperature) and 0 <= self.temperature <= 100
        require(warm, "temperature", self.temperature, "a number from 0 (greedy) to 100")
        require(is_number(self.top_p) and 0 < self.top_p <= 1, "top_p", self.top_p, "a number in (0, 1]")
        require(is_int(self.top_k) and self.top_k >= 0, "top_k", self.top_k, "a whole number >= 0 (0 is off)")
        require(is_number(self.min_p) and 0 <= self.min_p <= 1, "min_p", self.min_p, "a number in [0, 1]")
        seed = self.seed is None or (is_int(self.seed) and 0 <= self.seed < 1 << 64)
        require(seed, "seed", self.seed, "None or a whole number from 0 to 2^64 - 1")
        require(isinstance(self.ignore_eos, bool), "ignore_eos", self.ignore_eos, "True or False")
        logprobs = self.logprobs is None or (is_int(self.logprobs) and 0 <= self.logprobs <= LOGPROBS_LIMIT)
        require(logprobs, "logprobs", self.logprobs, f"None or a whole number from 0 to {LOGPROBS_LIMIT}")
        copies = is_int(self.n) and 1 <= self.n <= N_LIMIT
        require(copies, "n", self.n, f"a whole number from 1 to {N_LIMIT}")

    def _check_stops(self) -> None:
        strings = all(isinstance(s, str) and s for s in self.stop) and len(self.stop) <= STOP_LIMIT
        require(strings, "stop", self.stop, f"at most {STOP_LIMIT} strings, none of them empty")
        ids = all(is_int(i) and i >= 0 for i in self.stop_token_ids)
        require(ids, "stop_token_ids", self.stop_token_ids, "token ids >= 0")

    def _check_bias(self) -> None:
        if self.logit_bias is None:
            return
        require(
            isinstance(self.logit_bias, Mapping), "logit_bias", self.logit_bias, "a map from id to number"
        )
        for token, bias in self.logit_bias.items():
            fine = is_int(token) and token >= 0 and is_number(bias) and abs(bias) <= 100
            require(fine, "logit_bias", {token: bias}, "token ids >= 0 with numbers from -100 to 100")
