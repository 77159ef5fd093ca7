"""serve.py: completions in OpenAI's form, the queue, facts about models, command-line options."""
import http.client
import json
import threading

import pytest
import torch
from conftest import TEXT
from serving import CPU, ask, complete, refusal, served, tiny_model, wait_until

import sample
import serve
from nanotune.errors import UserError
from nanotune.generation.fast import open_model
from nanotune.serving.api import Limits
from nanotune.serving.engine import Engine
from nanotune.text.tokenizer import CharTokenizer


@pytest.fixture(scope="module")
def server():
    with served({"chars": tiny_model(), "json": tiny_model("json")},
                limits=Limits(max_tokens=100, max_batch=6)) as server:
        yield server


def texts(answer):
    return [choice["text"] for choice in answer["choices"]]


# -----------------------------------------------------------------------------
# completions

def test_an_answer_has_openais_form(server):
    answer = complete(server, model="chars", prompt="Line", max_tokens=5, seed=1)
    assert answer["object"] == "text_completion" and answer["model"] == "chars"
    assert answer["id"].startswith("cmpl-") and answer["created"] > 1.7e9
    choice, = answer["choices"]
    assert choice == {"index": 0, "text": choice["text"], "logprobs": None,
                      "finish_reason": "length"}
    assert len(choice["text"]) == 5
    assert answer["usage"] == {"prompt_tokens": 4, "completion_tokens": 5, "total_tokens": 9}


def test_a_seed_gives_the_same_text_as_in_sample_py(make_run, capsys):
    out_dir, _ = make_run(CharTokenizer(sorted(set(TEXT))))
    sample.main([f"--out_dir={out_dir}", "--start=Line ", "--num_samples=3", "--seed=7",
                 "--max_new_tokens=30", "--temperature=0.9", "--top_k=20", "--top_p=0.9",
                 "--repetition_penalty=1.1", "--device=cpu", "--dtype=float32"])
    printed = capsys.readouterr().out.split("\n" + "-" * 15 + "\n")[:3]
    with served({"run": open_model(str(out_dir), CPU, torch.float32)}) as server:
        answer = complete(server, prompt="Line ", n=3, seed=7, max_tokens=30, temperature=0.9,
                          top_k=20, top_p=0.9, repetition_penalty=1.1, echo=True)
    assert texts(answer) == printed


def test_a_stream_is_the_whole_answer_in_pieces(server):
    fields = dict(model="json", prompt="Line", n=2, max_tokens=30, seed=3, logprobs=2, echo=True)
    whole, events = complete(server, **fields), complete(server, **fields, stream=True)
    assert len(events) > 20 and all(len(event["choices"]) == 1 for event in events)
    for expected in whole["choices"]:
        mine = [event["choices"][0] for event in events
                if event["choices"][0]["index"] == expected["index"]]
        assert "".join(choice["text"] for choice in mine) == expected["text"]
        assert [choice["finish_reason"] for choice in mine] == [None] * (len(mine) - 1) + ["length"]
        for key, values in expected["logprobs"].items():
            assert [x for choice in mine for x in choice["logprobs"][key]] == values


def test_samples_and_prompts_are_one_batch(server):
    model = server.engines["chars"].model
    model.fast.starts.clear()
    answer = complete(server, prompt=["Line", "L"], n=3, max_tokens=9, temperature=0)
    assert model.fast.starts == [6]
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    for prompt, mine in (("Line", texts(answer)[:3]), ("L", texts(answer)[3:])):
        alone, = texts(complete(server, prompt=prompt, max_tokens=9, temperature=0))
        assert mine == [alone] * 3
    assert answer["usage"]["prompt_tokens"] == 5


def test_without_a_seed_each_answer_is_different(server):
    assert len({texts(complete(server, prompt="L", max_tokens=30))[0] for _ in range(3)}) == 3


