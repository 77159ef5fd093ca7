// The page of serve.py: sends the form to each model and shows the tokens as they arrive.
export const $ = (selector, root = document) => root.querySelector(selector);
export const form = $("#form");
export const login = $("#login");
const tip = $("#tip");
const details = new WeakMap();  // token's span -> its log-probabilities
const phone = matchMedia("(max-width: 820px)");
export const models = Promise.withResolvers();  // the list of /v1/models, once it is known
let columns = [], running = null, token = sessionStorage.getItem("token") ?? "";

export function element(name, properties = {}, ...children) {
  const node = Object.assign(document.createElement(name), properties);
  node.append(...children);
  return node;
}

export function ask(path, options = {}) {
  const headers = {"Content-Type": "application/json"};
  if (token) headers.Authorization = `Bearer ${token}`;
  return fetch(path, {...options, headers});
}

// ---------------------------------------------------------------------------
// generation

function request(model) {
  const number = name => Number(form.elements[name].value);
  const stop = form.elements.stop.value.replaceAll("\\n", "\n").replaceAll("\\t", "\t");
  return {model, prompt: form.elements.prompt.value, max_tokens: number("max_tokens"),
    temperature: number("temperature"), top_k: number("top_k"), top_p: number("top_p"),
    n: number("n"), seed: number("seed"), ...(stop && {stop})};
}

async function generate() {
  if (!columns.length || !form.reportValidity()) return;
  running?.abort();
  if (phone.matches) $("#columns").scrollIntoView({behavior: "smooth"});
  const mine = running = new AbortController();
  showRunning();
  await Promise.all(columns.map(column => run(column, mine.signal)));
  if (running === mine) running = null;
  showRunning();
}

function showRunning() {
  $("#go").hidden = running !== null;
  $("#stop").hidden = running === null;
}

async function run(column, signal) {
  const {root, about} = column, body = request(about.id), state = $(".state", root);
  const samples = Array.from({length: body.n}, () => element("div",
    {className: "sample", tabIndex: 0, dir: "auto"}, element("b", {textContent: body.prompt})));
  const say = (text, busy = true, bad = false) => {
    if (column.signal !== signal) return;  // another run has started
    state.textContent = text;
    state.classList.toggle("bad", bad);
    root.ariaBusy = busy;
  };
  column.signal = signal;
  $(".samples", root).replaceChildren(...samples);
  say("waiting for the model");
  let count = 0, rate = "", begin = null;
  try {
    const response = await ask("/v1/completions", {method: "POST", signal,
      body: JSON.stringify({...body, logprobs: 5, stream: true})});
    for await (const event of events(response)) {
      count += show(event.choices[0], samples);
      begin ??= performance.now();
      const seconds = (performance.now() - begin) / 1000;
      if (seconds > 0.5) rate = `, ${Number((count / seconds).toPrecision(3))} per second`;
      say(`${count} tokens${rate}`);
    }
    say(`${count} tokens${rate}, seed ${body.seed}`, false);
  } catch (error) {
    const lost = error instanceof TypeError;  // fetch throws it if there is no connection
    if (lost && !signal.aborted) showGone(true);
    say(signal.aborted ? `stopped after ${count} tokens`
      : lost ? `connection lost after ${count} tokens` : error.message, false, !signal.aborted);
  }
}

