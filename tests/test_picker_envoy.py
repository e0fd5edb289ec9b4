"""A real Envoy in front of the picker: routing, streaming, faults, both failure modes."""

from __future__ import annotations

import http.client
import json
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import pytest

pytest.importorskip("httptools")
pytest.importorskip("envoy.service.ext_proc.v3")

from gateway_processes import SECONDS, Process, call, chat, fake, metric, wait_for

from kvist.demo.envoy import Envoy, LocalPool, binary
from kvist.picker.envoy import bootstrap
from kvist.picker.protocol import place_of

try:
    binary()
except ValueError as error:
    pytest.skip(str(error), allow_module_level=True)

FAST = ["--health-check-interval=0.3", "--drain-notice=0.5"]
PATH = "/v1/chat/completions"


def place(process: Process) -> str:
    return process.url.removeprefix("http://")


@contextmanager
def pool(workers: list[Process], *options: str, **envoy: Any) -> Iterator[LocalPool]:
    """Envoy and a picker over running workers, warm: every worker is known to be well on both sides."""
    with LocalPool(
        endpoints=[place(worker) for worker in workers],
        picker=[*FAST, *options],
        health_seconds=0.3,
        **envoy,
    ) as started:
        wait_for(lambda: all(w["models"] for w in state(started)["workers"]))
        assert started.envoy is not None
        envoy_process = started.envoy
        wait_for(lambda: envoy_process.stat("cluster.pool.membership_healthy") == len(workers))
        wait_for(lambda: envoy_process.stat("cluster.picker.membership_healthy") == 1)
        yield started


@contextmanager
def workers(count: int) -> Iterator[list[Process]]:
    started: list[Process] = []
    try:
        for _ in range(count):
            started.append(fake())
        yield started
    finally:
        for process in started:
            process.stop()


def state(started: LocalPool) -> dict[str, Any]:
    return dict(json.loads(call(started.picker_url, "/workers")[1]))


def at_rest(started: LocalPool) -> bool:
    data = state(started)
    return data["active"] == data["queued"] == data["streams"] == 0 and all(
        w["in_flight"] == w["pending_prefill"] == 0 and abs(w["load"]) < 1e-9 for w in data["workers"]
    )


def mode(worker: Process, name: str) -> None:
    call(worker.url, "/mode", name.encode())


def ask(started: LocalPool, text: str = "hello", **more: Any) -> tuple[int, str]:
    """Status, and which worker answered by the picker's account."""
    status, _, headers = call(started.url, PATH, chat(text, model="fake", **more), x_kvist_explain="1")
    return status, headers.get("x-kvist-worker", "")


@pytest.fixture(scope="module")
def running() -> Iterator[tuple[LocalPool, list[Process]]]:
    with workers(3) as started, pool(started) as made:
        yield made, started


@pytest.fixture
def shared(running: tuple[LocalPool, list[Process]]) -> Iterator[LocalPool]:
    started, processes = running
    yield started
    for worker in processes:
        mode(worker, "ok")
    wait_for(lambda: at_rest(started))


@pytest.mark.parametrize("policy", ["cache_aware", "round_robin"])
def test_routing_follows_the_policy(policy: str, running: Any) -> None:
    """Those that do not weigh times, which a busy machine would sway: a prefix has one home, or many."""
    homes: dict[int, set[str]] = {}
    with pool(running[1], f"--policy={policy}") as made:
        for turn in range(5):
            for group in range(5):  # no multiple of the workers, or round robin would give each a home
                status, worker = ask(made, f"group {group}: " + "what they share " * 200 + f"turn {turn}")
                assert status == 200
                homes.setdefault(group, set()).add(worker)
        assert set().union(*homes.values()) == {worker.url for worker in running[1]}
        times = [len(found) for found in homes.values()]
        assert times == [1 if policy == "cache_aware" else 3] * 5
        wait_for(lambda: at_rest(made))