@torch.no_grad()
def test_logprobs_are_those_of_the_model_before_sampling_options(server):
    """At temperature 1, without top_k and penalty, also for the tokens of the prompt."""
    choice, = complete(server, prompt="Line", max_tokens=8, logprobs=3, temperature=0.5, top_k=2,
                       repetition_penalty=1.3, echo=True, seed=1)["choices"]
    model, logprobs = server.engines["chars"].model, choice["logprobs"]
    ids = model.tokenizer.encode(choice["text"])
    expected = model.plain.logits(torch.tensor([ids]))[0].log_softmax(-1)
    assert logprobs["tokens"] == list(choice["text"]) and len(ids) == 12
    assert logprobs["text_offset"] == list(range(12))
    assert logprobs["token_logprobs"][0] is logprobs["top_logprobs"][0] is None
    for at, id in enumerate(ids[1:]):
        chosen, found = logprobs["token_logprobs"][at + 1], logprobs["top_logprobs"][at + 1]
        assert chosen == pytest.approx(float(expected[at, id]), abs=1e-4)
        values, tops = expected[at].topk(3)
        assert list(found) == [model.tokenizer.itos[i] for i in tops]
        assert list(found.values()) == pytest.approx(values.tolist(), abs=1e-4)


def test_tokens_that_are_parts_of_a_character_are_named_by_id(server, monkeypatch):
    engine = server.engines["json"]
    parts = engine.model.tokenizer.encode("é")

    def stream(*args, **options):
        for id in parts:
            logits = torch.zeros(1, engine.model.tokenizer.n_vocab)
            logits[0, parts] = 9.0
            yield torch.tensor([id]), logits
    monkeypatch.setattr("nanotune.serving.engine.stream", stream)
    choice, = complete(server, model="json", prompt="L", max_tokens=2, logprobs=2)["choices"]
    names = [f"token_id:{id}" for id in parts]
    assert choice["text"] == "é" and choice["logprobs"]["tokens"] == names
    assert [set(top) for top in choice["logprobs"]["top_logprobs"]] == [set(names)] * 2
    assert choice["logprobs"]["text_offset"] == [0, 1]


def test_logprobs_0_gives_only_the_chosen_tokens(server):
    logprobs = complete(server, prompt="L", max_tokens=3, logprobs=0)["choices"][0]["logprobs"]
    assert logprobs["top_logprobs"] == [{}] * 3 and len(logprobs["token_logprobs"]) == 3


def test_echo_with_max_tokens_0_scores_a_prompt(server):
    answer = complete(server, prompt=["Line 1", "L"], max_tokens=0, echo=True, logprobs=1)
    assert texts(answer) == ["Line 1", "L"]
    assert [len(choice["logprobs"]["tokens"]) for choice in answer["choices"]] == [6, 1]


def test_a_sample_ends_before_the_first_stop_text(server):
    free, = texts(complete(server, prompt="L", max_tokens=60, seed=2))
    stops = [free[40:43], free[20:22]]
    end = min(free.index(stop) for stop in stops)
    choice, = complete(server, prompt="L", max_tokens=60, seed=2, stop=stops,
                       logprobs=0)["choices"]
    assert choice["text"] == free[:end] and choice["finish_reason"] == "stop"
    assert "".join(choice["logprobs"]["tokens"]) == free[:end]
    assert texts(complete(server, prompt="L", max_tokens=60, seed=2, stop=stops[1])) == [
        free[:free.index(stops[1])]]


def test_end_of_text_stops_a_sample_and_is_counted(server, monkeypatch):
    """End-of-text adds no text. Text that may begin a stop text is sent once it is clear that the
    stop text does not follow."""
    engine = server.engines["json"]
    letter, = engine.model.tokenizer.encode("L")
    drawn = [[letter, letter], [letter, engine.model.tokenizer.eot]]

    def stream(*args, **options):
        for ids in drawn:
            yield torch.tensor(ids), torch.zeros(2, engine.model.tokenizer.n_vocab)
    monkeypatch.setattr("nanotune.serving.engine.stream", stream)
    answer = complete(server, model="json", prompt="a", n=2, max_tokens=2, stop="LLLL", logprobs=0)
    assert [(c["text"], c["finish_reason"], c["logprobs"]["tokens"]) for c in answer["choices"]] \
        == [("LL", "length", ["L", "L"]), ("L", "stop", ["L"])]
    assert answer["usage"]["completion_tokens"] == 4


def test_an_answer_can_be_longer_than_the_context(server):
    assert len(texts(complete(server, prompt="Line", max_tokens=100))[0]) == 100


