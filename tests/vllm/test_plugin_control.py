"""The watch over the directory: files that vanish while it looks, and what its lines in the log say."""

import asyncio
import logging
import os
from types import SimpleNamespace

import pytest

pytestmark = pytest.mark.slow  # the module imports what only vLLM brings along


@pytest.fixture
def control():
    from kif_vllm.front import control

    return control


@pytest.fixture
def watch(control, tmp_path):
    made = control.Control(None)
    made._config = SimpleNamespace(capsules=tmp_path)
    return made


class Vanished:
    """A directory entry whose file goes between being listed and being looked at."""

    name = "a-subject.kif.safetensors"

    def is_file(self):
        return True

    def stat(self):
        return os.stat(f"/nowhere/{self.name}")


def test_a_file_that_vanishes_while_the_directory_is_listed_is_passed_over(control, watch, tmp_path, monkeypatch):
    (tmp_path / "there").touch()
    (there,) = os.scandir(tmp_path)

    class Scan(list):
        def __enter__(self):
            return self

        def __exit__(self, *error):
            return None

    monkeypatch.setattr(control.os, "scandir", lambda folder: Scan([Vanished(), there]))
    assert [name for name, _, _ in watch._listing()] == ["there"]


def turns(control, watch, count, commands):
    """Let the watch look `count` times; the seconds that it waited after each."""
    waited = []

    async def sleep(seconds):
        waited.append(seconds)
        if len(waited) == count:
            raise asyncio.CancelledError

    async def command(name):
        commands.append(name)
        return {"refused": [], "waiting": len(commands) == 1}

    watch.command = command
    with pytest.MonkeyPatch.context() as patch, pytest.raises(asyncio.CancelledError):
        patch.setattr(control.asyncio, "sleep", sleep)
        asyncio.run(watch._watch(1.0))
    return waited


def test_an_error_of_the_file_system_is_logged_without_a_path(control, watch, caplog):
    def listing():
        return os.listdir("/nowhere/a-subject.kif.safetensors")

    watch._listing = listing
    with caplog.at_level(logging.ERROR, logger="vllm.kif"):
        turns(control, watch, 1, [])
    assert "No such file or directory" in caplog.text
    assert "a-subject" not in caplog.text


def test_files_that_wait_for_room_are_tried_again_though_nothing_changed(control, watch):
    commands = []
    assert turns(control, watch, 3, commands) == [control.RETRY, 1.0, 1.0]
    assert commands == ["rescan", "rescan"]