def test_the_picker_hears_what_came_of_it(shared: LocalPool) -> None:
    before = metric(shared.picker_url, "kvist_requests_total", outcome="ok")
    true = metric(shared.picker_url, "kvist_cached_true_total")
    assert ask(shared)[0] == 200
    wait_for(lambda: metric(shared.picker_url, "kvist_requests_total", outcome="ok") == before + 1)
    assert metric(shared.picker_url, "kvist_cached_true_total") == true + 50  # what the worker's usage says


def test_streams_pass_piece_by_piece(shared: LocalPool, running: Any) -> None:
    for worker in running[1]:
        mode(worker, "slow")  # a piece every 50 ms, without end
    connection = http.client.HTTPConnection(shared.url.removeprefix("http://"), timeout=SECONDS)
    connection.request("POST", PATH, json.dumps(chat(model="fake", stream=True)))
    answer = connection.getresponse()
    assert answer.status == 200
    times = []
    for _ in range(40):  # two seconds of an answer that has no end
        assert answer.fp.readline()
        while not answer.fp.readline().startswith(b"data: "):
            pass
        times.append(time.monotonic())
    assert times[-1] - times[0] > 0.2, "the pieces came together: something holds them back"
    assert metric(shared.picker_url, "kvist_active_requests") == 1
    connection.close()
    wait_for(lambda: at_rest(shared))
    assert metric(shared.picker_url, "kvist_requests_total", outcome="cancelled") >= 1


def test_clients_that_leave_leave_nothing_behind(shared: LocalPool, running: Any) -> None:
    for worker in running[1]:
        mode(worker, "hang")

    def leave(_: int) -> None:
        connection = http.client.HTTPConnection(shared.url.removeprefix("http://"), timeout=SECONDS)
        connection.request("POST", PATH, json.dumps(chat(model="fake")))
        time.sleep(0.2)
        connection.close()

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(leave, range(40)))
    wait_for(lambda: at_rest(shared))


def test_a_crowd_that_partly_leaves_is_served_and_leaves_nothing(shared: LocalPool) -> None:
    """Whole and streamed answers, prompts up to 120 kB; a third leaves amid its body or its answer."""
    host = shared.url.removeprefix("http://")

    def client(seed: int) -> list[int]:
        rng, statuses = Random(seed), []
        for turn in range(20):
            text = f"group {rng.randrange(9)}: " + "w " * rng.choice([10, 500, 60_000]) + str(turn)
            body = json.dumps(chat(text, model="fake", stream=rng.random() < 0.5)).encode()
            connection = http.client.HTTPConnection(host, timeout=SECONDS)
            if turn % 6 == 1:
                connection.putrequest("POST", PATH)
                connection.putheader("content-length", str(len(body) + 10))
                connection.endheaders()
                connection.send(body)
            else:
                connection.request("POST", PATH, body)
                if turn % 6 == 4:
                    time.sleep(rng.random() / 100)
                else:
                    answer = connection.getresponse()
                    answer.read()
                    statuses.append(answer.status)
            connection.close()
        return statuses

    with ThreadPoolExecutor(16) as threads:
        answered = [status for found in threads.map(client, range(16)) for status in found]
    assert len(answered) == 16 * 13 and set(answered) == {200}
    wait_for(lambda: at_rest(shared))


def test_large_bodies_arrive_whole(shared: LocalPool) -> None:
    text = "".join(f"line {i} of a long document\n" for i in range(60_000))
    assert len(text) > 1 << 20
    assert ask(shared, text)[0] == 200
    status, body, _ = call(shared.url, PATH, b'{"model":"fake","messages":"' + b"x" * (33 << 20) + b'"}')
    assert status == 413 and b"too large" in body


def test_bad_requests_are_answered_by_the_picker(shared: LocalPool) -> None:
    assert call(shared.url, PATH, b"{")[0] == 400
    status, body, headers = call(shared.url, PATH, chat(model="nobody's"))
    assert status == 404 and json.loads(body)["error"]["code"] == "model_not_found"
    assert headers["content-type"] == "application/json"


