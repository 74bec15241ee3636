"""The V2 model runner, GPUs' default: its `model_state` hears of requests and of batches just before they run.

Written against the classes of vLLM 0.32 and tested with them on a CPU, where the runner itself does not run: it needs
Triton. Not run on a GPU.
"""

from typing import Any

from ..sets import KEY, CapsuleSet
from .suppression import Suppression


class Listener:
    """Stands before the runner's ModelState and passes everything on."""

    def __init__(self, inner: Any, suppression: Suppression) -> None:
        self._inner, self._suppression = inner, suppression
        self._sets: dict[str, CapsuleSet | None] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        """Also called when a preempted request comes back, with its sampling parameters."""
        params = new_req_data.sampling_params
        self._sets[new_req_data.req_id] = (params.extra_args or {}).get(KEY) if params is not None else None
        self._inner.add_request(req_index, new_req_data)

    def remove_request(self, req_id: str) -> None:
        self._sets.pop(req_id, None)
        self._inner.remove_request(req_id)

    def prepare_inputs(self, input_batch: Any, req_states: Any) -> dict[str, Any]:
        """Right before the forward, eager, piecewise or replayed. Dummy batches have ids that nobody added; those of
        vLLM's warm-up were added, without a set, and `Suppression.warming` is for them.
        """
        requests = list(input_batch.req_ids)
        if any(id not in self._sets for id in requests):
            if any(id in self._sets for id in requests):
                raise RuntimeError("a batch mixes requests that KIF knows with others; nothing is computed for it")
            self._suppression.idle()
        else:
            sets = [self._sets[id] for id in requests]
            starts = input_batch.query_start_loc[: len(requests) + 1]
            self._suppression.begin(requests, sets, starts, input_batch.num_tokens)
        prepared: dict[str, Any] = self._inner.prepare_inputs(input_batch, req_states)
        return prepared


def attach(runner: Any, suppression: Suppression) -> None:
    runner.model_state = Listener(runner.model_state, suppression)
