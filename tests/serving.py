"""Helpers for the tests of serve.py: tiny models, a server in this process, and requests."""
import http.client
import json
import threading
import time
from contextlib import contextmanager

import torch
from conftest import TEXT, tiny_gpt, tiny_json

from nanotune.generation.fast import Model
from nanotune.serving.access import Access
from nanotune.serving.api import Limits
from nanotune.serving.engine import Engine
from nanotune.serving.server import Server
from nanotune.text import chat
from nanotune.text.tokenizer import CharTokenizer, JsonTokenizer

CPU = torch.device("cpu")


class Slow:
    """A model whose steps each take `seconds` longer. Counts the steps."""
    def __init__(self, model, seconds=0.0):
        self.model, self.config, self.seconds = model, model.config, seconds
        self.steps, self.starts = 0, []

    def start(self, prompts, room, cache=None):
        self.starts.append(len(prompts))
        return self.model.start(prompts, room, cache)

    def step(self, idx, cache):
        self.steps += 1
        time.sleep(self.seconds)
        return self.model.step(idx, cache)


def tiny_model(kind="chars", seconds=0.0, **fields):
    """A Model with a "chars" vocabulary, which can spell HTML, or a "json" one."""
    tokenizer = (CharTokenizer(sorted(set(TEXT + "<>=/'\"gck"))) if kind == "chars"
                 else JsonTokenizer(tiny_json()))
    gpt = tiny_gpt(tokenizer.n_vocab, **{"block_size": 64, **fields})
    return Model(gpt, Slow(gpt, seconds), tokenizer, CPU, torch.float32)


def chat_model(**fields):
    """A Model with a chat template and a context of 128 tokens."""
    model = tiny_model("json", **{"block_size": 128, **fields})
    chat.attach(model.tokenizer, chat.Template())
    return model


@contextmanager
def served(models, access=None, limits=None, max_queue=16, sources=None, port=0):
    """A server of {name: Model} on `port`; 0 picks a free one, which is then in server.port."""
    access = access or Access()
    server = Server((access.host, port), access, limits or Limits())
    server.port = server.server_address[1]
    for name, model in models.items():
        server.add(Engine(name, model, max_queue), str((sources or {}).get(name, name)))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def ask(server, method, path, body=None, **headers):
    """Send a request, with a body of bytes or of JSON; return (status, headers, content)."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    if body is not None:
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"} | headers
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, answer.headers, content


def complete(server, path="/v1/completions", **fields):
    """The JSON answer to a request that must succeed; the list of events if it streams."""
    status, headers, content = ask(server, "POST", path, fields)
    assert status == 200, content
    if not fields.get("stream"):
        return json.loads(content)
    assert headers["Content-Type"].startswith("text/event-stream")
    *events, done, rest = content.decode().split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


def refusal(server, body, status=400):
    """The error in the answer to a completion request that must fail."""
    found, _, content = ask(server, "POST", "/v1/completions", body)
    assert found == status, content
    error = json.loads(content)["error"]
    assert "\n" not in error["message"]
    return error


def wait_until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"the condition is still false after {seconds} s"
        time.sleep(0.01)