def test_other_paths_pass(shared: LocalPool) -> None:
    assert json.loads(call(shared.url, "/v1/models")[1])["data"][0]["id"] == "fake"


def test_clients_cannot_choose_the_endpoint(shared: LocalPool) -> None:
    """The header is the picker's: what a client writes there is overwritten."""
    status, _, _ = call(shared.url, PATH, chat(model="fake"), x_gateway_destination_endpoint="127.0.0.1:1")
    assert status == 200


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_one_command_starts_it_all_and_a_signal_ends_it(end: int) -> None:
    """`kvist picker --local 2`: embedded engines, the picker, Envoy; the openai client streams through."""
    openai = pytest.importorskip("openai")
    command = [sys.executable, "-m", "kvist", "picker", "--local", "2", "--port", "0", "--drain-notice", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        url = line.split()[2]
        children = _children(process.pid)
        assert len(children) == 4
        client = openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0)
        model = client.models.list().data[0].id
        pieces = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": "hello " * 100}],
            max_tokens=8,
            stream=True,
            stream_options={"include_usage": True},
        )
        usage = [piece.usage for piece in pieces if piece.usage]
        assert usage[-1].completion_tokens == 8
        process.send_signal(end)
        process.wait(SECONDS)
        assert process.returncode == 0
        assert not [pid for pid in children if Path(f"/proc/{pid}").exists()]
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(SECONDS)


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_the_data_plane_may_name_the_endpoints_to_choose_from(running: Any) -> None:
    """The subset hint, which a filter of Envoy's own takes from a header here."""
    started, processes = running
    places = [place(worker) for worker in processes]
    config = bootstrap(places, port=0, picker=f"127.0.0.1:{started.picker.port}", health_seconds=0.3)
    chain = config["static_resources"]["listeners"][0]["filter_chains"][0]
    to = {"metadata_namespace": "envoy.lb.subset_hint", "key": "x-gateway-destination-endpoint-subset"}
    chain["filters"][0]["typed_config"]["http_filters"].insert(
        0,
        {
            "name": "envoy.filters.http.header_to_metadata",
            "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.filters.http.header_to_metadata.v3.Config",
                "request_rules": [{"header": "x-subset", "on_header_present": to}],
            },
        },
    )
    envoy = Envoy(config)
    try:
        for wanted in places * 2:
            headers = {"x_subset": wanted, "x_kvist_explain": "1"}
            wait_for(lambda: call(envoy.url, PATH, chat(model="fake"))[0] == 200)
            status, _, found = call(envoy.url, PATH, chat(model="fake"), **headers)
            assert (status, place_of(found["x-kvist-worker"])) == (200, wanted)
        assert call(envoy.url, PATH, chat(model="fake"), x_subset="10.9.9.9:1")[0] == 503
    finally:
        envoy.stop()


def test_a_killed_worker_is_routed_around() -> None:
    with workers(3) as started, pool(started) as made:
        text = "a long shared prefix " * 200
        _, home = ask(made, text)
        victim = next(worker for worker in started if worker.url == home)
        victim.signal(signal.SIGKILL)
        for turn in range(10):  # from the first on: Envoy goes down the picker's list
            status, worker = ask(made, text + str(turn))
            assert status == 200 and worker != home
        wait_for(lambda: not next(w for w in state(made)["workers"] if w["id"] == home)["healthy"])
        assert ask(made, text)[0] == 200
        wait_for(lambda: at_rest(made))
        assert metric(made.picker_url, "kvist_retries_total", worker=home) >= 1


def test_no_worker_left_is_503() -> None:
    with workers(1) as started, pool(started) as made:
        started[0].signal(signal.SIGKILL)
        wait_for(lambda: not state(made)["workers"][0]["healthy"])
        status, body, headers = call(made.url, PATH, chat(model="fake"))
        assert status == 503 and headers["retry-after"] == "1" and b"no endpoint is ready" in body


