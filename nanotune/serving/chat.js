// The chat tab of the page: one conversation per model. A message is sent to all models. Each
// conversation is a list of exchanges {user, answer}; any of them can be edited or regenerated.
import {$, ask, element, events, form, login, models, showGone} from "./page.js";

const say = $("#say"), box = say.elements.message;
let talks = [], running = null;

// ---------------------------------------------------------------------------
// asking

function request(talk) {
  const number = name => Number(form.elements[name].value);
  const system = form.elements.system.value.trim();
  const messages = talk.exchanges.flatMap(({user, answer}) => [{role: "user", content: user},
    ...(answer.trim() ? [{role: "assistant", content: answer}] : [])]);
  return {model: talk.id, messages: [...(system ? [{role: "system", content: system}] : []), ...messages],
    max_tokens: number("max_tokens"), temperature: number("temperature"), top_k: number("top_k"),
    top_p: number("top_p"), seed: Math.floor(Math.random() * 2 ** 32), stream: true};
}

// answers the last message of each of these conversations
async function run(asked) {
  const mine = running = new AbortController();
  showRunning();
  await Promise.all(asked.map(talk => answer(talk, mine.signal)));
  if (running === mine) running = null;
  showRunning();
}

async function answer(talk, signal) {
  const exchange = talk.exchanges.at(-1), state = $(".state", talk.root);
  const tell = (text, busy = true, bad = false) => {
    talk.root.ariaBusy = busy;
    if (talk.exchanges.at(-1) !== exchange) return;  // a new conversation was started
    state.textContent = text;
    state.classList.toggle("bad", bad);
  };
  exchange.answer = "";
  draw(talk);
  tell("waiting for the model");
  const text = talk.root.querySelector(".turn:last-child p");
  let dropped = 0;
  try {
    const response = await ask("/v1/chat/completions", {method: "POST", signal,
      body: JSON.stringify(request(talk))});
    for await (const event of events(response)) {
      exchange.answer += event.choices[0].delta.content;
      text.textContent = exchange.answer;
      dropped = event.dropped_messages;
      tell("");
      say.scrollIntoView({block: "nearest"});
    }
    tell(dropped ? `the ${dropped} oldest messages no longer fit into the context` : "", false);
  } catch (error) {
    const lost = error instanceof TypeError;  // fetch throws it if there is no connection
    if (lost && !signal.aborted) showGone(true);
    tell(signal.aborted ? "stopped" : lost ? "connection lost" : error.message, false,
      !signal.aborted);
  }
}

function send(text, from = Infinity) {
  if (running || !text.trim() || !form.reportValidity()) return false;
  for (const talk of talks) {
    talk.exchanges.length = Math.min(from, talk.exchanges.length);
    talk.exchanges.push({user: text.trim(), answer: ""});
  }
  run(talks);
  return true;
}

// ---------------------------------------------------------------------------
// showing

function showRunning() {
  $("#send").hidden = running !== null;
  $("#hush").hidden = running === null;
}

function draw(talk) {
  const turn = (role, text, label, act) => {
    const button = element("button", {type: "button", textContent: label});
    button.addEventListener("click", () => running || act(button.parentElement));
    return element("li", {className: `turn ${role}`}, element("p", {textContent: text, dir: "auto"}), button);
  };
  $(".turns", talk.root).replaceChildren(...talk.exchanges.flatMap(({user, answer}, at) => [
    turn("user", user, "Edit", item => edit(talk, item, at)),
    turn("assistant", answer, "Regenerate", () => {
      talk.exchanges.length = at + 1;
      run([talk]);
    })]));
}

// replaces a message with a text field; sending it replaces this exchange and all later ones
function edit(talk, item, at) {
  const field = element("textarea", {value: talk.exchanges[at].user, rows: 3, ariaLabel: "Message"});
  const button = (label, act) => {
    const node = element("button", {type: "button", textContent: label});
    node.addEventListener("click", act);
    return node;
  };
  item.replaceChildren(field, button("Send", () => send(field.value, at)), button("Cancel", () => draw(talk)));
  field.focus();
}

function choose(chat) {
  document.body.classList.toggle("chatting", chat);
  $("#tab-chat").ariaSelected = chat;
  $("#tab-text").ariaSelected = !chat;
  (chat ? box : form.elements.prompt).focus({preventScroll: true});
}

models.promise.then(all => {
  talks = all.filter(about => about.chat).map(({id}) => ({id, exchanges: [],
    root: element("article", {}, element("h2", {textContent: id}), element("ol", {className: "turns"}),
      element("p", {className: "state", role: "status"}))}));
  if (!talks.length) return;
  $("#talks").replaceChildren(...talks.map(({root}) => root));
  $("#tabs").hidden = false;
  choose(talks.length === all.length);
});

$("#tab-text").addEventListener("click", () => choose(false));
$("#tab-chat").addEventListener("click", () => choose(true));
say.addEventListener("submit", event => {
  event.preventDefault();
  if (send(box.value)) box.value = "";
});
$("#hush").addEventListener("click", () => running?.abort());
$("#anew").addEventListener("click", () => {
  running?.abort();
  for (const talk of talks) {
    talk.exchanges = [];
    draw(talk);
    $(".state", talk.root).textContent = "";
  }
  box.focus();
});
document.addEventListener("keydown", event => {
  if (login.open || !document.body.classList.contains("chatting")) return;
  if (event.key === "Escape") running?.abort();
  else if (event.key === "Enter" && event.target === box && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    say.requestSubmit();
  }
});
