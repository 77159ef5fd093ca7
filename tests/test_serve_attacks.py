"""The server under attack: other sites, missing tokens, requests too large, too slow, too many."""
import http.client
import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from urllib.parse import quote

import pytest
from serving import ask, complete, refusal, served, tiny_model, wait_until

from nanotune.serving import server as server_module
from nanotune.serving.access import Access, hostname, is_loopback

TOKEN = "correct-horse-battery"


@pytest.fixture(scope="module")
def server():
    with served({"chars": tiny_model()}) as server:
        yield server


@pytest.fixture(autouse=True)
def alive(server):
    """After each test the server must answer."""
    yield
    assert ask(server, "GET", "/health")[0] == 200
    assert complete(server, prompt="L")["choices"][0]["text"]


def send(server, request, half_close=True):
    """Send raw bytes; return the whole answer."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(request)
        if half_close:
            connection.shutdown(socket.SHUT_WR)
        answer = b""
        while chunk := connection.recv(65536):
            answer += chunk
        return answer


def status_of(answer):
    return int(answer.split(b" ", 2)[1])


def handler_threads():
    return [thread for thread in threading.enumerate() if "process_request" in thread.name]


# -----------------------------------------------------------------------------
# access

@pytest.mark.parametrize("access, host, origin, allowed", [
    # DNS rebinding: the name of a site resolves to this machine
    ({}, "127.0.0.1:8000", None, True), ({}, "localhost:8000", None, True),
    ({}, "[::1]:8000", None, True), ({}, "LOCALHOST", None, True),
    ({}, "evil.example:8000", None, False), ({}, "127.0.0.1.evil.example", None, False),
    ({}, "localhost.evil.example", None, False), ({}, "192.168.1.5:8000", None, False),
    ({}, "", None, False), ({}, "[::1", None, False), ({}, None, None, False),
    # a page of another site, or of another port of this machine
    ({}, "localhost:8000", "http://localhost:8000", True),
    ({}, "localhost:8000", "http://localhost:3000", False),
    ({}, "localhost:8000", "http://127.0.0.1:8000", False),
    ({}, "localhost:8000", "https://evil.example", False),
    ({}, "localhost:8000", "http://localhost:8000.evil.example", False),
    ({}, "localhost:8000", "null", False), ({}, "localhost:8000", "", False),
    # bound to all addresses: any address is allowed, but no name
    ({"host": "0.0.0.0"}, "192.168.1.5:8000", None, True),
    ({"host": "::"}, "[2001:db8::1]:8000", None, True),
    ({"host": "0.0.0.0"}, "localhost:8000", None, True),
    ({"host": "0.0.0.0"}, "evil.example", None, False),
    ({"host": "192.168.1.5"}, "192.168.1.5:8000", None, True),
    ({"host": "192.168.1.5"}, "localhost:8000", None, False),
    # behind a proxy that has a name
    ({"names": ("gpt.example",)}, "gpt.example", "https://gpt.example", True),
    ({"names": ("gpt.example",)}, "127.0.0.1:8000", "https://gpt.example", True),
    ({"names": ("gpt.example",)}, "gpt.example.evil.example", None, False),
])
def test_host_and_origin_must_be_those_of_this_server(access, host, origin, allowed):
    headers = http.client.HTTPMessage()
    for name, value in (("Host", host), ("Origin", origin)):
        if value is not None:
            headers[name] = value
    if allowed:
        Access(**access).check(headers)
    else:
        with pytest.raises(server_module.ApiError) as error:
            Access(**access).check(headers)
        assert error.value.status == 403


def test_other_sites_are_refused_on_each_path(server):
    for headers in ({"Host": "evil.example"}, {"Origin": "http://evil.example"}):
        for method, path in (("GET", "/"), ("GET", "/health"), ("GET", "/v1/models"),
                             ("POST", "/v1/completions")):
            status, answer, _ = ask(server, method, path, {} if method == "POST" else None,
                                    **headers)
            assert status == 403 and "Access-Control-Allow-Origin" not in answer
    assert status_of(send(server, b"GET / HTTP/1.1\r\n\r\n")) == 403
    assert status_of(send(server, b"GET / HTTP/1.1\r\nHost: a\r\nHost: localhost\r\n\r\n")) == 403
    assert ask(server, "OPTIONS", "/v1/completions", Origin="http://evil.example")[0] == 501


def test_a_request_that_is_not_declared_as_json_is_refused(server):
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
        status, _, content = ask(server, "POST", "/v1/completions", b'{"prompt": "L"}',
                                 **{"Content-Type": kind})
        assert status == 415 and b"application/json" in content


def test_a_token_is_needed_for_all_but_the_page():
    with served({"chars": tiny_model()}, Access(token=TOKEN)) as server:
        for path in ("/", "/page.css", "/page.js", "/health"):
            assert ask(server, "GET", path)[0] == 200
        for given in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": TOKEN},
                      {"Authorization": f"Basic {TOKEN}"}, {"Authorization": "Bearer é"},
                      {"Authorization": f"Bearer {TOKEN}x"}, {"Authorization": "Bearer"}):
            for method, path in (("GET", "/v1/models"), ("GET", "/runs/chars/metrics"),
                                 ("POST", "/v1/completions"), ("GET", "/none")):
                status, headers, content = ask(server, method, path, **given)
                assert status == 401 and headers["WWW-Authenticate"] == "Bearer"
                assert TOKEN.encode() not in content
        for scheme in ("Bearer", "bearer"):
            given = {"Authorization": f"{scheme} {TOKEN}"}
            assert ask(server, "GET", "/v1/models", **given)[0] == 200
            assert ask(server, "POST", "/v1/completions", {"prompt": "L"}, **given)[0] == 200


def test_loopback_addresses_are_recognized():
    assert all(map(is_loopback, ("127.0.0.1", "127.9.9.9", "::1", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "192.168.1.5", "localhost.example", "")))
    assert hostname("[::1]:80") == "::1" and hostname("[::") == "" and hostname("A:80") == "a"


# -----------------------------------------------------------------------------
# too much at once

def test_a_body_of_ten_megabytes_gets_an_answer_that_refuses_it(server):
    """If the connection were reset, the client would not know why."""
    status, _, content = ask(server, "POST", "/v1/completions",
                             b'{"prompt": "' + b"L" * 10_000_000 + b'"}')
    assert status == 413 and b"262,144 bytes" in content


@pytest.mark.parametrize("headers, status", [
    ("", 411), ("Content-Length: 2\r\nContent-Length: 3\r\n", 411), ("Content-Length: -1\r\n", 400),
    ("Content-Length: 1_0\r\n", 400), ("Content-Length: +2\r\n", 400),
    ("Content-Length: ٣\r\n", 400), ("Content-Length: 99999999999999999999999\r\n", 413),
    ("Transfer-Encoding: chunked\r\n", 411),
    ("Content-Length: 2\r\nTransfer-Encoding: chunked\r\n", 411),
])
def test_a_wrong_or_missing_length_is_refused(server, headers, status):
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    assert status_of(send(server, f"{head}{headers}\r\n{{}}".encode())) == status


def test_a_second_request_on_a_connection_is_not_read(server):
    answer = send(server, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n" * 2)
    assert answer.count(b"HTTP/1.1") == 1 and b"Connection: close" in answer


@pytest.mark.parametrize("request_, statuses", [
    (b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n", {414, 431}),
    (b"GET / HTTP/1.1\r\nX: " + b"a" * 70_000 + b"\r\n\r\n", {431}),
    (b"GET / HTTP/1.1\r\n" + b"X: a\r\n" * 200 + b"\r\n", {431}),
    (b"GET / HTTP/1.1\r\n" + b"".join(b"X%d: a\r\n" % i for i in range(500_000)), {431}),
    (b"GET / HTTP/1.1\r\nHost: localhost\r\n" + (b"X: " + b"a" * 500 + b"\r\n") * 90 + b"\r\n",
     {431}),
    (b"\0\xff\x16\x03\x01\r\n\r\n", {400}), (b"GET / HTTP/9.9\r\n\r\n", {505}),
    (b"GET http://[ HTTP/1.1\r\nHost: localhost\r\n\r\n", {404}),
    (b"BREW / HTTP/1.1\r\nHost: localhost\r\n\r\n", {501}),
], ids=["long path", "long header", "200 headers", "500,000 headers", "45 kB of headers", "binary",
        "unknown version", "bad URL", "unknown method"])
def test_bad_and_large_headers_are_refused(server, request_, statuses):
    answer = send(server, request_)
    assert status_of(answer) in statuses
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"]


@pytest.mark.parametrize("body", [
    b"", b"{", b"\xff\xfe", b'{"prompt": NaN}', b'{"temperature": Infinity}',
    pytest.param(b"[" * 200_000, id="nested lists"),
    pytest.param(b'{"a":' * 40_000, id="nested objects"),
    pytest.param(b'{"seed": ' + b"9" * 5000 + b"}", id="5000 digits"),
    pytest.param(b"\0" * 1000, id="NULs"), b'{"prompt": "\x01"}',
])
def test_a_body_that_is_not_json_is_refused(server, body):
    assert "the body is not JSON" in refusal(server, body)["message"]


@pytest.mark.parametrize("body, param", [
    (b"[]", None), (b"3", None), (b'"prompt"', None), (b"null", None),
    (b'{"temperature": 1e999}', "temperature"), (b'{"temperature": -1e999}', "temperature"),
    (b'{"n": 1e3}', "n"), (b'{"n": 99999999999999999999}', "n"),
    (b'{"prompt": ' + b"[" * 900 + b"]" * 900 + b"}", "prompt"),
    (b'{"n": ' + b"[" * 900 + b"]" * 900 + b"}", "n"),
    (b'{"' + b"a" * 200_000 + b'": 1}', "a" * 99),
    (b'{"prompt": "' + b"L" * 200_000 + b'"}', "prompt"),
], ids=lambda value: str(value)[:60])
def test_json_that_is_not_a_request_is_refused(server, body, param):
    error = refusal(server, body)
    assert error["param"] == param and len(error["message"]) < 300


# -----------------------------------------------------------------------------
# too slow, too many

def test_a_client_that_sends_byte_by_byte_is_disconnected(server, monkeypatch):
    """Each byte arrives within the time limit, but not the whole request."""
    monkeypatch.setattr(server_module, "READ_SECONDS", 0.5)
    begin = (b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
             b"Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n")
    for before in (b"", begin):
        with socket.create_connection(("127.0.0.1", server.port), timeout=0.05) as connection:
            connection.sendall(before)
            assert drip(connection) < 200, "the server still reads"


def drip(connection):
    """Send a byte every 0.05 s until the server closes the connection; return their number."""
    for count in range(200):
        try:
            connection.sendall(b"a")
            if not connection.recv(65536):
                return count
        except TimeoutError:
            continue
        except OSError:
            return count
    return 200


def test_silent_connections_delay_nobody_and_are_closed(server, monkeypatch):
    monkeypatch.setattr(server_module, "READ_SECONDS", 3)
    silent = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(100)]
    wait_until(lambda: len(handler_threads()) >= 100)
    assert complete(server, prompt="L")["choices"][0]["text"]
    wait_until(lambda: not handler_threads())
    for connection in silent:
        connection.close()


def test_connections_beyond_the_limit_are_closed(server, monkeypatch):
    wait_until(lambda: not handler_threads())  # else these threads would release new slots
    monkeypatch.setattr(server_module, "READ_SECONDS", 60)
    monkeypatch.setattr(server, "slots", threading.BoundedSemaphore(2))
    connections = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(2)]
    wait_until(lambda: len(handler_threads()) == 2)
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as third:
        assert third.recv(1) == b""
    for connection in connections:
        connection.close()
    wait_until(lambda: not handler_threads())


def test_a_client_that_stops_reading_delays_nobody(server):
    """The server buffers the text, at most max_tokens, and goes on to the next request."""
    body = b'{"prompt": "L", "max_tokens": 500, "n": 8, "stream": true, "logprobs": 20}'
    with socket.create_connection(("127.0.0.1", server.port)) as stuck:
        stuck.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        stuck.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: "
                      b"%d\r\nContent-Type: application/json\r\n\r\n%s" % (len(body), body))
        wait_until(lambda: server.engines["chars"].running)
        assert complete(server, prompt="L")["choices"][0]["text"]


def test_fifty_requests_at_once_are_answered_or_get_429():
    with served({"chars": tiny_model()}, max_queue=8) as server, ThreadPoolExecutor(50) as pool:
        body = {"prompt": "Line", "max_tokens": 30, "seed": 1, "n": 2}
        found = list(pool.map(lambda _: ask(server, "POST", "/v1/completions", body), range(50)))
        answers = [json.loads(content) for status, _, content in found if status == 200]
        assert {status for status, _, _ in found} <= {200, 429} and len(answers) >= 9
        texts = [[choice["text"] for choice in answer["choices"]] for answer in answers]
        assert texts.count(texts[0]) == len(texts)  # no answer is mixed with another
        assert max(server.engines["chars"].model.fast.starts) == 2
        wait_until(lambda: not handler_threads())


def test_two_hundred_aborted_streams_leave_no_thread(server):
    engine = server.engines["chars"]
    body = json.dumps({"prompt": "L", "max_tokens": 2000, "stream": True}).encode()

    def abort(_):
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        answer.read(20)
        answer.close()
        return answer.status
    before = threading.active_count()
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(abort, repeat(None, 200))) == {200}
    wait_until(lambda: not handler_threads() and engine.running is None)
    assert not engine.waiting and threading.active_count() <= before
    assert engine.model.fast.steps < 200 * 1000


def test_no_name_is_used_as_a_path(server, tmp_path):
    for name in ("../../etc/passwd", "/etc/passwd", str(tmp_path), "chars/../chars", "chars\0"):
        assert ask(server, "GET", f"/runs/{quote(name, safe='')}/metrics")[0] == 404
        assert refusal(server, {"model": name, "prompt": "L"}, 404)["param"] == "model"