def test_a_saturated_pool_sheds_with_429_and_serves_who_waited() -> None:
    options = ["--max-in-flight=1", "--queue-size=1", "--objective=batch=-1"]
    with workers(1) as started, pool(started, *options) as made:
        mode(started[0], "hang")
        with ThreadPoolExecutor(2) as threads:
            held = threads.submit(call, made.url, PATH, chat(model="fake"))
            wait_for(lambda: state(made)["active"] == 1)
            waits = threads.submit(call, made.url, PATH, chat("waits", model="fake"))
            wait_for(lambda: state(made)["queued"] == 1)
            status, body, headers = call(
                made.url, PATH, chat(model="fake"), x_gateway_inference_objective="batch"
            )
            assert status == 429 and headers["retry-after"] == "1" and b"shed" in body
            assert call(made.url, PATH, chat(model="fake"))[0] == 429  # the queue is full
            mode(started[0], "ok")
            started[0].signal(signal.SIGKILL)  # ends the one that hangs, and with it the wait
            assert held.result(SECONDS)[0] == 503
            assert waits.result(SECONDS)[0] == 503
        wait_for(lambda: at_rest(made))


@pytest.mark.parametrize("fail_open", [True, False])
def test_the_pickers_death_follows_the_failure_mode(fail_open: bool) -> None:
    with workers(2) as started, pool(started, fail_open=fail_open) as made:
        assert made.picker is not None and made.envoy is not None
        port, envoy = made.picker.port, made.envoy
        assert ask(made)[0] == 200
        made.picker.process.kill()
        made.picker.process.wait()
        wait_for(lambda: envoy.stat("cluster.picker.membership_healthy") == 0)
        statuses = [call(made.url, PATH, chat(str(i), model="fake"))[0] for i in range(8)]
        assert statuses == [200 if fail_open else 503] * 8
        made.picker = made.start_picker(port)
        wait_for(lambda: envoy.stat("cluster.picker.membership_healthy") == 1)
        wait_for(lambda: ask(made)[1] != "")
        wait_for(lambda: at_rest(made))


@pytest.mark.parametrize("fail_open", [True, False])
def test_a_picker_that_hangs_holds_nobody_up_for_long(fail_open: bool) -> None:
    with workers(1) as started, pool(started, fail_open=fail_open) as made:
        assert made.picker is not None and made.envoy is not None
        envoy, process = made.envoy, made.picker.process
        process.send_signal(signal.SIGSTOP)
        try:
            assert call(made.url, PATH, chat(model="fake"))[0] == 503  # its body is with the picker
            wait_for(lambda: envoy.stat("cluster.picker.membership_healthy") == 0)
            assert call(made.url, PATH, chat(model="fake"))[0] == (200 if fail_open else 503)
        finally:
            process.send_signal(signal.SIGCONT)
        wait_for(lambda: ask(made)[1] != "")


def test_over_tls_with_a_certificate_made_at_start() -> None:
    with workers(1) as started, pool(started, "--secure-serving", secure=True) as made:
        assert ask(made) == (200, started[0].url)


def test_a_stopping_picker_lets_streams_end() -> None:
    with workers(1) as started, pool(started, fail_open=True) as made:
        assert made.picker is not None and made.envoy is not None
        mode(started[0], "slow")
        request = urllib.request.Request(
            made.url + PATH, json.dumps(chat(model="fake", stream=True)).encode()
        )
        with urllib.request.urlopen(request, timeout=SECONDS) as answer:
            assert answer.readline()
            made.picker.process.terminate()
            envoy = made.envoy
            wait_for(lambda: envoy.stat("cluster.picker.membership_healthy") == 0)
            for _ in range(40):  # still through the picker, which waits for this stream
                assert answer.readline()
            assert made.picker.process.poll() is None
        made.picker.process.wait(SECONDS)
        assert made.picker.process.returncode == 0
        mode(started[0], "ok")
        assert call(made.url, PATH, chat(model="fake"))[0] == 200  # open: round robin from here on
