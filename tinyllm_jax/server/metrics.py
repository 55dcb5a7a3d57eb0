"""What `/metrics` tells Prometheus."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from tinyllm_jax.inference.service import Service

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class ServiceCollector(Collector):
    """Reads the service's own counts when somebody asks."""

    def __init__(self, service: Service):
        self._service = service

    def collect(self) -> Iterator[Metric]:
        """Give every count."""
        stats = self._service.stats()
        for name, value, what in (
            ("slots", stats.slots, "answers that can be made at the same time"),
            ("replicas", stats.replicas, "engines that are ready"),
            ("missing_programs", stats.missing_programs, "programs that are still being compiled"),
            ("busy_slots", stats.busy_slots, "answers that are being made"),
            ("waiting", stats.waiting, "questions that wait for a slot"),
        ):
            yield GaugeMetricFamily(f"tinyllm_{name}", what, value)
        for name, value, what in (
            ("questions", stats.requests_total, "answers asked for"),
            ("prompt_tokens", stats.prompt_tokens_total, "tokens read"),
            ("new_tokens", stats.new_tokens_total, "tokens written"),
            ("cancelled", stats.cancelled_total, "answers given up"),
            ("failed", stats.failed_total, "answers that failed"),
        ):
            yield CounterMetricFamily(f"tinyllm_{name}", what, value)


class Metrics:
    """Counts of requests, beside those of the service."""

    def __init__(self, service: Service):
        self._registry = CollectorRegistry()
        self._registry.register(ServiceCollector(service))
        self.requests = Counter(
            "tinyllm_http_requests",
            "HTTP requests answered",
            ("path", "status"),
            registry=self._registry,
        )
        self.first_token_seconds = Histogram(
            "tinyllm_first_token_seconds",
            "from a request to its first token",
            buckets=SECONDS,
            registry=self._registry,
        )
        self.answer_seconds = Histogram(
            "tinyllm_answer_seconds",
            "from a request to the end of its answer",
            buckets=SECONDS,
            registry=self._registry,
        )

    def text(self) -> bytes:
        """Write all of them as Prometheus reads them."""
        return generate_latest(self._registry)