def test_unsupported_fields_are_accepted_with_values_that_have_no_effect(server):
    answer = complete(server, prompt="L", frequency_penalty=0.0, presence_penalty=0, best_of=1,
                      logit_bias={}, suffix=None, user=None, stream_options=None, stop=None,
                      temperature=None, seed=None)
    assert answer["model"] == "chars" and answer["usage"]["completion_tokens"] == 16


@pytest.mark.parametrize("body, param, message", [
    ({"frequency_penalty": 0.5}, "frequency_penalty", "frequency_penalty is not supported"),
    ({"best_of": True}, "best_of", "best_of is not supported; leave it out"),
    ({"suffix": "x"}, "suffix", "suffix is not supported"),
    ({"tempratur": 1}, "tempratur", "tempratur is not supported"),
    ({"tempratur": None}, "tempratur", "tempratur is not supported"),
    ({"max_tokens": -1}, "max_tokens", "must be at least 0, not -1"),
    ({"max_tokens": 101}, "max_tokens", "is 101; this server generates at most 100"),
    ({"max_tokens": 10**300}, "max_tokens", "at most 100"),
    ({"max_tokens": 1.5}, "max_tokens", "must be an integer, not 1.5"),
    ({"max_tokens": True}, "max_tokens", "must be an integer, not True"),
    ({"temperature": -0.1}, "temperature", "must be at least 0 and at most 10, not -0.1"),
    ({"temperature": "1"}, "temperature", "must be a number, not '1'"),
    ({"temperature": 10**400}, "temperature", "must be at least 0 and at most 10"),
    ({"top_p": 1.01}, "top_p", "must be at least 0 and at most 1"),
    ({"top_k": -1}, "top_k", "must be in [0"),
    ({"repetition_penalty": 0}, "repetition_penalty", "must be at least 0.01 and at most 100"),
    ({"n": 0}, "n", "at least 1"), ({"n": 7}, "n", "at most 6"),
    ({"prompt": ["L"] * 7}, "prompt", "make 7 samples"), ({"seed": -1}, "seed", "must be in [0"),
    ({"seed": 2**63}, "seed", "must be in"),
    ({"logprobs": 21}, "logprobs", "must be at least 0 and at most 20"),
    ({"logprobs": True}, "logprobs", "must be an integer"), ({"echo": 1}, "echo", "true or false"),
    ({"stream": "yes"}, "stream", "true or false"), ({"stop": ["a"] * 5}, "stop", "up to 4"),
    ({"stop": ["", "a"]}, "stop", "1 to 200"), ({"stop": [1]}, "stop", "list of strings"),
    ({"stop": "a" * 201}, "stop", "1 to 200"), ({"stop": 3}, "stop", "a string or a list"),
    ({"prompt": 3}, "prompt", "a string or a list"),
    ({"prompt": []}, "prompt", "a list of strings"),
    ({"prompt": [[1, 2]]}, "prompt", "a list of strings"), ({"prompt": {}}, "prompt", "not a dict"),
    ({"prompt": "L" * 65}, "prompt", "prompt 1 has 65 tokens, the model reads at most 64"),
    ({"prompt": ["L", "é"]}, "prompt", "the character 'é' is not in the model's vocabulary"),
    ({"prompt": "\ud83d"}, "prompt", "half of a surrogate pair"),
    ({"prompt": ""}, "prompt", "prompt 1 is empty"), ({"model": 3}, "model", "must be a string"),
], ids=lambda value: str(value)[:60])
def test_bad_fields_are_named(server, body, param, message):
    error = refusal(server, {"prompt": "L"} | body)
    assert error["param"] == param and message in error["message"]
    assert error["type"] == "invalid_request_error"


def test_an_unknown_model_is_refused(server):
    error = refusal(server, {"model": "../out", "prompt": "L"}, 404)
    assert error["param"] == "model" and "there is no model '../out'" in error["message"]


