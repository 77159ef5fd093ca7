"""The page of serve.py in a real Chromium (make test-browser)."""
import json
import os
import shutil
import subprocess
from urllib.parse import urlsplit

import pytest
import torch
from conftest import TEXT
from serving import CPU, chat_model, served, tiny_model, wait_until

from nanotune.generation.fast import open_model
from nanotune.serving.access import Access
from nanotune.text.tokenizer import CharTokenizer

pytestmark = pytest.mark.browser

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium")
ARGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync"]
BUSY = "[aria-busy=true]"
ATTACK = "<img src='/' onerror='window.hacked=1'>"


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    if CHROMIUM is None:
        pytest.skip("no chromium on the PATH")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=ARGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def server():
    """Two models; b takes 10 ms per token."""
    with served({"a": tiny_model(seed=1), "b": tiny_model(seconds=0.01)}) as server:
        yield server


@pytest.fixture
def open_page(browser):
    """open_page(server, **options) opens the page in a new browser profile. Checks at the end that
    no request left this machine, and that the page raised no error and obeyed its CSP."""
    contexts, hosts, faults = [], set(), []

    def open_(server, **options):
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.set_default_timeout(15_000)
        page.on("request", lambda r: hosts.add(urlsplit(r.url).hostname))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda m: faults.append(m.text) if "Security" in m.text else None)
        page.goto(f"http://127.0.0.1:{server.port}/")
        return page
    yield open_
    for context in contexts:
        context.close()
    assert hosts <= {"127.0.0.1", None} and faults == []  # None: the icon, a data: URL


def generate(page, wait=True, **fields):
    """Fill in the form and press Generate; return the texts of each column."""
    for name, value in ({"prompt": "Line", "max_tokens": 20} | fields).items():
        page.locator(f"[name={name}]").fill(str(value))
    page.locator("#go").click()
    if wait:
        settle(page)
        return texts(page)


def settle(page):
    page.wait_for_function("() => document.querySelector('#stop').hidden"
                           " && document.querySelector('.sample')")


def texts(page):
    columns = page.locator("article").all()
    return [column.locator(".sample").all_inner_texts() for column in columns]


def wait_for_spans(page, count):
    page.wait_for_function(f"() => document.querySelectorAll('.sample span').length > {count}")


def states(page):
    return page.locator(".state").all_inner_texts()


def test_tokens_appear_while_they_are_generated(server, open_page):
    page = open_page(server)
    generate(page, wait=False, max_tokens=150)
    spans = page.locator("article:nth-child(2) .sample span")
    page.wait_for_function("() => document.querySelector('article:nth-child(2) span')")
    early = spans.count()
    assert page.locator(BUSY).count() >= 1 and page.locator("#stop").is_visible()
    settle(page)
    assert early < spans.count() and page.locator(BUSY).count() == 0
    assert all("150 tokens" in state for state in states(page))


@pytest.mark.parametrize("stop", [lambda page: page.locator("#stop").click(),
                                  lambda page: page.keyboard.press("Escape")], ids=["click", "key"])
def test_stop_ends_the_generation(server, open_page, stop):
    page = open_page(server)
    generate(page, wait=False, max_tokens=2000)
    wait_for_spans(page, 30)
    stop(page)
    page.wait_for_selector("#go:visible")
    assert "stopped after" in states(page)[1]
    wait_until(lambda: server.engines["b"].running is None)
    assert server.engines["b"].model.fast.steps < 1000


def test_a_new_generation_replaces_the_one_that_is_running(server, open_page):
    page = open_page(server)
    generate(page, wait=False, max_tokens=2000)
    wait_for_spans(page, 30)
    page.locator("[name=max_tokens]").fill("60")
    page.locator("#again").click()
    assert page.locator(BUSY).count() >= 1
    settle(page)
    assert "60 tokens" in states(page)[1] and page.locator(BUSY).count() == 0


def test_the_same_seed_gives_the_same_text(server, open_page):
    page = open_page(server)
    first = generate(page, n=2, seed=7)
    assert first == generate(page, n=2, seed=7) != generate(page, n=2, seed=8)
    assert [len(samples) for samples in first] == [2, 2]
    page.locator("#again").click()  # generates with another seed
    assert page.locator("[name=seed]").input_value() != "8"
    settle(page)


