"""Prometheus metrics of the server: its answers, clients' waiting times, and the engine's activity."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from deepseek_jax.serving.engine import Engine

BUCKETS = (.005, .01, .02, .05, .1, .2, .5, 1, 2, 5, 10, 30, 60, 120, 300)  # seconds
PREFIX = "deepseek_jax_"
TOTALS = {"tokens": "Tokens handed over.", "prompt_tokens": "Tokens of prompts read.",
          "reused_tokens": "Tokens of prompts found in the cache.", "drafted": "Tokens drafted and verified.",
          "accepted": "Drafted tokens accepted.", "steps": "Decoding steps.",
          "errors": "Sequences ended because their logits were no numbers."}


class Metrics:
    """Metrics that are counted outside the engine. `text` has all of them, including the engine's.

    Args:
      per_expert: whether to report a series for each expert of each layer.
    """

    def __init__(self, per_expert: bool = False):
        self.per_expert = per_expert
        self._registry = CollectorRegistry()
        histogram = lambda name, what: Histogram(PREFIX + name, what, buckets=BUCKETS, registry=self._registry)
        self.answered = Counter(PREFIX + "requests", "Responses.", ("path", "status"), registry=self._registry)
        self.queue = histogram("queue_seconds", "From a request to its admission, each choice.")
        self.first_token = histogram("time_to_first_token_seconds", "From a request to its first token, each choice.")
        self.between = histogram("time_between_tokens_seconds", "Of tokens after the first ones; those that come "
                                 "together share the time.")

    def watch(self, engine: Engine) -> None:
        """Reports an engine from now on."""
        self._registry.register(_OfEngine(engine, self.per_expert))

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)


class _OfEngine(Collector):
    def __init__(self, engine: Engine, per_expert: bool):
        self.engine, self.per_expert = engine, per_expert

    def collect(self) -> Iterator[Metric]:
        engine, pool = self.engine, self.engine.pool
        for name, what in TOTALS.items():
            yield CounterMetricFamily(PREFIX + name, what, engine.totals[name])
        sequences = GaugeMetricFamily(PREFIX + "sequences", "Sequences in the engine.", labels=["state"])
        for state in ("running", "reading", "waiting"):
            sequences.add_metric([state], len(getattr(engine, state)))
        pages = GaugeMetricFamily(PREFIX + "cache_pages", "Pages of the cache.", labels=["state"])
        pages.add_metric(["owned"], pool.owned)
        pages.add_metric(["all"], pool.total)
        yield from (sequences, pages, GaugeMetricFamily(
            PREFIX + "cache_live_bytes", "Bytes of the pages that sequences own.", engine.live_bytes()))
        if self.per_expert:
            load = CounterMetricFamily(PREFIX + "expert_load", "Tokens that chose each expert.",
                                       labels=["layer", "expert"])
            for i, row in enumerate(engine.loads_LE.tolist()):
                for e, tokens in enumerate(row):
                    load.add_metric([str(i), str(e)], tokens)
            yield load
