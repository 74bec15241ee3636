"""The kernels compiled ahead of time for GPUs that need not be there, and what their machine code says.

`build` compiles what ships, with the launchers' own arguments and configurations; `Build` says per kernel and target
how many registers, spills, bytes of local and shared memory, how wide its accesses are and how long each pass took.
`traffic` counts the bytes a token moves. `failures` is the gate. Needs triton; no GPU.
"""

from .building import Build, build
from .gate import failures
from .gpus import GPUS, Gpu
from .launches import Launch, shipped
from .report import fusion, rows
from .traffic import Traffic, traffic

__all__ = ["GPUS", "Build", "Gpu", "Launch", "Traffic", "build", "failures", "fusion", "rows", "shipped", "traffic"]