def test_extreme_values_that_are_allowed_work(server):
    for options in ({"temperature": 1e-300}, {"top_p": 0}, {"top_p": 1e-300}, {"top_k": 2**31 - 1},
                    {"repetition_penalty": 100, "temperature": 10}, {"seed": 2**63 - 1},
                    {"repetition_penalty": 0.01, "temperature": 0.01}):
        assert len(texts(complete(server, prompt="L", **options))[0]) == 16


def test_the_official_client_works(server):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="unused")
    assert [model.id for model in client.models.list()] == ["chars", "json"]
    options = dict(model="chars", prompt="Line", max_tokens=12, seed=5, logprobs=1, stop=["zzz"])
    whole = client.completions.create(**options, frequency_penalty=0, best_of=1)
    assert len(whole.choices[0].text) == whole.usage.completion_tokens == 12
    with client.completions.create(**options, stream=True) as events:
        pieces = list(events)
    assert "".join(piece.choices[0].text for piece in pieces) == whole.choices[0].text
    assert pieces[-1].choices[0].finish_reason == "length"
    with pytest.raises(openai.BadRequestError, match="presence_penalty is not supported"):
        client.completions.create(**options, presence_penalty=1)
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-4'"):
        client.completions.create(**options | {"model": "gpt-4"})


def test_an_onnx_file_gives_the_answers_of_the_exported_run(tmp_path, make_run):
    pytest.importorskip("onnxruntime")
    import export
    out_dir, _ = make_run(CharTokenizer(sorted(set(TEXT))))
    export.main([f"--out_dir={out_dir}", "--format=onnx", f"--export_dir={tmp_path / 'onnx'}"])
    models = {name: open_model(str(source), CPU, torch.float32) for name, source in
              (("torch", out_dir), ("onnx", tmp_path / "onnx" / "model.onnx"))}
    sources = {"torch": out_dir, "onnx": "model.onnx"}
    with served(models, sources=sources) as server:
        fields = dict(prompt=["Line", "L"], max_tokens=8, temperature=0, logprobs=2, echo=True)
        ours, theirs = (complete(server, model=name, **fields)["choices"] for name in models)
        about = json.loads(ask(server, "GET", "/v1/models")[2])["data"]
    for mine, other in zip(ours, theirs):
        assert mine["text"] == other["text"]
        assert mine["logprobs"]["token_logprobs"][1:] == pytest.approx(
            other["logprobs"]["token_logprobs"][1:], abs=1e-3)
    assert [entry["kind"] for entry in about] == ["GPT-2", "GPT-2, ONNX"]
    assert about[0]["parameters"] == about[1]["parameters"] > 0


# -----------------------------------------------------------------------------
# the queue

