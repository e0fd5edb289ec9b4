"""`kvist picker` as a user meets it: errors in one line, files that Envoy takes."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("httptools")

from kvist.cli import main
from kvist.demo.envoy import binary
from kvist.picker.settings import build, load
from kvist.picker.tls import server_context


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--endpoints, --pool-name or --local"),
        (["--endpoints", "nonsense"], "endpoint 'nonsense' must look like 10.0.0.1:8000"),
        (["--endpoints", "1.2.3.4:5", "--pool-name", "x"], "exclude each other"),
        (["--endpoints", "1.2.3.4:5", "--local", "2"], "--local starts its own engines"),
        (["--endpoints", "1.2.3.4:5", "--policy", "nobody"], "unknown routing policy 'nobody'"),
        (["--endpoints", "1.2.3.4:5", "--objective", "chat"], "must be NAME=VALUE"),
        (["--endpoints", "1.2.3.4:5", "--max-in-flight", "-1"], "max_in_flight must not be negative"),
        (["--pool-name", "x", "--envoy-config", "y"], "--envoy-config needs --endpoints"),
        (["--endpoints", "1.2.3.4:5", "--objective", "chat=high"], "objectives"),
        (["--config", "/nowhere.toml"], "/nowhere.toml"),
        (
            ["--endpoints", "1.2.3.4:5", "--secure-serving", "--cert-path", "/nowhere"],
            "must hold tls.crt and tls.key",
        ),
    ],
)
def test_bad_input_ends_in_one_line(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["picker", *arguments])
    assert ended.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and words in lines[0]


def test_a_taken_port_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(SystemExit) as ended:
            main(["picker", "--endpoints", "127.0.0.1:1", "--grpc-port", str(port), "--drain-notice", "0"])
    assert ended.value.code == 2
    assert "choose other ports" in capsys.readouterr().err


def test_settings_from_a_file_and_from_options(tmp_path: Path) -> None:
    path = tmp_path / "kvist.toml"
    path.write_text(
        '[picker]\nendpoints = ["10.0.0.1:8000"]\nmax-in-flight = 8\n[picker.objectives]\nbatch = -1\n'
    )
    settings = build({**load(path), "fallbacks": 1}, str(path))
    assert (settings.endpoints, settings.max_in_flight, settings.fallbacks) == (["10.0.0.1:8000"], 8, 1)
    assert settings.objectives == {"batch": -1}
    path.write_text('[picker]\napi_keys = ["x"]\n')
    with pytest.raises(ValueError, match="api_keys is a setting of kvist serve"):
        build(load(path), str(path))
    path.write_text("[picker]\nendpoint = 1\n")
    with pytest.raises(ValueError, match="endpoint"):
        build(load(path), str(path))


@pytest.mark.parametrize("more", [[], ["--fail-open"], ["--secure-serving", "--fallbacks", "0"]])
def test_the_written_bootstrap_is_one_that_envoy_takes(more: list[str], tmp_path: Path) -> None:
    path = tmp_path / "envoy.json"
    with pytest.raises(SystemExit) as ended:
        main(["picker", "--endpoints", "10.0.0.1:8000", "[fd00::1]:8000", "--envoy-config", str(path), *more])
    assert ended.value.code == 0
    assert json.loads(path.read_text())["static_resources"]["clusters"]
    try:
        envoy = binary()
    except ValueError as error:
        pytest.skip(str(error))
    done = subprocess.run(
        [envoy, "--mode", "validate", "--config-path", str(path)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr[-1000:]


def test_certificates_are_made_or_read(tmp_path: Path) -> None:
    pytest.importorskip("cryptography")
    from kvist.picker.tls import _self_signed

    assert server_context(build({}, "test")) is None
    assert server_context(build({"secure_serving": True}, "test")) is not None
    _self_signed(tmp_path)
    assert server_context(build({"secure_serving": True, "cert_path": str(tmp_path)}, "test")) is not None