// yields the events of a stream; throws its error, or a TypeError if the connection is lost
export async function* events(response) {
  if (!response.ok) throw new Error((await response.json()).error.message);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (let part = await reader.read(); !part.done; part = await reader.read()) {
    const whole = (text + part.value).split("\n\n");
    text = whole.pop();
    for (const data of whole.map(event => event.replace(/^data: /, ""))) {
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
  throw new TypeError("the stream is incomplete");
}

function show(choice, samples) {
  const sample = samples[choice.index];
  if (choice.finish_reason) sample.classList.add(choice.finish_reason);
  if (choice.text) {
    const span = element("span", {textContent: choice.text});
    const sum = choice.logprobs.token_logprobs.reduce((a, b) => a + b, 0);
    span.style.setProperty("--s", Math.min(1, -sum / 9).toFixed(3));  // e^-9: 1 in 8,000
    details.set(span, choice.logprobs);
    sample.append(span);
  }
  return choice.logprobs.tokens.length;
}

// ---------------------------------------------------------------------------
// a token's probability and its alternatives

const visible = text => text.replaceAll(" ", "␣").replaceAll("\n", "⏎").replaceAll("\t", "⇥");
const percent = logprob => {
  const p = 100 * Math.exp(logprob);
  return p < 0.01 ? "<0.01 %" : `${p.toFixed(p < 1 ? 2 : p < 99.95 ? 1 : 0)} %`;
};

function explain(span) {
  $(".at")?.classList.remove("at");
  tip.hidden = !details.has(span);
  if (tip.hidden) return;
  span.classList.add("at");
  const {tokens, token_logprobs, top_logprobs} = details.get(span);
  tip.replaceChildren(...tokens.flatMap((text, i) => [
    element("h3", {}, element("s", {textContent: visible(text)}), percent(token_logprobs[i])),
    ...Object.entries(top_logprobs[i]).sort((a, b) => b[1] - a[1]).map(([other, logprob]) => {
      const row = element("div", {className: other === text ? "chosen" : ""},
        element("s", {textContent: visible(other)}), percent(logprob));
      row.style.setProperty("--p", Math.exp(logprob));
      return row;
    })]));
  const at = span.getClientRects()[0] ?? span.getBoundingClientRect(), box = tip.getBoundingClientRect();
  const below = at.bottom + 8 + box.height < innerHeight;
  tip.style.left = `${Math.max(8, Math.min(at.left, innerWidth - box.width - 8))}px`;
  tip.style.top = `${below ? at.bottom + 8 : Math.max(8, at.top - box.height - 8)}px`;
}

const spanOf = event => event.target.closest?.(".sample span");
document.addEventListener("pointerover", event => explain(spanOf(event)));
document.addEventListener("click", event => explain(spanOf(event)));
document.addEventListener("scroll", () => explain($(".at")), {passive: true});
document.addEventListener("focusin", event => {
  if (event.target.matches(".sample:focus-visible")) explain($("span", event.target));
});

document.addEventListener("keydown", event => {
  const {key, target} = event;
  if (login.open || document.body.classList.contains("chatting")) return;
  if (key === "Enter" && (event.ctrlKey || event.metaKey)) generate();
  else if (key === "Escape") { running?.abort(); explain(null); }
  else if (target.matches(".sample") && /^Arrow(Left|Right)$/.test(key)) {
    const at = $(".at", target), spans = [...target.querySelectorAll("span")];
    const next = spans[spans.indexOf(at) + (key === "ArrowLeft" ? -1 : 1)] ?? at;
    next?.scrollIntoView({block: "nearest"});
    explain(next);
  } else return;
  event.preventDefault();
});

// ---------------------------------------------------------------------------
// a model's training run

async function showRun(root, id) {
  const response = await ask(`/runs/${encodeURIComponent(id)}/metrics`);
  if (!response.ok) return;
  const {settings, batch, evaluations} = await response.json();
  $("figure", root).replaceChildren(curve({batch, val: evaluations.map(([x, , y]) => [x, y]),
    train: evaluations.map(([x, y]) => [x, y])}));
  $("dl", root).replaceChildren(...Object.entries(settings).map(([name, value]) => element("div", {},
    element("dt", {textContent: name}), element("dd", {textContent: String(value)}))));
}

function curve(series) {
  const [W, H, left, right, bottom] = [420, 200, 32, 62, 22];
  const svg = (name, attributes, ...children) => {
    const node = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    node.append(...children);
    return node;
  };
  const all = Object.values(series).flat().filter(([, y]) => y !== null);
  if (!all.length) return "Nothing is logged yet.";
  const top = Math.max(1, ...all.map(([x]) => x));
  const low = Math.min(...all.map(([, y]) => y)), high = Math.max(...all.map(([, y]) => y));
  const X = x => left + x / top * (W - left - right);
  const Y = y => 8 + (high - y) / (high - low || 1) * (H - bottom - 16);
  const chart = svg("svg", {viewBox: `0 0 ${W} ${H}`, role: "img",
    "aria-label": `Loss from step 0 to ${top}, between ${low.toFixed(2)} and ${high.toFixed(2)}`});
  for (const part of [0, 1 / 3, 2 / 3, 1]) {
    const loss = high - part * (high - low);
    chart.append(svg("path", {class: "grid", d: `M${left} ${Y(loss)}H${W - right}`}),
      svg("text", {x: left - 6, y: Y(loss) + 4, "text-anchor": "end"}, loss.toFixed(2)),
      svg("text", {x: X(top * part), y: H - 4, "text-anchor": "middle"}, `${Math.round(top * part)}`));
  }
  let last = -99;  // y of the last label; the next one must not overlap it
  for (const [name, points] of Object.entries(series)) {
    const known = points.filter(([, y]) => y !== null);
    if (!known.length) continue;
    chart.append(svg("path", {class: name, d: "M" + known.map(([x, y]) => `${X(x)} ${Y(y)}`).join("L")}));
    if (name === "batch") continue;
    chart.append(...known.map(([x, y]) => svg("circle", {class: name, cx: X(x), cy: Y(y), r: 2.5},
      svg("title", {}, `step ${x}: ${name} loss ${y.toFixed(4)}`))));
    const [x, y] = known.at(-1), at = Math.abs(Y(y) - last) < 13 ? last + 13 : Y(y);
    chart.append(svg("text", {class: name, x: X(x) + 8, y: at + 4}, `${name} ${y.toFixed(2)}`));
    last = at;
  }
  return chart;
}

// ---------------------------------------------------------------------------
// the server

export function showGone(gone) {
  document.body.classList.toggle("gone", gone);
  $("#gone").hidden = !gone;
  $("#status").textContent = gone ? "no server" : location.host;
}

async function watch() {
  try {
    const response = await fetch("/health", {signal: AbortSignal.timeout(5000)});
    showGone(!response.ok);
    if (!columns.length && !login.open) await showModels();
  } catch {
    showGone(true);
  }
  setTimeout(watch, 2000);
}

async function showModels() {
  const response = await ask("/v1/models");
  if (response.status === 401) {
    $(".bad", login).hidden = !token;
    return login.showModal();
  }
  const {data} = await response.json();
  models.resolve(data);
  columns = data.map(about => {
    const root = $("#column").content.firstElementChild.cloneNode(true);
    const million = about.parameters / 1e6;
    $("h2", root).textContent = about.id;
    const facts = [`${about.kind} · ${million.toFixed(million < 10 ? 1 : 0)}M parameters`
      + (about.context ? ` · context ${about.context}` : "")];
    if (about.step !== null) facts.push(`step ${about.step}`);
    if (about.val_loss !== null) facts[1] += ` · validation loss ${about.val_loss.toFixed(2)}`;
    if (about.dataset) facts[1] += ` on ${about.dataset}`;
    $(".facts", root).textContent = facts.join("\n");
    $(".run", root).hidden = !about.has_run;
    $(".run", root).addEventListener("toggle", event => event.target.open && showRun(root, about.id));
    return {root, about};
  });
  $("#columns").replaceChildren(...columns.map(({root}) => root));
  $("#go").disabled = $("#again").disabled = false;
  describe();
}

function describe() {  // shows the sliders' values and the curl command
  for (const slider of form.querySelectorAll("input[type=range]"))
    $("output", slider.parentElement).value = Number(slider.value).toFixed(2);
  const quoted = text => `'${text.replaceAll("'", "'\\''")}'`;
  $("#curl").textContent = [`curl ${location.origin}/v1/completions`,
    "-H 'Content-Type: application/json'", ...(token ? ['-H "Authorization: Bearer $TOKEN"'] : []),
    `-d ${quoted(JSON.stringify(request(columns[0]?.about.id), null, 2))}`].join(" \\\n  ");
}

form.addEventListener("input", describe);
form.addEventListener("invalid", () => { $(".settings").open = true; }, true);
form.addEventListener("submit", event => { event.preventDefault(); generate(); });
$("#stop").addEventListener("click", () => running?.abort());
$("#again").addEventListener("click", () => {
  form.elements.seed.value = Math.floor(Math.random() * 1e6);
  describe();
  generate();
});
$("#copy").addEventListener("click", event => {
  getSelection().selectAllChildren($("#curl"));
  document.execCommand("copy");  // navigator.clipboard needs https, unless the host is local
  event.target.textContent = "Copied";
  setTimeout(() => { event.target.textContent = "Copy"; }, 1500);
});
$("#shade").addEventListener("change", event =>
  document.body.classList.toggle("shaded", event.target.checked));
document.body.classList.toggle("shaded", $("#shade").checked);
$("form", login).addEventListener("submit", event => {
  event.preventDefault();
  token = $("input", login).value.trim();
  sessionStorage.setItem("token", token);
  login.close();
  showModels();
});
if (/Mac/.test(navigator.platform)) $("#go kbd").textContent = "⌘ ⏎";
$(".settings").open = !phone.matches;
describe();
watch();
