"""What KIF costs inside vLLM's engine: tokens per second as a ratio to stock vLLM, interleaved in one process.

    .venv-vllm/bin/python bench/vllm_overhead.py [--rounds 9] [--capsules 0,1,100,1000] [--compiled] [--csv FILE]

One engine is stock, the others carry KIF with that many capsules: resident (requests name none), mandatory (all apply
to every token), and requested (mandatory none, each request names one). Each round runs the same requests through
every engine, in an order that rotates; a ratio is taken within a round, so that what the machine does meanwhile falls
on all. Printed: median and quartiles over rounds. Capsules are copies of one mined here with their detectors turned at
random: of the size of mined ones, and not firing on the prompts.
"""

import argparse
import csv
import os
import platform
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

PROMPT, GENERATED, REQUESTS = 64, 24, 8


def turned(capsule, number, rng):
    """A capsule of the same form that looks for something else."""
    import torch

    def turn(signature):
        noise = torch.randn(signature.detector.shape, generator=rng)
        detector = noise * (signature.detector.norm() / noise.norm())
        return replace(signature, detector=detector, bias=signature.bias - 8.0)

    return replace(capsule, id=f"turned-{number}", signatures=tuple(map(turn, capsule.signatures)))


def engine(model, folder, mandatory, compiled, sites=None):
    from vllm import LLM

    kif = {} if folder is None else {"kif": {"capsules": str(folder), "mandatory": mandatory, "sites": sites}}
    return LLM(
        str(model), dtype="float32", enforce_eager=not compiled, max_model_len=256, max_num_seqs=16, block_size=32,
        distributed_executor_backend="uni", additional_config=kif, enable_prefix_caching=False, seed=0,
    )  # fmt: skip


def prepared(counts, folder):
    """Directories with so many capsules, by count; and the sites of them all."""
    import torch

    from kif_runtime import load_model, mine

    model, tokenizer = load_model("embedded", device="cpu")
    capsule, rng = mine(model, tokenizer, "France"), torch.Generator().manual_seed(0)
    for count in counts:
        place = folder / str(count)
        place.mkdir()
        for number in range(count):
            one = turned(capsule, number, rng)
            one.save(place / f"{one.id}.kif.safetensors")
    return list(capsule.sites)


def run(llm, ids, seed):
    """Tokens per second, prompt and generated together."""
    import torch
    from vllm import SamplingParams

    rng = torch.Generator().manual_seed(seed)
    prompts = torch.randint(100, 20_000, (REQUESTS, PROMPT), generator=rng).tolist()
    extra = None if ids is None else {"kif": ids}
    params = SamplingParams(
        temperature=0, max_tokens=GENERATED, min_tokens=GENERATED, ignore_eos=True, extra_args=extra
    )
    start = time.perf_counter()
    llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    return REQUESTS * (PROMPT + GENERATED) / (time.perf_counter() - start)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--capsules", default="0,1,100,1000")
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--csv", type=Path)
    chosen = parser.parse_args()
    counts = [int(n) for n in chosen.capsules.split(",")]
    from kif_runtime.models import embedded_folder

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sites, model = prepared(counts, folder), embedded_folder()
        (folder / "0").mkdir(exist_ok=True)
        made = {("stock", 0): (engine(model, None, [], chosen.compiled), None)}
        for count in counts:
            resident = engine(model, folder / str(count), [], chosen.compiled, sites)
            made["resident" if count else "idle", count] = (resident, None)
            if count:
                made["requested", count] = (resident, ["turned-0"])
                made["mandatory", count] = (engine(model, folder / str(count), "all", chosen.compiled, sites), None)
        names, ratios, speeds = list(made), {name: [] for name in made}, {name: [] for name in made}
        for each in names:
            run(*made[each], seed=-1)
        for turn in range(chosen.rounds):
            order = names[turn % len(names) :] + names[: turn % len(names)]
            found = {each: run(*made[each], seed=turn) for each in order}
            for each in names:
                speeds[each].append(found[each])
                ratios[each].append(found[each] / found["stock", 0])
    report(ratios, speeds, chosen)


def report(ratios, speeds, chosen):
    rows = []
    for (kind, count), values in ratios.items():
        low, middle, high = statistics.quantiles(values, n=4)
        rows.append(
            [kind, count, chosen.compiled, chosen.rounds, low, middle, high, statistics.median(speeds[kind, count])]
        )
        print(f"{kind:10} {count:6}  {middle:.3f}  [{low:.3f}, {high:.3f}]  {rows[-1][-1]:7.1f} tokens/s")
    if chosen.csv:
        import torch
        import vllm

        provenance = [vllm.__version__, torch.__version__, platform.processor() or platform.machine(), os.cpu_count()]
        with chosen.csv.open("w", newline="") as file:
            writer = csv.writer(file)
            head = ["kind", "capsules", "compiled", "rounds", "p25", "p50", "p75", "tokens_per_second"]
            writer.writerow([*head, "vllm", "torch", "machine", "cores"])
            writer.writerows([*row, *provenance] for row in rows)


if __name__ == "__main__":
    main()
