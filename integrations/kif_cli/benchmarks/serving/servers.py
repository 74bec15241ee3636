"""A vLLM server in a process group of its own, from its start until it answers, and to its end."""

import os
import signal
import socket
import subprocess
import time
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Self

from kif_runtime.errors import KifError, one_line
from kif_runtime.files import shown
from kif_vllm.serve import Launch

START_SECONDS = 1800.0
STOP_SECONDS = 30.0
HOST = "127.0.0.1"
COUNTERS = ("requests_touched", "gate_seconds", "forward_seconds")


class Server:
    """Started when made; `with` waits until it answers, and ends it. log: where its output goes."""

    def __init__(self, launch: Launch, log: Path) -> None:
        with socket.socket() as free:
            free.bind((HOST, 0))
            self.port: int = free.getsockname()[1]
        self.log = log
        command = [*launch.command, "--host", HOST, "--port", str(self.port)]
        with log.open("wb") as file:
            try:
                self._process = subprocess.Popen(
                    command, stdout=file, stderr=file, env=launch.environment, start_new_session=True
                )
            except OSError:
                raise KifError("vLLM is not installed here; install it with: pip install 'kif-runtime[vllm]'") from None

    def __enter__(self) -> Self:
        """Raises KifError, with the last words of the log, where the server does not come up."""
        try:
            self._wait()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._end()

    def counters(self) -> dict[str, float]:
        """KIF's totals since the start, those of COUNTERS; 0 for a stock server."""
        found = dict.fromkeys(COUNTERS, 0.0)
        for line in self._get("/metrics").splitlines():
            for name in found:
                if line.startswith(f"kif_{name}_total"):
                    found[name] = float(line.split()[-1])
        return found

    def cpu_seconds(self) -> float:
        """What the processes of the server have used so far; 0 where the system does not tell. In steps of 10 ms.

        A machine that does other work beside it lets this alone, unlike the time that passes.
        """
        ticks = 0
        for path in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):  # it may just have ended
                parts = path.read_text().rpartition(")")[2].split()
                if int(parts[2]) == self._process.pid:  # its process group
                    ticks += int(parts[11]) + int(parts[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def _get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://{HOST}:{self.port}{path}", timeout=60) as answer:
            return answer.read().decode()

    def _wait(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                lines = self.log.read_text(errors="replace").strip().splitlines() or ["it printed nothing"]
                told = [line for line in lines if "Error" in line] or lines
                raise KifError(f"a server did not start ({one_line(told[-1], 300)}); all of it is in {shown(self.log)}")
            try:
                self._get("/health")
                return
            except OSError:
                time.sleep(0.5)
        raise KifError(f"a server did not answer within {START_SECONDS:.0f} s; its output is in {shown(self.log)}")

    def _end(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_SECONDS)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
