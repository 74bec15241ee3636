"""The V1 model runner (the CPU's, and the GPU's where V2 cannot be used): when a batch is final, and when it has run.

Only the one instance is wrapped. A request's set comes with its sampling parameters, which the runner keeps for as long
as the request lives, through preemption and reordering; so no state of our own can go stale.
"""

from typing import Any

import torch

from ..sets import KEY
from .suppression import Suppression


def attach(runner: Any, suppression: Suppression) -> None:
    prepare, forward, dummy = runner._prepare_inputs, runner._model_forward, runner._dummy_run

    def prepare_inputs(scheduler_output: Any, num_scheduled_tokens: Any) -> Any:
        """Here the persistent batch has its final order."""
        result = prepare(scheduler_output, num_scheduled_tokens)
        requests = list(runner.input_batch.req_ids[: runner.input_batch.num_reqs])
        sets = [(runner.requests[id].sampling_params.extra_args or {}).get(KEY) for id in requests]
        starts = torch.zeros(len(requests) + 1, dtype=torch.int32)
        starts[1:] = torch.from_numpy(num_scheduled_tokens).cumsum(0)
        suppression.begin(requests, sets, starts.to(runner.device), int(starts[-1]))
        return result

    def model_forward(*args: Any, **kwargs: Any) -> Any:
        with suppression.tally.timed():
            output = forward(*args, **kwargs)
        suppression.end()
        return output

    def dummy_run(*args: Any, **kwargs: Any) -> Any:
        suppression.idle()
        return dummy(*args, **kwargs)

    runner._prepare_inputs, runner._model_forward, runner._dummy_run = prepare_inputs, model_forward, dummy_run