def test_the_page_can_be_used_by_keyboard_alone(server, open_page):
    page = open_page(server, viewport={"width": 1000, "height": 400})
    page.wait_for_selector("article")
    page.keyboard.type("Line 1")  # the prompt has the focus
    page.keyboard.press("Control+Enter")
    settle(page)
    assert texts(page)[0][0].startswith("Line 1")
    page.locator(".sample").first.focus()
    page.keyboard.press("ArrowRight")
    first = page.locator("#tip").inner_text()
    page.keyboard.press("ArrowRight")
    assert page.locator("#tip").is_visible() and page.locator("#tip").inner_text() != first
    page.evaluate("scrollBy(0, 20)")
    page.evaluate("new Promise(requestAnimationFrame)")
    page.keyboard.press("ArrowRight")  # still works after scrolling
    assert page.locator(".sample span").nth(3).get_attribute("class") == "at"
    assert page.locator(".at").count() == 1


def test_models_are_shown_side_by_side(server, open_page):
    page = open_page(server)
    a, b = generate(page)
    assert a[0].startswith("Line") and b[0].startswith("Line") and a != b
    assert page.locator("h2").all_inner_texts()[:2] == ["a", "b"]
    assert all("seed 1337" in state for state in states(page))
    boxes = [article.bounding_box() for article in page.locator("article").all()]
    assert boxes[0]["y"] == boxes[1]["y"] and boxes[0]["x"] + boxes[0]["width"] < boxes[1]["x"]


def test_a_token_shows_its_alternatives(server, open_page):
    page = open_page(server)
    generate(page)
    token = page.locator(".sample span").nth(3)
    token.hover()
    tip = page.locator("#tip")
    assert tip.is_visible() and tip.locator("div").count() == 5 and "%" in tip.inner_text()
    assert tip.locator("h3").first.inner_text().split("\n")[0].replace("␣", " ") == \
        token.inner_text()
    background = "e => getComputedStyle(e).backgroundColor"
    shades = {span.evaluate(background) for span in page.locator(".sample span").all()}
    assert len(shades) > 3
    page.locator("#shade").uncheck()
    assert not tip.is_visible() and token.evaluate(background) == "rgba(0, 0, 0, 0)"


def test_html_in_prompt_and_output_is_shown_as_text(server, open_page, monkeypatch):
    tokenizer = server.engines["a"].model.tokenizer

    def stream(model, prompts, *args, **options):
        for id in tokenizer.encode(ATTACK):
            yield torch.tensor([id] * len(prompts)), torch.zeros(len(prompts), tokenizer.n_vocab)
    monkeypatch.setattr("nanotune.serving.engine.stream", stream)
    page = open_page(server)
    for column in generate(page, prompt=ATTACK):
        assert column == [ATTACK * 2]
    page.locator(".sample span").first.hover()
    page.locator(".curl summary").click()
    assert ATTACK.replace("'", "'\\''") in page.locator("#curl").inner_text()
    assert page.locator("img").count() == 0 and page.evaluate("window.hacked") is None


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl")
def test_the_curl_command_gives_the_same_text(server, open_page):
    page = open_page(server)
    prompt = "Line 1: what's more"
    text = generate(page, prompt=prompt, seed=5, stop="zz\\n")[0][0]
    page.locator(".curl summary").click()
    command = page.locator("#curl").inner_text()
    answer = subprocess.run(["bash", "-c", command + " -s"], capture_output=True, text=True)
    assert prompt + json.loads(answer.stdout)["choices"][0]["text"] == text
    page.locator("#copy").click()
    assert page.locator("#copy").inner_text() == "Copied"


def test_the_loss_curves_of_a_run_are_shown(open_page, make_run):
    out_dir, _ = make_run(CharTokenizer(sorted(set(TEXT))))
    (out_dir / "metrics.jsonl").write_text("".join(
        f'{{"step": {i}, "train_loss": {3 - i / 10}, "val_loss": 3.2}}\n'
        f'{{"iter": {i}, "loss": 3.0}}\n' for i in range(4)))
    with served({"run": open_model(str(out_dir), CPU, torch.float32), "other": tiny_model()},
                sources={"run": out_dir}) as server:
        page = open_page(server)
        page.wait_for_selector("article")
        assert [run.is_visible() for run in page.locator(".run").all()] == [True, False]
        page.locator(".run summary").first.click()
        page.wait_for_selector(".run svg")
        assert page.locator("circle.train").count() == 4 == page.locator("circle.val").count()
        assert "train 2.70" in page.locator("svg").inner_html()
        assert "step 0 · validation loss 1.00" in page.locator(".facts").first.inner_text()
        (out_dir / "metrics.jsonl").write_text("")  # the file is read each time the curve is opened
        for _ in range(2):
            page.locator(".run summary").first.click()
        page.wait_for_selector("figure:has-text('Nothing is logged yet')")


