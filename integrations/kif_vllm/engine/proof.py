"""The proof that suppression is live: a request through the engine itself, seen at every site on every rank.

The proof's own capsule fires on every token and removes a random plane. At each site the workers keep the sum that came
in and what it became, and compare that with the operator's reference; a site that did not run, a gate that did not
open, a residual that is not what it should be, or ranks that differ end the start of the server.
"""

import time
from typing import Any

import torch

from kif_runtime.capsule import Capsule, Signature
from kif_runtime.errors import KifError

from ..sets import CapsuleSet, version
from ..worker import install, witness
from ..worker.suppression import Change

ID = "kif-proof"
TOKENS = 48  # at least
SECONDS = 120.0


class ProofError(KifError):
    """Suppression was not shown to be live."""


def prove(core: Any) -> dict[str, Any]:
    """Run the proof in a core that is between steps. Gives what was seen. Raises ProofError."""
    service = core.kif
    capsule = _capsule(service.room)
    name = version(capsule.id, capsule.digest)
    chosen = CapsuleSet("", (name,))
    service.apply(Change(add=(capsule,)))
    try:
        seen = _run(core, chosen, "on")
        idle = _run(core, CapsuleSet(), "off")
    finally:
        service.apply(Change(drop=(name,)))
    sites = _judge(seen, idle, service.room.sites)
    return {"ranks": len(seen), "sites": sites}


def _run(core: Any, chosen: CapsuleSet, tag: str) -> list[dict[int, dict[str, Any]]]:
    """Per rank and site, what was witnessed while the probe request ran."""
    request = _request(core, chosen, tag)
    prompt = request.num_prompt_tokens
    core.collective_rpc(witness.start, args=(chosen, 2 * prompt))  # some may be computed again, after a preemption
    core.scheduler.add_request(request)
    deadline = time.monotonic() + SECONDS
    try:
        while not request.is_finished():
            if time.monotonic() > deadline:
                raise ProofError(f"the proof's request did not finish in {SECONDS:.0f} s; is the engine overloaded?")
            if hasattr(core, "_process_engine_step"):
                core._process_engine_step()
            else:
                _, executed = core.step_fn()
                core.post_step(executed)
    finally:
        core.abort_requests([request.request_id])  # where it is not finished; its capsule is about to go
        seen = core.collective_rpc(witness.stop)
    counts = core.collective_rpc(install.evidence, args=(request.request_id,))
    if chosen and any(sum((count or {}).values()) <= prompt for count in counts):
        raise ProofError(f"the gate was counted on {counts} of {prompt} tokens and those generated after them")
    return seen


def _request(core: Any, chosen: CapsuleSet, tag: str) -> Any:
    from vllm import SamplingParams
    from vllm.v1.request import Request

    from .service import with_set

    rng = torch.Generator().manual_seed(7)
    vocabulary = core.vllm_config.model_config.get_vocab_size()
    tokens = torch.randint(0, min(vocabulary, 1000), (_length(core.vllm_config),), generator=rng).tolist()
    params = SamplingParams(
        temperature=0.0, max_tokens=2, min_tokens=2, ignore_eos=True, skip_reading_prefix_cache=True
    )
    return Request(
        request_id=f"{ID}-{tag}-{time.monotonic_ns()}",
        prompt_token_ids=tokens,
        sampling_params=with_set(params, chosen),
        pooling_params=None,
        cache_salt=f"{ID}-{time.monotonic_ns()}",  # its KV is nobody else's
        block_hasher=core.request_block_hasher,
    )


def _length(config: Any) -> int:
    """Longer than any captured graph, where there is room: a graph that is replayed runs no Python, so nothing is seen
    there but the counts; those cover the tokens that are generated.
    """
    captured = config.compilation_config.max_cudagraph_capture_size or 0
    room = min(config.model_config.max_model_len - 2, config.scheduler_config.max_num_batched_tokens)
    return min(room, max(TOKENS, captured + 1))


def _capsule(room: Any) -> Capsule:
    """Fires on every token (a bias of 1 and no detector), rank 2."""
    rng = torch.Generator().manual_seed(11)
    signatures = []
    for site in room.sites:
        rank = min(2, room.rank, room.width)
        basis = torch.linalg.qr(torch.randn(room.width, rank, generator=rng, dtype=torch.float64))[0].T.float()
        signatures.append(
            Signature(
                site, "last", torch.zeros(room.width), torch.tensor(1.0), basis.contiguous(), torch.zeros(rank),
                torch.tensor(1.0),
            )
        )  # fmt: skip
    return Capsule(ID, tuple(signatures), room.fingerprint, room.width, room.blocks)


def _judge(seen: list[dict], idle: list[dict], wanted: tuple[int, ...]) -> dict[int, dict[str, Any]]:
    for rank, sites in enumerate(seen):
        for block, found in sites.items():
            where = f"block {block} on rank {rank}"
            if found["tokens"] < 2 or found["fired"] != found["tokens"]:
                raise ProofError(f"at {where} the gate opened on {found['fired']} of {found['tokens']} tokens")
            if not found["moved"]:
                raise ProofError(f"at {where} the residual stayed as it was")
            if found["error"] > found["allowed"]:
                raise ProofError(
                    f"at {where} the residual is off by {found['error']:.3g}, {found['allowed']:.3g} allowed"
                )
            if idle[rank][block]["fired"] or idle[rank][block]["moved"]:
                raise ProofError(f"at {where} a request without capsules was changed")
            if sites[block]["gates"] != seen[0].get(block, sites[block])["gates"]:
                raise ProofError(f"at {where} gates differ from those of rank 0")
    if missing := set(wanted) - {block for sites in seen for block in sites}:
        raise ProofError(f"the sites {sorted(missing)} ran on no rank")
    return {block: {k: f[k] for k in ("tokens", "fired", "error", "allowed")} for block, f in sorted(seen[0].items())}
