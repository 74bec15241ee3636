"""A real `kif serve` on 127.0.0.1, in a process of its own, and the few HTTP calls that the tests make."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

ADMIN = "admin-key-of-the-tests"
OWNER = "the-owners-key"  # of a key that the allow-list gives more than others
FLAGS = [
    "--host", "127.0.0.1", "--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "64", "--block-size", "32",
    "--seed", "0", "--served-model-name", "m",
]  # fmt: skip
START_SECONDS = 900


class Server:
    """`kif`: the kif table of --additional-config, without its directory."""

    def __init__(
        self,
        capsules: Path,
        log: Path,
        kif: dict[str, Any] | None = None,
        flags: tuple[str, ...] = ("--enforce-eager",),
    ):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{self.port}", log
        command = [
            sys.executable, "-m", "kif_cli.main", "serve", "embedded", "--capsules", str(capsules), "--",
            *FLAGS, *flags, "--port", str(self.port), "--additional-config", json.dumps({"kif": kif or {}}),
        ]  # fmt: skip
        environment = os.environ | {
            "KIF_ADMIN_KEY": ADMIN, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_LOGGING_LEVEL": "INFO",
        }  # fmt: skip
        with log.open("wb") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)

    def wait(self) -> "Server":
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended with {self.process.returncode}: {self.tail()}")
            try:
                if self.get("/health")[0] == 200:
                    return self
            except OSError:
                time.sleep(0.5)
        raise RuntimeError(f"the server did not start: {self.tail()}")

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-3000:]

    def call(self, method: str, path: str, body: Any = None, key: str | None = None, **headers: str) -> tuple[int, Any]:
        """(status, parsed answer, or its text). `body` bytes go as they are, else as JSON."""
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        headers = {"content-type": "application/json"} | {k.replace("_", "-"): v for k, v in headers.items()}
        if key is not None:
            headers["authorization"] = f"Bearer {key}"
        request = urllib.request.Request(self.url + path, data=data, method=method, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.status, _parsed(answer.read())
        except urllib.error.HTTPError as refusal:
            return refusal.code, _parsed(refusal.read())

    def get(self, path: str, key: str | None = None) -> tuple[int, Any]:
        return self.call("GET", path, key=key)

    def complete(self, prompt: Any, ids: Any = None, key: str | None = None, **more: Any) -> tuple[int, Any]:
        """A completion by plain HTTP: what a client library would not let through can be sent."""
        body = {"model": "m", "prompt": prompt, "max_tokens": 8, "temperature": 0} | more
        return self.call("POST", "/v1/completions", body | ({} if ids is None else {"vllm_xargs": {"kif": ids}}), key)

    def text(self, prompt: str, ids: Any = None, **more: Any) -> str:
        status, answer = self.complete(prompt, ids, **more)
        assert status == 200, answer
        return answer["choices"][0]["text"]

    def metrics(self) -> dict[str, float]:
        """KIF's series."""
        lines = self.get("/metrics")[1].splitlines()
        return {line.split()[0]: float(line.split()[-1]) for line in lines if line.startswith("kif_")}

    def close(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(30)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def _parsed(data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError:
        return data.decode(errors="replace")