def test_the_page_shows_that_the_server_is_gone_and_that_it_is_back(open_page):
    with served({"a": tiny_model(seconds=0.02)}) as server:
        page = open_page(server)
        generate(page, wait=False, max_tokens=2000)
        wait_for_spans(page, 3)
    page.wait_for_selector("#gone:visible")
    assert "does not answer" in page.locator("#gone").inner_text()
    assert "connection lost after" in states(page)[0]
    page.locator("#go").click()
    settle(page)
    assert "connection lost after 0" in states(page)[0]
    with served({"a": tiny_model()}, port=server.port):
        page.wait_for_selector("#gone", state="hidden")
        assert generate(page)[0][0].startswith("Line")


def test_errors_are_shown(server, open_page):
    page = open_page(server)
    generate(page, prompt="L" * 500)
    assert "the model reads at most 64; give a shorter prompt" in states(page)[0]
    page.locator(".settings summary").click()
    page.locator("[name=max_tokens]").evaluate("input => { input.value = '' }")
    page.locator("#go").click()
    assert page.locator("[name=max_tokens]").is_visible()  # the field that is missing is shown


def test_the_page_asks_for_the_token(open_page):
    with served({"a": tiny_model()}, Access(token="correct-horse-battery")) as server:
        page = open_page(server)
        for given in ("wrong", "correct-horse-battery"):
            page.wait_for_selector("dialog[open]")
            page.locator("dialog input").fill(given)
            page.keyboard.press("Enter")
        assert generate(page)[0][0].startswith("Line")
        assert "$TOKEN" in page.locator("#curl").text_content()
        page.reload()
        page.wait_for_selector("article")


def test_the_page_works_on_a_phone_and_in_dark_mode(server, open_page):
    backgrounds = []
    for scheme in ("light", "dark"):
        page = open_page(server, viewport={"width": 360, "height": 740}, color_scheme=scheme,
                         has_touch=True)
        page.wait_for_selector("article")
        page.locator(".settings summary").tap()
        page.locator(".curl summary").tap()
        generate(page, max_tokens=60)
        page.locator(".sample span").nth(8).tap()
        box = page.locator("#tip").bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 360
        assert page.evaluate("document.scrollingElement.scrollWidth") <= 360
        backgrounds.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert backgrounds[0] != backgrounds[1]


# -----------------------------------------------------------------------------
# the chat tab

@pytest.fixture(scope="module")
def chat_server():
    """Two models with a chat template, and one without."""
    with served({"x": chat_model(seconds=0.005), "y": chat_model(seed=1),
                 "plain": tiny_model()}) as server:
        yield server


def say(page, text, wait=True):
    """Send a message; return turns(), or None if not `wait`."""
    page.locator("[name=message]").fill(text)
    page.keyboard.press("Enter")
    return turns(page) if wait else None


def turns(page):
    """[(role, text), ...] of the first conversation, once no answer is being written."""
    page.wait_for_selector("#send:visible")
    found = page.locator("#talks article:first-child .turn").all()
    return [("user" if "user" in turn.get_attribute("class") else "assistant",
             turn.locator("p").inner_text()) for turn in found]


def sent_messages(page):
    """A list to which the messages of each later request to the chat API are added."""
    found = []
    page.on("request", lambda request: found.append(request.post_data_json["messages"])
            if request.url.endswith("/chat/completions") else None)
    return found


@pytest.fixture
def chat_page(chat_server, open_page):
    page = open_page(chat_server)
    page.locator("#tab-chat").click()
    page.locator("[name=max_tokens]").fill("12")
    return page


