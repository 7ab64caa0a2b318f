"""A bundle in the stock LiteRT-LM engine as `bench` measures it: the engine tokenises, samples and times itself."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

from litert_lm import interfaces

from conversion.litert.engine import Engine


class LiteRtLm(Engine):
    """A `bench_worker.Model`. The start token, which the engine adds to a text, counts as one of it."""

    def __init__(self, path: str, threads: int, cache: str) -> None:
        super().__init__(path, threads, cache, measured=True)
        self._text, self._seed = ExitStack(), 0

    def prefill(self, text: str, ids: Sequence[int]) -> dict[str, float]:
        """See `Model.prefill`."""
        self.start(1)
        found = self.read(text, ids)
        self.write(ids[:1])
        return found | {"ttft": self._info().time_to_first_token_in_second}

    def start(self, decode: int) -> None:
        """See `Model.start`."""
        self._text.close()  # the engine has room for one
        self._seed += 1
        # At temperature 1 it neither repeats itself nor settles on the same few experts.
        sampler = interfaces.SamplerConfig(top_k=64, top_p=1.0, temperature=1.0, seed=self._seed)
        self._running = self._text.enter_context(
            self._engine.create_session(
                apply_prompt_template=False, sampler_config=sampler, max_output_tokens=decode
            )
        )

    def read(self, text: str, ids: Sequence[int]) -> dict[str, float]:
        """See `Model.read`."""
        self._running.run_prefill([text])
        info = self._info()
        return _timed(info.last_prefill_token_count, info.last_prefill_tokens_per_second)

    def write(self, ids: Sequence[int]) -> dict[str, float]:
        """See `Model.write`; the tokens are the engine's own, and fewer where its answer ends."""
        self._running.run_decode()
        info = self._info()
        return _timed(info.last_decode_token_count, info.last_decode_tokens_per_second)

    def _info(self) -> interfaces.BenchmarkInfo:
        return self._running.get_benchmark_info()


def _timed(tokens: int, per_second: float) -> dict[str, float]:
    return {"tokens": tokens, "seconds": tokens / per_second if per_second else 0.0}