def start_request(server, **fields):
    """Send a completion and return the open connection, without reading the answer."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    connection.request("POST", "/v1/completions", json.dumps({"prompt": "L"} | fields).encode(),
                       {"Content-Type": "application/json"})
    return connection


@pytest.fixture
def slow():
    with served({"slow": tiny_model(seconds=0.01)}, max_queue=2) as server:
        server.engine = server.engines["slow"]
        server.steps = lambda: server.engine.model.fast.steps
        yield server


def test_requests_wait_in_order_and_get_429_when_the_queue_is_full(slow):
    running = start_request(slow, max_tokens=2000)
    wait_until(lambda: slow.engine.running)
    waiting = []
    for n in (2, 3):
        waiting.append(start_request(slow, max_tokens=4, n=n))
        wait_until(lambda: len(slow.engine.waiting) == len(waiting))
    error = refusal(slow, {"prompt": "L"}, 429)
    assert error["type"] == "rate_limit_error" and "too many requests" in error["message"]
    assert slow.engine.model.fast.starts == [1]
    running.close()  # ends its generation; the others follow in order
    found = [json.loads(connection.getresponse().read()) for connection in waiting]
    assert [len(texts(answer)) for answer in found] == [2, 3]
    assert slow.engine.model.fast.starts == [1, 2, 3]


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_disconnects_ends_its_generation(slow, stream):
    connection = start_request(slow, max_tokens=2000, stream=stream)
    answer = connection.getresponse() if stream else connection
    if stream:
        assert answer.read(10) == b'data: {"id'
    wait_until(lambda: slow.steps() > 5)
    answer.close()
    closed_at = slow.steps()
    wait_until(lambda: slow.engine.running is None)
    assert slow.steps() < closed_at + 100  # of 2,000


def test_a_client_that_disconnects_leaves_the_queue(slow):
    running = start_request(slow, max_tokens=2000)
    wait_until(lambda: slow.engine.running)
    waiting = [start_request(slow) for _ in range(2)]
    wait_until(lambda: len(slow.engine.waiting) == 2)
    waiting[0].close()
    wait_until(lambda: len(slow.engine.waiting) == 1)
    for connection in (running, waiting[1]):
        connection.close()
    wait_until(lambda: not slow.engine.waiting and not slow.engine.running)
    assert len(slow.engine.model.fast.starts) <= 2  # waiting[0] was never started


def test_the_thread_of_a_model_sets_its_gpu(monkeypatch):
    """CUDA graphs are recorded on the current device, which each thread has to set."""
    found = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: found.append(
        (threading.current_thread().name, device.index)))
    model = tiny_model()
    model.device = torch.device("cuda", 1)
    Engine("gpu", model, 1).close()
    assert found == [("engine gpu", 1)]


def test_two_models_generate_at_the_same_time():
    with served({"a": tiny_model(seconds=0.01), "b": tiny_model()}) as server:
        running = start_request(server, model="a", max_tokens=2000)
        wait_until(lambda: server.engines["a"].running)
        assert texts(complete(server, model="b", prompt="L"))
        assert server.engines["a"].running
        running.close()


@pytest.mark.parametrize("failure, status, message", [
    (RuntimeError("broken"), 500, "generation failed; the server's terminal has the traceback"),
    (MemoryError(), 503, "out of memory: ask for fewer samples or tokens")])
def test_a_failed_generation_is_an_error_and_the_server_continues(slow, monkeypatch, capsys,
                                                                  failure, status, message):
    def step(idx, cache):
        raise failure
    monkeypatch.setattr(slow.engine.model.fast, "step", step)
    assert refusal(slow, {"prompt": "L"}, status)["message"] == message
    connection = start_request(slow, stream=True)
    answer = connection.getresponse()
    *_, last, rest = answer.read().decode().split("\n\n")
    assert answer.status == 200 and rest == "" and message in last and "[DONE]" not in last
    assert ("RuntimeError: broken" in capsys.readouterr().err) == (status == 500)
    monkeypatch.undo()
    assert complete(slow, prompt="L")


def test_a_server_that_is_closed_ends_its_generations():
    model = tiny_model(seconds=0.01)
    with served({"slow": model}) as server:
        answer = start_request(server, max_tokens=2000, stream=True).getresponse()
        wait_until(lambda: model.fast.steps > 2)
    assert b"[DONE]" not in answer.read()  # so the client knows that the answer is incomplete
    assert model.fast.steps < 1000
    assert not any(thread.name.startswith("engine slow") for thread in threading.enumerate())


# -----------------------------------------------------------------------------
# facts about models, health, the page

def test_the_models_are_listed_with_their_facts(make_run, tmp_path):
    out_dir, model = make_run(CharTokenizer(sorted(set(TEXT))))
    with served({"run": open_model(str(out_dir), CPU, torch.float32), "other": tiny_model()},
                sources={"run": out_dir}) as server:
        run, other = json.loads(ask(server, "GET", "/v1/models")[2])["data"]
        assert ask(server, "GET", "/runs/run/metrics")[0] == 404  # it has logged nothing yet
    assert run["id"] == "run" and run["kind"] == "GPT-2" and str(run["context"]) == "16"
    assert run["parameters"] == model.num_params()
    assert (run["step"], run["val_loss"], run["has_run"]) == (0, 1.0, False)
    assert (other["step"], other["val_loss"], other["dataset"]) == (None, None, None)


def test_the_losses_of_a_run_are_served(make_run):
    """The file is read for each request: the run may be training. Incomplete lines are skipped."""
    out_dir, _ = make_run(CharTokenizer(sorted(set(TEXT))))
    log = out_dir / "metrics.jsonl"
    log.write_text('{"step": 0, "train_loss": 3.0, "val_loss": 3.2}\n{"iter": 0, "loss": 3.1}\n'
                   '{"iter": 1, "lo')
    with served({"a run": open_model(str(out_dir), CPU, torch.float32)},
                sources={"a run": out_dir}) as server:
        status, _, content = ask(server, "GET", "/runs/a%20run/metrics")
        assert status == 200 and json.loads(content, parse_constant=pytest.fail) == {
            "settings": {}, "batch": [[0, 3.1]], "evaluations": [[0, 3.0, 3.2]]}
        log.write_text("".join(f'{{"iter": {i}, "loss": 2.0}}\n' for i in range(5000)))
        content = ask(server, "GET", "/runs/a%20run/metrics")[2]
        assert 500 < len(json.loads(content)["batch"]) <= 1000
        log.unlink()
        content = ask(server, "GET", "/runs/a%20run/metrics")[2]
        assert json.loads(content) == {"settings": {}, "batch": [], "evaluations": []}


def test_health_is_served_and_unknown_paths_are_refused(server):
    assert json.loads(ask(server, "GET", "/health")[2]) == {"status": "ok"}
    for path in ("/none", "/runs/chars/metrics", "/v1", "/page.html", "/../serve.py", "/%2e%2e/x"):
        status, _, content = ask(server, "GET", path)
        assert status == 404 and "error" in json.loads(content)
    assert ask(server, "POST", "/health", {})[0] == ask(server, "GET", "/v1/completions")[0] == 405
    assert ask(server, "DELETE", "/")[0] == 501


def test_the_page_loads_nothing_from_other_servers(server):
    for path, kind in (("/", "text/html"), ("/page.css", "text/css"),
                       ("/page.js", "text/javascript")):
        status, headers, content = ask(server, "GET", path)
        assert status == 200 and content and headers.get_content_type() == kind
        assert headers["X-Content-Type-Options"] == "nosniff"
        policy = headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy


# -----------------------------------------------------------------------------
# the command line

def test_models_are_named_after_their_folders_and_files():
    assert serve.name_sources("out-a, x/out-b/") == {"out-a": "out-a", "out-b": "x/out-b/"}
    assert serve.name_sources("a/m.onnx,b/m.onnx,m.onnx") == {
        "m.onnx": "a/m.onnx", "m.onnx-2": "b/m.onnx", "m.onnx-3": "m.onnx"}


@pytest.mark.parametrize("argv, message", [
    (["--host=0.0.0.0"], "--host=0.0.0.0 is open to other machines: give a --token"),
    (["--host=192.0.2.1"], "is open to other machines"), (["--token=short"], "at least 16 ASCII"),
    (["--token=" + "é" * 20], "ASCII"), (["--token=" + "a b" * 20], "no spaces"),
    (["--port=65536"], "--port=65536 must be in"), (["--out_dir=,"], "no model given"),
    (["--port=0", "--out_dir=out-none"], "out-none does not exist"),
    (["--port=0", "--host=host.invalid", "--token=" + "a" * 20], "cannot listen on host.invalid"),
])
def test_bad_options_are_refused(argv, message):
    with pytest.raises(UserError, match=message) as error:
        serve.main(argv)
    assert "\n" not in str(error.value)


def test_a_port_that_is_in_use_is_refused(server):
    with pytest.raises(UserError, match=f"cannot listen on 127.0.0.1 port {server.port}"):
        serve.main([f"--port={server.port}"])


def test_serve_py_serves_a_run(make_run, tmp_path, monkeypatch, capsys):
    out_dir, _ = make_run(CharTokenizer(sorted(set(TEXT))))
    (tmp_path / "token.txt").write_text("t" * 20 + "\n")
    found = []

    def serve_once(self):
        self.port = self.server_address[1]
        threading.Thread(target=self.handle_request).start()
        found.append(ask(self, "GET", "/v1/models", Authorization="Bearer " + "t" * 20))
    monkeypatch.setattr(serve.Server, "serve_forever", serve_once)
    serve.main([f"--out_dir={out_dir}", "--port=0", "--device=cpu",
                f"--token=FILE:{tmp_path / 'token.txt'}"])
    assert found[0][0] == 200 and b"out-tiny" in found[0][2]
    assert capsys.readouterr().out.startswith("out-tiny: http://127.0.0.1:")