def test_a_conversation_is_sent_to_each_model_that_can_chat(chat_page, chat_server):
    requests = sent_messages(chat_page)
    assert chat_page.locator("#talks h2").all_inner_texts() == ["x", "y"]
    assert chat_page.locator("#columns").is_hidden() and chat_page.locator("#go").is_hidden()
    first = say(chat_page, "Line 1")
    assert [role for role, _ in first] == ["user", "assistant"] and first[0][1] == "Line 1"
    both = say(chat_page, "And?")
    assert both[:2] == first and len(both) == 4 and len(requests) == 4
    assert [message["role"] for message in requests[-1]] in (
        ["user", "assistant", "user"], ["user", "user"])  # an answer may be empty
    assert chat_page.locator("#talks article:nth-child(2) .turn").count() == 4
    chat_page.locator("[name=system]").fill("Be kind.")
    chat_page.locator("#anew").click()
    assert turns(chat_page) == []
    say(chat_page, "Line 2")
    assert requests[-1] == [{"role": "system", "content": "Be kind."},
                            {"role": "user", "content": "Line 2"}]
    chat_page.locator("#tab-text").click()
    assert generate(chat_page)[0][0].startswith("Line")  # still works


def test_a_turn_can_be_edited_and_an_answer_regenerated(chat_page):
    requests = sent_messages(chat_page)
    say(chat_page, "Line 1")
    before = say(chat_page, "Line 2")
    talk = chat_page.locator("#talks article:first-child")
    talk.locator(".turn:last-child button").click()  # regenerates the last answer of this model
    after = turns(chat_page)
    assert after[:3] == before[:3] and len(after) == 4 and len(requests) == 5
    talk.locator(".turn.assistant button").first.click()
    assert len(turns(chat_page)) == 2 and requests[-1] == [{"role": "user", "content": "Line 1"}]
    talk.locator(".turn.user button").first.click()
    talk.locator(".turn textarea").fill("Never mind")
    talk.locator(".turn button", has_text="Cancel").click()
    assert turns(chat_page)[0] == ("user", "Line 1")
    talk.locator(".turn.user button").first.click()
    talk.locator(".turn textarea").fill("Line 3")
    talk.locator(".turn button", has_text="Send").click()
    assert turns(chat_page)[0] == ("user", "Line 3") and len(turns(chat_page)) == 2
    assert requests[-1] == [{"role": "user", "content": "Line 3"}]
    assert chat_page.locator("#talks article:nth-child(2) .turn").count() == 2


@pytest.mark.parametrize("stop", [lambda page: page.locator("#hush").click(),
                                  lambda page: page.keyboard.press("Escape")], ids=["click", "key"])
def test_stop_keeps_the_unfinished_answer(chat_page, chat_server, stop):
    chat_page.locator("[name=max_tokens]").fill("2000")
    chat_page.locator("[name=temperature]").fill("0")
    say(chat_page, "Line", wait=False)
    chat_page.wait_for_function(
        "() => document.querySelector('.turn:last-child p').textContent.length > 20")
    stop(chat_page)
    (_, answer), = turns(chat_page)[1:]
    assert len(answer) > 20 and "stopped" in chat_page.locator("#talks .state").first.inner_text()
    wait_until(lambda: chat_server.engines["x"].running is None)
    say(chat_page, "Line", wait=False)
    chat_page.locator("#anew").click()
    assert turns(chat_page) == []
    assert chat_page.locator("#talks .state").all_inner_texts() == ["", ""]


def test_the_chat_shows_errors_dropped_messages_and_html_as_text(chat_page):
    say(chat_page, "long " * 99)
    state = chat_page.locator("#talks .state").first
    assert "shorten it" in state.inner_text() and "bad" in state.get_attribute("class")
    chat_page.locator("#anew").click()
    for i in range(5):
        say(chat_page, f"Line {i}: what's more, it ends.")
    assert "oldest messages no longer fit" in state.inner_text()
    say(chat_page, ATTACK)
    assert ("user", ATTACK) in turns(chat_page) and chat_page.locator("img").count() == 0
    assert chat_page.evaluate("window.hacked") is None


def test_the_chat_tab_is_shown_only_for_models_with_a_template(server, open_page):
    page = open_page(server)
    page.wait_for_selector("article")
    assert page.locator("#tabs").is_hidden()
    with served({"x": chat_model()}) as alone:
        page = open_page(alone, viewport={"width": 360, "height": 740})
        page.wait_for_selector("#talks article")
        assert page.locator("#say").is_visible() and page.locator("[name=prompt]").is_hidden()
        page.locator("[name=message]").fill("Line 1")
        page.locator("#send").click()
        assert len(turns(page)) == 2
        assert page.evaluate("document.scrollingElement.scrollWidth") <= 360
