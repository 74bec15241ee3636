"""The GPUs that kernels are compiled for, with the published numbers that estimates rest on."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """name: as in `tuned.json`. bandwidth: of its memory, bytes per second, as the vendor publishes for `product`.

    registers: 32-bit ones of a multiprocessor (of a SIMD unit's lane on AMD). shared: bytes of shared memory of one.
    warps: the most that are resident on one. granularity: registers come in such portions, per warp (per lane on AMD).
    """

    name: str
    product: str
    bandwidth: float
    registers: int
    shared: int
    warps: int
    granularity: int
    lanes: int = 32

    @property
    def amd(self) -> bool:
        return self.name.startswith("gfx")

    def occupancy(self, registers: int, shared: int, warps: int) -> float:
        """Share of the warps that can be resident which are, for programs of `warps` warps and `shared` bytes."""
        portion = -(-max(registers, 1) * (1 if self.amd else self.lanes) // self.granularity) * self.granularity
        if self.amd:  # four SIMD units, each with its own registers
            by_registers = 4 * min(self.warps // 4, self.registers // portion) // warps
        else:
            by_registers = self.registers // portion // warps
        by_shared = self.shared // shared if shared else self.warps
        return min(self.warps // warps, by_registers, by_shared) * warps / self.warps


# Bandwidths: the vendors' data sheets of these products. The rest: CUDA C++ Programming Guide, "Compute Capabilities",
# and AMD's CDNA 3 ISA reference (512 registers a lane; 8 waves on each of 4 SIMD units; 64 KiB of LDS).
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("sm_80", "A100 SXM 80 GB", 2.039e12, 65536, 164 << 10, 64, 256),
        Gpu("sm_90", "H100 SXM", 3.35e12, 65536, 228 << 10, 64, 256),
        Gpu("sm_100", "B200", 8.0e12, 65536, 228 << 10, 64, 256),
        Gpu("gfx942", "MI300X", 5.3e12, 512, 64 << 10, 32, 8, lanes=64),
    )
}
