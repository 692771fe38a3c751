"""An engine's figures for Prometheus, under the names that dashboards for other engines use, with our prefix.

Needs `pip install nudging[metrics]`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from prometheus_client import REGISTRY, CollectorRegistry, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from nudging.api import LLM
from nudging.request import Request

PREFIX = "nudging:"
# Seconds.  A first token takes one pass over the prompt, a later one a fraction of a pass.
TO_FIRST_TOKEN = (0.001, 0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.2, 2.5, 5.0, 10.0, 20.0, 40.0)
BETWEEN_TOKENS = (0.0005, 0.001, 0.002, 0.004, 0.008, 0.015, 0.03, 0.06, 0.12, 0.25, 0.5, 1.0)
WHOLE_REQUEST = (0.01, 0.03, 0.1, 0.3, 0.6, 1.0, 2.0, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0)
SHARE = (0.0, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0)


class Metrics(Collector):
    """Registers an `LLM` with a Prometheus registry until `close`.

    Counters and gauges are read when they are scraped; the histograms hold one observation for each request
    that ended.
    """

    def __init__(self, llm: LLM, model_name: str, registry: CollectorRegistry = REGISTRY) -> None:
        """`model_name` labels every figure.  Raises ValueError where the registry has these names already."""
        self._llm = llm
        self._registry = registry
        self._model = model_name
        self._first = self._histogram(
            "time_to_first_token_seconds", "From submission to the first token.", TO_FIRST_TOKEN
        )
        self._later = self._histogram(
            "inter_token_latency_seconds", "Mean time of a request's later tokens.", BETWEEN_TOKENS
        )
        self._whole = self._histogram(
            "e2e_request_latency_seconds", "From submission to the end.", WHOLE_REQUEST
        )
        self._nudged = self._histogram(
            "request_nudge_rate", "The share of a request's tokens that the base did not write.", SHARE
        )
        registry.register(self)
        llm.on_end(self._observe)

    def close(self) -> None:
        """Take every figure out of the registry."""
        for collector in (self, self._first, self._later, self._whole, self._nudged):
            self._registry.unregister(collector)

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
        counters, tokens = request.counters, len(request.pieces)
        ended, first = counters.finished_at, counters.first_token_at
        assert ended is not None, f"{request.id} has not ended"
        self._whole.labels(self._model).observe(ended - counters.submitted_at)
        if first is None:
            return
        self._first.labels(self._model).observe(first - counters.submitted_at)
        if tokens > 1:
            self._later.labels(self._model).observe((ended - first) / (tokens - 1))
        if tokens:
            nudged = sum(piece.author != "base" for piece in request.pieces)
            self._nudged.labels(self._model).observe(nudged / tokens)

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(PREFIX + name, text, ("model_name",), registry=self._registry, buckets=buckets)

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
