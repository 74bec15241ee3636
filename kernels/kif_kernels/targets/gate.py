"""What compiled kernels must hold to. Whoever ships a configuration that does not is told which, where and why."""

from collections.abc import Iterable

from .building import Build
from .machine_code import Access
from .traffic import Traffic

ROW_BITS, MOST_TRAFFIC = 128, 1.02


def failures(builds: Iterable[Build], traffic: Iterable[Traffic] = ()) -> list[str]:
    """One line for each promise broken: no spilt register, no local memory, rows of D numbers moved 128 bits at a
    time (in tiles, too), and with one capsule at most 1.02 times the bytes that have to be moved. Empty where all hold.
    """
    found = []
    for built in builds:
        what = f"{built.launch.name} (D {built.launch.width}) on {built.gpu.name}"
        if built.resources.spills:
            found.append(f"{what}: {built.resources.spills} spills; fewer rows or columns a program, or more warps")
        if built.resources.local:
            found.append(f"{what}: {built.resources.local} bytes of local memory a thread")
        rows = [a for a in built.accesses if a.of_row and _counts(built, a)]
        if not rows:
            found.append(f"{what}: no load or store of a row was recognised")
        found += [
            f"{what}: {a.count} {a.kind}s of {a.bits} bits at {a.file}:{a.line}" for a in rows if a.bits < ROW_BITS
        ]
    for counted in traffic:
        if counted.signatures == 1 and counted.ratio > MOST_TRAFFIC:
            found.append(f"D {counted.width}: {counted.ratio:.3f} times the bytes that have to be moved")
    return found


def _counts(built: Build, access: Access) -> bool:
    """A tile kernel is judged by its screen: the tokens that it edits are few, and tiles take more warps than a narrow
    token has 128 bits for.
    """
    return built.launch.kernel.__name__ != "suppress_tile_kernel" or access.file.endswith("triton_screen.py")
