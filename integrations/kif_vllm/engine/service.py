"""One engine's KIF: its ledger and library, changes to the workers, and the commands that the front end may send."""

import logging
from collections.abc import Iterable
from typing import Any, Literal

from kif_runtime.capsule import Capsule
from kif_runtime.errors import BankError, CapsuleError, KifError, RequestError
from kif_runtime.mining.control import usual_sites

from ..config import KifConfig
from ..sets import KEY, OP_VERSION, CapsuleSet, digest_of, id_of, version
from ..worker import install
from ..worker.suppression import Change, Room
from .ledger import Ledger
from .library import Library, served_model
from .refusals import refuse_what_is_not_proven

log = logging.getLogger("vllm.kif")

InFlight = Literal["finish", "abort"]
PROBES = 1  # room for the proof's own capsule, beside what was asked for
AT_LEAST = {"capsules": 256, "signatures": 256, "rank": 4, "requests": 1024}


class Service:
    """Made while an engine core starts, after its model was loaded and before the first forward."""

    def __init__(self, core: Any, config: KifConfig) -> None:
        vllm = core.vllm_config
        refuse_what_is_not_proven(vllm)
        self.core, self.config = core, config
        model = vllm.model_config
        self.library = Library(
            config.capsules,
            served_model(
                model.model, config.base, model.get_hidden_size(), model.get_total_num_hidden_layers(), model.revision
            ),
        )
        capsules = self.library.read_all()
        self.ledger = Ledger(config.mandatory)
        config.check_mandatory({capsule.id for capsule in capsules})
        self.held: dict[str, Capsule] = {}
        self.room = self._room(capsules)
        found = self._rpc(install.install, self.room, {"op": OP_VERSION, "sites": list(self.room.sites)})
        if set(self.room.sites) != {site for sites in found for site in sites}:
            raise KifError(f"sites {self.room.sites} were asked for, the workers have {found}; nothing is served")
        self._change(load=capsules, in_flight="finish")  # there is no scheduler yet, and no request
        log.info("KIF: %d capsules, %d mandatory, sites %s", len(capsules), len(self.ledger.mandatory), self.room.sites)

    def serve(self) -> None:
        """vLLM's set-up is over, warm-up and the recording of graphs with it: what comes now are requests."""
        self._rpc(install.serve)

    # -- requests

    def freeze(self, request: Any) -> None:
        """Resolve what an EngineCoreRequest names to versions, and key its KV by them. Raises RequestError."""
        if request.sampling_params is None or request.resumable:
            raise RequestError("KIF serves generation only, and no streamed input")
        asked = (request.sampling_params.extra_args or {}).get(KEY) or ()
        chosen = self.ledger.freeze(request.request_id, asked)
        request.cache_salt = self.ledger.salt(chosen, request.cache_salt)
        request.sampling_params = with_set(request.sampling_params, chosen)

    def tell_aborted(self, requests: list[Any]) -> None:
        if hasattr(self.core, "_send_abort_outputs"):  # not where the engine runs in the caller's process
            self.core._send_abort_outputs(requests)

    # -- commands; each gives plain data, and raises KifError for what the caller can mend

    def status(self) -> dict[str, Any]:
        mandatory = set(self.ledger.mandatory)
        return {
            "generation": self.ledger.generation,
            "capsules": [
                {"id": id, "digest": digest_of(v)[:12], "mandatory": id in mandatory}
                for id, v in sorted(self.ledger.current.items())
            ],
            "versions_held": len(self.held),
            "requests": self.ledger.live,
            "room": {"capsules": self.room.capsules - PROBES, "signatures": self.room.signatures - PROBES},
            "sites": list(self.room.sites),
        }

    def load(self, name: str, in_flight: InFlight | None = None) -> dict[str, Any]:
        """Load, or load again, one file of the directory."""
        return self._change(load=[self.library.read(name)], in_flight=in_flight)

    def unload(self, id: str, in_flight: InFlight | None = None) -> dict[str, Any]:
        """Take a capsule out. Its file stays, so that loading it again undoes this."""
        return self._change(unload=[id], in_flight=in_flight)

    def rescan(self) -> dict[str, Any]:
        """What changed in the directory since the last look. A bad file is refused alone; all else goes on.

        `waiting`: how many files may do better at another look, such as those for which there was no room.
        """
        found, gone, problems = self.library.changes()
        done, waiting = [], 0
        for id in gone:  # first: they make room
            if (held := self.ledger.current.get(id)) is not None and self.ledger.is_named(id):
                problems.append(
                    f"the file of a mandatory capsule, of digest {digest_of(held)[:12]}, is gone; the capsule still "
                    "applies; put the file back, or take the id out of the configuration and restart"
                )
            elif held is not None:
                done.append(self._change(unload=[id]) | {"act": "unload"})
            self.library.forget(id)
        for file in found:
            capsule = file.capsule
            try:
                done.append(self._change(load=[capsule]) | {"act": "load"})
            except KifError as problem:  # goes to the server's log, which names no capsule
                is_final = isinstance(problem, CapsuleError)
                waiting += not is_final
                if is_final or self.library.postpone(file):
                    whole = repr(version(capsule.id, capsule.digest))
                    problems.append(str(problem).replace(whole, f"of digest {capsule.digest[:12]}"))
                if not is_final:
                    continue
            self.library.keep(file)
        self.retire()
        return {"changes": done, "refused": problems, "waiting": waiting, "generation": self.ledger.generation}

    def evidence(self, requests: list[str]) -> dict[str, Any]:
        """{"applied": ids, "fired": id → tokens}, summed over those of `requests` that this engine still remembers."""
        applied: set[str] = set()
        fired: dict[str, int] = {}
        for request in requests:
            applied.update(id_of(v) for v in self.ledger.applied(request))
            for name, count in (self._rpc(install.evidence, request)[0] or {}).items():
                fired[id_of(name)] = fired.get(id_of(name), 0) + count
        return {"applied": sorted(applied), "fired": fired}

    def figures(self) -> dict[str, Any]:
        """Every rank computes the same tokens and takes the same decisions, so the first speaks for all."""
        return self._rpc(install.figures)[0]

    def retire(self) -> None:
        """Let versions go that nothing uses any more."""
        drop, bases = self.ledger.retire(self.held)
        if drop or bases:
            self.apply(Change(drop=drop, drop_bases=bases))
            for name in drop:
                del self.held[name]

    # -- how a change is made

    def _change(
        self, load: Iterable[Capsule] = (), unload: Iterable[str] = (), in_flight: InFlight | None = None
    ) -> dict[str, Any]:
        """Workers first, then the ledger: a request is frozen under versions that every worker has."""
        load, unload = list(load), list(unload)
        for capsule in load:
            self._check_sites(capsule)
        self.retire()  # first: what it lets go, and this change brings back, must be sent to the workers again
        before = self.ledger.current
        current, base, versions = self.ledger.preview(load, unload)
        new = {version(c.id, c.digest): c for c in load}
        new = {name: capsule for name, capsule in new.items() if name not in self.held}
        if (needed := len(self.held) + len(new)) > (most := self.room.capsules - PROBES):
            raise BankError(
                f"there is room for {most} capsules (max_capsules), with replaced ones that requests still use, and "
                f"{needed} would be held; unload some, or restart the server with more room; nothing was changed"
            )
        self.apply(Change(tuple(new.values()), () if self.ledger.knows_base(base) else ((base, versions),)))
        self.held |= new
        mandatory = set(self.ledger.mandatory)
        self.ledger.commit(current, base, versions)
        mandatory |= set(self.ledger.mandatory)
        ids = [*(c.id for c in load), *unload]
        chosen = in_flight or ("abort" if mandatory.intersection(ids) else "finish")
        replaced = [before[id] for id in ids if id in before and before[id] != current.get(id)]
        aborted = self._abort(self.ledger.touched_by(replaced)) if chosen == "abort" else 0
        self.retire()
        digests = [digest_of(current[c.id])[:12] for c in load] + [digest_of(before[id])[:12] for id in unload]
        done = {"ids": ids, "digests": digests, "in_flight": chosen, "aborted": aborted}
        return done | {"generation": self.ledger.generation}

    def apply(self, change: Change) -> None:
        answers = self._rpc(install.apply, change)
        if len({repr(answer) for answer in answers}) != 1:
            raise KifError("the workers do not hold the same capsules any more; restart the server")
        if problem := answers[0].get("error"):
            raise BankError(f"{problem}; nothing was changed")

    def _abort(self, requests: list[str]) -> int:
        from vllm.v1.request import RequestStatus

        aborted = self.core.scheduler.finish_requests(requests, RequestStatus.FINISHED_ABORTED)
        self.ledger.doom(set(requests).difference(request.request_id for request in aborted))
        self.tell_aborted(aborted)
        return len(aborted)

    def _rpc(self, function: Any, *args: Any) -> list[Any]:
        return self.core.collective_rpc(function, args=args)

    # -- checks

    def _room(self, capsules: list[Capsule]) -> Room:
        config, vllm, served = self.config, self.core.vllm_config, self.library.served
        at_sites = [s.site for c in capsules for s in c.signatures]
        if not at_sites and not config.sites:
            raise CapsuleError("the capsule directory is empty; name sites in the kif configuration")
        sites = config.sites or tuple(sorted({*at_sites, *usual_sites(served.blocks)}))
        most = max((at_sites.count(site) for site in set(at_sites)), default=0)
        rank = max((s.rank for c in capsules for s in c.signatures), default=1)
        running = vllm.scheduler_config.max_num_seqs
        described = self._rpc(install.describe)
        return Room(
            width=served.width,
            blocks=served.blocks,
            fingerprint=served.fingerprint,
            sites=sites,
            capsules=PROBES + (config.max_capsules or max(AT_LEAST["capsules"], 2 * len(capsules))),
            signatures=PROBES + (config.max_signatures or max(AT_LEAST["signatures"], 2 * most)),
            rank=config.max_rank or max(AT_LEAST["rank"], rank),
            sets=running + PROBES,
            requests=max(AT_LEAST["requests"], 2 * running),
            max_tokens=max(d["max_tokens"] for d in described),
        )

    def _check_sites(self, capsule: Capsule) -> None:
        if outside := sorted(set(capsule.sites) - set(self.room.sites)):
            raise CapsuleError(
                f"the capsule has signatures at blocks {outside}, this server's sites are {list(self.room.sites)}; "
                "restart it with these among its sites"
            )


def with_set(params: Any, chosen: CapsuleSet) -> Any:
    """A copy: several requests may share one object of sampling parameters."""
    from copy import copy

    params = copy(params)
    params.extra_args = {**(params.extra_args or {}), KEY: chosen}
    return params
