"""An engine's figures for Prometheus, under the names that dashboards for other engines use, with our prefix.

Needs `pip install nudging[metrics]`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Protocol

from prometheus_client import REGISTRY, CollectorRegistry, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from nudging.api.arguments import kind_of
from nudging.core.request import Request
from nudging.core.stats import EngineStats
from nudging.errors import BadRequest

PREFIX = "nudging:"
# Seconds.  A first token takes one pass over the prompt, a later one a fraction of a pass.
TO_FIRST_TOKEN = (0.001, 0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.2, 2.5, 5.0, 10.0, 20.0, 40.0)
BETWEEN_TOKENS = (0.0005, 0.001, 0.002, 0.004, 0.008, 0.015, 0.03, 0.06, 0.12, 0.25, 0.5, 1.0)
WHOLE_REQUEST = (0.01, 0.03, 0.1, 0.3, 0.6, 1.0, 2.0, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0)
SHARE = (0.0, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0)
HISTOGRAMS = (
    ("time_to_first_token_seconds", "From submission to the first token.", TO_FIRST_TOKEN),
    ("inter_token_latency_seconds", "Mean time of a request's later tokens.", BETWEEN_TOKENS),
    ("e2e_request_latency_seconds", "From submission to the end.", WHOLE_REQUEST),
    ("request_nudge_rate", "The share of a request's tokens that the base did not write.", SHARE),
)
# Where a registry keeps the figures that all engines in it share.
ATTRIBUTE = "_nudging_figures"


class Watched(Protocol):
    """An `LLM` or an `AsyncLLM`."""

    def stats(self) -> EngineStats: ...
    def on_end(self, listener: Callable[[Request], None], /) -> None: ...


class Metrics:
    """Registers an `LLM` or `AsyncLLM` with a Prometheus registry until `close`.

    Several may share a registry, each under a `model_name` of its own.  Counters and gauges are read when
    they are scraped; the histograms hold one observation for each request that ended.
    """

    def __init__(self, llm: Watched, model_name: str, registry: CollectorRegistry = REGISTRY) -> None:
        """`model_name` labels every figure.  Raises BadRequest where it is taken in this registry, where
        other code has registered one of these figures, and where `llm` is no engine.  What fails registers
        nothing.
        """
        if isinstance(llm, type) or not all(
            callable(getattr(llm, name, None)) for name in ("stats", "on_end")
        ):
            raise BadRequest(f"llm is {kind_of(llm)}; give an open LLM or AsyncLLM")
        if not isinstance(model_name, str) or not model_name:
            raise BadRequest(f"model_name is {model_name!r}; give a str that names the models")
        self._llm = llm
        self._model = model_name
        self._figures: Figures | None = Figures.of(registry)
        self._figures.add(model_name, self.collect)
        try:
            llm.on_end(self._observe)
        except BaseException:
            # An AsyncLLM that is not open yet has nothing to listen to.
            self.close()
            raise

    def close(self) -> None:
        """Take this engine's figures out of the registry.  May be called twice."""
        figures, self._figures = self._figures, None
        if figures is not None:
            figures.remove(self._model)

    def collect(self) -> Iterable[Metric]:
        """What the engine says now."""
        stats = self._llm.stats()
        totals = stats.totals
        yield self._gauge("num_requests_running", "Requests that are being written.", stats.running)
        yield self._gauge("num_requests_waiting", "Requests that wait for memory.", stats.waiting)
        usage = GaugeMetricFamily(
            PREFIX + "kv_cache_usage_perc", "Share of a cache in use, 0 to 1.", labels=("model_name", "model")
        )
        for model, share in stats.kv_cache_usage.items():
            usage.add_metric((self._model, model), share)
        yield usage
        yield self._counter(
            "prompt_tokens", "Prompt tokens, by the first role's count.", totals.prompt_tokens
        )
        yield self._counter("generation_tokens", "Tokens written.", totals.generated_tokens)
        yield self._by("author_tokens", "Tokens written, by the role that wrote them.", "role", totals.tokens)
        yield self._by("request_passes", "Forwards times requests in them, by role.", "role", totals.passes)
        yield self._by("request_success", "Requests that ended.", "finished_reason", totals.finished)
        yield self._counter("prefix_cache_hits", "Prompt tokens that were cached.", totals.cached_tokens)
        yield self._counter("num_preemptions", "Requests that gave their cache back.", totals.preemptions)
        yield self._counter("spec_decode_num_drafts", "Drafts verified.", totals.drafts)
        yield self._counter("spec_decode_num_draft_tokens", "Tokens drafted.", totals.drafted)
        yield self._counter(
            "spec_decode_num_accepted_tokens", "Drafted tokens that became text.", totals.accepted
        )

    def _observe(self, request: Request) -> None:
        """Add one request that has ended to the histograms."""
        figures, counters, tokens = self._figures, request.counters, len(request.pieces)
        if figures is None:
            return
        ended, first = counters.finished_at, counters.first_token_at
        assert ended is not None, f"{request.id} has not ended"
        figures.whole.labels(self._model).observe(ended - counters.submitted_at)
        if first is None:
            return
        figures.first.labels(self._model).observe(first - counters.submitted_at)
        if tokens > 1:
            figures.later.labels(self._model).observe((ended - first) / (tokens - 1))
        if tokens:
            nudged = sum(piece.author != "base" for piece in request.pieces)
            figures.nudged.labels(self._model).observe(nudged / tokens)

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(PREFIX + name, text, labels=("model_name",))
        family.add_metric((self._model,), value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(PREFIX + name, text, labels=("model_name",))
        family.add_metric((self._model,), value)
        return family

    def _by(self, name: str, text: str, label: str, values: dict[str, int]) -> Metric:
        family = CounterMetricFamily(PREFIX + name, text, labels=("model_name", label))
        for key, value in values.items():
            family.add_metric((self._model, key), value)
        return family


class Figures(Collector):
    """The figures of all engines in one registry: a name stands there once, with a label for each engine."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._engines: dict[str, Callable[[], Iterable[Metric]]] = {}
        self._lock = threading.Lock()
        made: list[Histogram] = []
        try:
            for name, text, buckets in HISTOGRAMS:
                made.append(
                    Histogram(PREFIX + name, text, ("model_name",), registry=registry, buckets=buckets)
                )
            self.first, self.later, self.whole, self.nudged = made
            registry.register(self)
        except ValueError as error:
            for histogram in made:
                registry.unregister(histogram)
            raise BadRequest(f"the registry has such figures already ({error}); give another") from error
        self._histograms = made
        setattr(registry, ATTRIBUTE, self)

    @classmethod
    def of(cls, registry: CollectorRegistry) -> Figures:
        """Those that the registry has, or new ones in it.  Raises BadRequest."""
        if not isinstance(registry, CollectorRegistry):
            raise BadRequest(f"registry is {registry!r}; give a prometheus_client.CollectorRegistry")
        return getattr(registry, ATTRIBUTE, None) or cls(registry)

    def add(self, model: str, collect: Callable[[], Iterable[Metric]]) -> None:
        """Show an engine's figures, too.  Raises BadRequest."""
        with self._lock:
            if model in self._engines:
                raise BadRequest(
                    f"model_name is {model!r}, which another engine has in this registry; give another "
                    "name, or close() its Metrics first"
                )
            self._engines[model] = collect

    def remove(self, model: str) -> None:
        """Forget an engine; with the last one the figures leave the registry."""
        with self._lock:
            del self._engines[model]
            for histogram in self._histograms:
                histogram.remove(model)
            if not self._engines:
                delattr(self._registry, ATTRIBUTE)
                for collector in (self, *self._histograms):
                    self._registry.unregister(collector)

    def collect(self) -> Iterable[Metric]:
        """What all engines say now, one family for each name."""
        with self._lock:
            engines = list(self._engines.values())
        families: dict[str, Metric] = {}
        for engine in engines:
            for family in engine():
                known = families.setdefault(family.name, family)
                if known is not family:
                    known.samples += family.samples
        yield from families.values()
