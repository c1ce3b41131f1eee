// The page: a document and a weighting go to POST /v1/completions, or a
// conversation to POST /v1/chat/completions, and what comes back is shown as
// text. All state but the conversation is in the address after "#".
"use strict";

const $ = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
const PAUSE = 150; // ms without a change before the server is asked

const state = {
  model: null, // as /v1/models has it
  weights: [], // in the order of the objectives, summing to 1
  alpha: null, // where the run is steered by it
  front: null, // as /v1/front has it
  stops: [], // weights along the front
  chatting: false, // whether the conversation is shown, not the document
  turns: [], // of it: {role, content}, and of an answer its weights
};
let asked = {}; // an AbortController for each part of the page
let timers = {};

// ---- The server ----

async function request(path, options = {}) {
  const headers = { "Content-Type": "application/json" };
  const key = sessionStorage.getItem("key");
  if (key) headers.Authorization = `Bearer ${key}`;
  const response = await fetch(path, { ...options, headers });
  if (response.ok) return response;
  const content = await response.json().catch(() => null);
  const error = new Error(
    content?.error?.message ?? `The server answered ${response.status}.`,
  );
  error.status = response.status;
  error.retryAfter = Number(response.headers.get("Retry-After"));
  throw error;
}

async function call(path) {
  return (await request(path)).json();
}

// A greedy answer's response, at a weighting.
async function ask(path, fields, weights, alpha, signal) {
  const body = { model: state.model.id, temperature: 0, ...fields };
  const objectives = state.model.objectives;
  if (objectives.length) {
    body.weights = Object.fromEntries(
      objectives.map((name, i) => [name, weights[i]]),
    );
  }
  if (alpha !== null) body.alpha = alpha;
  const options = { method: "POST", body: JSON.stringify(body), signal };
  for (let attempt = 0; ; attempt++) {
    try {
      return await request(path, options);
    } catch (error) {
      if (!(error.retryAfter > 0) || attempt === 3) throw error;
      await new Promise((done) => setTimeout(done, 1000 * error.retryAfter));
      signal.throwIfAborted();
    }
  }
}

async function summarise(text, weights, alpha, signal) {
  const fields = { prompt: text, truncate: true };
  return (await ask("v1/completions", fields, weights, alpha, signal)).json();
}

// The events of a response that is a stream.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let left = ""; ; ) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (left + value).split("\n\n");
    left = parts.pop();
    for (const part of parts) {
      const data = part.slice("data: ".length);
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

function report(error) {
  if (error?.name === "AbortError") return;
  if (error?.status === 401) {
    sessionStorage.removeItem("key");
    $("key-form").hidden = false;
    $("key").focus();
    return;
  }
  $("error").textContent = error
    ? error instanceof TypeError
      ? "The server can't be reached."
      : error.message
    : "";
  $("error").hidden = !error;
}

// ---- Weightings ----

function normalised(weights) {
  const total = weights.reduce((sum, w) => sum + w, 0);
  if (!(total > 0)) return weights.map(() => 1 / weights.length);
  return weights.map((w) => w / total);
}

// One weight changes to a value; the others keep their proportions.
function withWeight(weights, index, value) {
  const rest = 1 - weights[index];
  const share = 1 - value;
  return weights.map((w, i) => {
    if (i === index) return value;
    return rest > 1e-9 ? (w / rest) * share : share / (weights.length - 1);
  });
}

function shown(weights) {
  return state.model.objectives
    .map((name, i) => `${name}\u00a0${weights[i].toFixed(2)}`)
    .join(", ");
}

function alphaOf(position) {
  const [low, high] = state.model.alpha_range;
  if (position <= 0) return low;
  if (position >= 1) return high;
  return low * (high / low) ** position;
}

function positionOf(alpha) {
  const [low, high] = state.model.alpha_range;
  return high > low ? Math.log(alpha / low) / Math.log(high / low) : 0;
}

// The corners of the simplex and what lies between, from the last objective's
// to the first's.
function makeStops(m) {
  if (m < 2) return [Array(m).fill(1)];
  const corner = (i) => Array.from({ length: m }, (_, j) => Number(i === j));
  const between = (a, b, share) => a.map((x, i) => x + (b[i] - x) * share);
  if (m === 2) {
    return [0, 0.25, 0.5, 0.75, 1].map((s) => between(corner(1), corner(0), s));
  }
  const stops = [];
  for (let i = 0; i < m; i++) {
    stops.push(corner(i));
    if (m === 3) stops.push(between(corner(i), corner((i + 1) % m), 0.5));
  }
  return [...stops, Array(m).fill(1 / m)];
}

function steer(weights, alpha = state.alpha) {
  state.weights = normalised(weights);
  state.alpha = alpha;
  showWeighting();
  later("summary", askSummary);
  if (alpha !== null) later("row", askRow, 2 * PAUSE);
}

// ---- The address ----

function saveAddress() {
  const parameters = new URLSearchParams();
  const names = state.model.objectives;
  if (names.length > 1) {
    parameters.set(
      "weights",
      names.map((n, i) => `${n}=${Number(state.weights[i].toFixed(4))}`).join(),
    );
  }
  if (state.alpha !== null) {
    parameters.set("alpha", Number(state.alpha.toPrecision(4)));
  }
  if (state.chatting) parameters.set("view", "chat");
  parameters.set("document", $("document").value.slice(0, 4000));
  history.replaceState(null, "", `#${parameters}`);
}

function readAddress() {
  const parameters = new URLSearchParams(location.hash.slice(1));
  const names = state.model.objectives;
  const weights = Array(names.length).fill(0);
  for (const part of (parameters.get("weights") ?? "").split(",")) {
    const [name, value] = part.split("=");
    const i = names.indexOf(name);
    if (i >= 0 && Number(value) >= 0) weights[i] = Math.min(1, Number(value));
  }
  state.weights = normalised(weights);
  if (state.model.alpha_range) {
    const [low, high] = state.model.alpha_range;
    const alpha = Number(parameters.get("alpha") ?? low);
    state.alpha = Math.min(high, Math.max(low, alpha || low));
  }
  state.chatting = state.model.chat && parameters.get("view") === "chat";
  return parameters.get("document");
}

// ---- Asking ----

function later(name, action, pause = PAUSE) {
  clearTimeout(timers[name]);
  // What is on its way answers a question that is no longer asked.
  asked[name]?.abort();
  if (name === "summary") {
    const place = state.chatting ? $("turns").lastElementChild : $("summary");
    place?.classList.add("busy");
  }
  timers[name] = setTimeout(action, pause);
}

// Only the newest question of each part of the page is answered.
function newest(name) {
  asked[name]?.abort();
  asked[name] = new AbortController();
  return asked[name].signal;
}

async function askSummary() {
  saveAddress();
  if (state.chatting) return askTurn();
  const text = $("document").value.trim();
  const signal = newest("summary");
  const place = $("summary");
  if (!text) {
    place.replaceChildren();
    place.classList.remove("busy");
    $("note").textContent = "Type a document, or choose an example.";
    return;
  }
  place.classList.add("busy");
  try {
    const answer = await summarise(text, state.weights, state.alpha, signal);
    showText(place, answer.choices[0].text, text);
    const most = state.model.max_prompt_tokens;
    const cut = answer.usage.prompt_tokens >= most;
    const marked = place.querySelector(".unsupported") !== null;
    $("note").textContent = [
      marked ? "Underlined: words that the document does not have." : "",
      cut ? `The model reads ${most} tokens; more are cut.` : "",
    ]
      .join(" ")
      .trim();
    place.dataset.weights = JSON.stringify(state.weights); // for tests
    place.classList.remove("busy");
    report(null);
  } catch (error) {
    if (error.name !== "AbortError") place.classList.remove("busy");
    report(error);
  }
}

async function askRow() {
  if (state.chatting) return;
  const text = $("document").value.trim();
  const signal = newest("row");
  try {
    await Promise.all(
      state.stops.map(async (weights, i) => {
        const place = $("row").children[i].querySelector(".text");
        if (!text) return place.replaceChildren();
        const answer = await summarise(text, weights, state.alpha, signal);
        showText(place, answer.choices[0].text, text);
      }),
    );
  } catch (error) {
    report(error);
  }
}

// The conversation's last turn, anew where it has been answered.
async function askTurn() {
  const signal = newest("summary");
  const turns = state.turns;
  if (turns.at(-1)?.role === "assistant") turns.pop();
  if (!turns.length) return;
  const messages = turns.map(({ role, content }) => ({ role, content }));
  const turn = { role: "assistant", content: "", weights: state.weights };
  turns.push(turn);
  $("send").disabled = true;
  showTurns();
  const place = $("turns").lastElementChild;
  place.classList.add("busy");
  try {
    const fields = { messages, stream: true };
    const path = "v1/chat/completions";
    const stream = events(
      await ask(path, fields, state.weights, state.alpha, signal),
    );
    for await (const event of stream) {
      turn.content += event.choices[0].delta.content;
      place.lastElementChild.textContent = turn.content;
    }
    report(null);
  } catch (error) {
    if (error.name === "AbortError") return; // another answer takes its place
    turns.pop();
    showTurns();
    report(error);
  }
  place.classList.remove("busy");
  $("send").disabled = false;
}

// ---- Showing ----

function element(tag, attributes = {}, text = "") {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    made.setAttribute(name, value);
  }
  made.textContent = text;
  return made;
}

function shape(parent, tag, attributes, text = "") {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) {
    made.setAttribute(name, value);
  }
  made.textContent = text;
  parent.append(made);
  return made;
}

// Text, as text; its words that the document lacks are marked.
function showText(place, text, source) {
  const words = (s) => s.toLowerCase().match(/[\p{L}\p{N}$€£%]+/gu) ?? [];
  const known = new Set(words(source));
  // Words that carry nothing of their own.
  for (const word of "a an and after as at by for in of on the to".split(" ")) {
    known.add(word);
  }
  const parts = text.split(/(\s+)/).map((part) => {
    const lacks = words(part).some((word) => !known.has(word));
    if (!lacks) return part;
    return element("span", { class: "unsupported" }, part);
  });
  place.replaceChildren(...parts);
}

function showView() {
  $("view").hidden = !state.model.chat;
  $("view").setAttribute("aria-pressed", state.chatting);
  $("chat").hidden = !state.chatting;
  for (const place of document.querySelectorAll(".documents")) {
    place.hidden = state.chatting;
  }
}

function showTurns() {
  $("turns").replaceChildren(
    ...state.turns.map(({ role, content, weights }) => {
      const item = element("li", { class: role });
      const at = weights?.length > 1 ? ` at ${shown(weights)}` : "";
      item.append(
        element("span", { class: "who" }, role === "user" ? "You" : `Model${at}`),
        element("span", { class: "text" }, content),
      );
      return item;
    }),
  );
}

function showWeighting() {
  state.model.objectives.forEach((name, i) => {
    const input = $(`weight-${i}`);
    if (!input) return;
    const value = state.weights[i].toFixed(2);
    if (document.activeElement !== input) input.value = state.weights[i];
    input.setAttribute("aria-valuetext", value);
    $(`weight-${i}-value`).textContent = value;
  });
  if (state.alpha !== null) {
    const value = state.alpha.toPrecision(2);
    if (document.activeElement !== $("alpha")) {
      $("alpha").value = positionOf(state.alpha);
    }
    $("alpha").setAttribute("aria-valuetext", value);
    $("alpha-value").textContent = value;
  }
  [...$("row").children].forEach((item, i) => {
    const here = state.stops[i].every(
      (w, j) => Math.abs(w - state.weights[j]) < 0.005,
    );
    item.firstChild.setAttribute("aria-pressed", here);
  });
  showTriangle();
  showFront();
}

function makeSlider(id, name, settings, change) {
  const box = element("div", { class: "slider" });
  const input = element("input", { id, type: "range", ...settings });
  input.addEventListener("input", () => change(Number(input.value)));
  // While it moves it leads; afterwards it shows what the weighting is.
  input.addEventListener("change", () => showWeighting());
  box.append(
    element("label", { for: id }, name),
    element("output", { id: `${id}-value`, for: id }),
    input,
  );
  $("sliders").append(box);
}

function makeControls() {
  const names = state.model.objectives;
  if (names.length > 1) {
    names.forEach((name, i) => {
      const settings = { min: 0, max: 1, step: 0.01 };
      makeSlider(`weight-${i}`, name, settings, (value) =>
        steer(withWeight(state.weights, i, value)),
      );
    });
  }
  if (state.alpha !== null) {
    const settings = { min: 0, max: 1, step: 0.01 };
    makeSlider("alpha", "alpha, the KL weight", settings, (position) =>
      steer(state.weights, alphaOf(position)),
    );
  }
  if (names.length === 3) makeTriangle();
  state.stops = makeStops(names.length);
  $("row").replaceChildren(
    ...state.stops.map((weights) => {
      const item = element("li");
      const button = element("button", { type: "button" });
      button.append(
        element("span", { class: "weights" }, shown(weights)),
        element("span", { class: "text" }),
      );
      button.addEventListener("click", () => steer(weights));
      item.append(button);
      return item;
    }),
  );
}

// ---- The triangle of three objectives ----

const CORNERS = [
  [0, 173],
  [100, 0],
  [200, 173],
];

function makeTriangle() {
  const svg = $("triangle");
  svg.removeAttribute("hidden");
  shape(svg, "polygon", { class: "area", points: CORNERS.join(" ") });
  const anchors = ["start", "middle", "end"];
  state.model.objectives.forEach((name, i) => {
    const [x, y] = CORNERS[i];
    const place = { x, y: y + (i === 1 ? -4 : 17), "text-anchor": anchors[i] };
    shape(svg, "text", place, name);
  });
  shape(svg, "circle", { class: "dot", id: "dot", r: 8 });
  const follow = (event) => {
    if (!(event.buttons & 1)) return;
    const matrix = svg.getScreenCTM().inverse();
    const p = new DOMPoint(event.clientX, event.clientY).matrixTransform(matrix);
    const top = 1 - p.y / 173;
    const right = (p.x - 100 * top) / 200;
    const weights = [1 - top - right, top, right];
    steer(weights.map((w) => Math.max(0, w)));
  };
  svg.addEventListener("pointerdown", (event) => {
    svg.setPointerCapture(event.pointerId);
    follow(event);
  });
  svg.addEventListener("pointermove", follow);
}

function showTriangle() {
  const dot = $("dot");
  if (!dot) return;
  const at = (axis) =>
    state.weights.reduce((sum, w, i) => sum + w * CORNERS[i][axis], 0);
  dot.setAttribute("cx", at(0));
  dot.setAttribute("cy", at(1));
}

// ---- The front ----

// Points measured at the alpha that is nearest to the current one.
function pointsHere() {
  const points = state.front.points;
  if (state.alpha === null) return points;
  const distance = (p) => Math.abs(Math.log(p.alpha / state.alpha));
  const least = Math.min(...points.map(distance));
  return points.filter((p) => distance(p) - least < 1e-6);
}

// Rewards at the current weights: between two measured points where there are
// two objectives, else those of the nearest point.
function rewardsHere(points, names) {
  const weight = (p, name) => p.weights[name] ?? 0;
  const gap = (p) =>
    names.reduce((sum, n, i) => sum + (weight(p, n) - state.weights[i]) ** 2, 0);
  const sorted = [...points].sort((a, b) => gap(a) - gap(b));
  const nearest = sorted[0];
  const mean = (p, name) => p.rewards[name].mean;
  if (names.length === 2) {
    const w = state.weights[0];
    const side = Math.sign(w - weight(nearest, names[0]));
    const other = sorted.find(
      (p) => Math.sign(weight(p, names[0]) - weight(nearest, names[0])) === side,
    );
    if (side !== 0 && other) {
      const span = weight(other, names[0]) - weight(nearest, names[0]);
      const share = (w - weight(nearest, names[0])) / span;
      return (name) =>
        mean(nearest, name) + share * (mean(other, name) - mean(nearest, name));
    }
  }
  return (name) => mean(nearest, name);
}

function chosenAxes() {
  const names = state.front.objectives;
  if (names.length < 3) return [names[0], names[1] ?? names[0]];
  return [$("axis-x").value, $("axis-y").value];
}

function showFront() {
  const svg = $("front");
  if (!state.front) return;
  const [x, y] = chosenAxes();
  const points = pointsHere();
  const all = state.front.points;
  const scale = (name, from, to) => {
    const e = (p) => p.rewards[name];
    const low = Math.min(...all.map((p) => e(p).mean - e(p).stderr));
    const high = Math.max(...all.map((p) => e(p).mean + e(p).stderr));
    const pad = (high - low) * 0.06 || 0.05;
    const [a, b] = [low - pad, high + pad];
    const at = (value) => from + ((value - a) / (b - a)) * (to - from);
    const size = 10 ** Math.floor(Math.log10((b - a) / 2));
    const step = size * ((b - a) / size > 5 ? 2 : 1);
    const ticks = [];
    for (let t = Math.ceil(a / step) * step; t <= b; t += step) ticks.push(t);
    return { at, ticks, digits: Math.max(0, -Math.floor(Math.log10(step))) };
  };
  const [left, right, top, bottom] = [56, 466, 14, 250];
  const horizontal = scale(x, left, right);
  const vertical = scale(y, bottom, top);
  svg.replaceChildren();
  for (const t of horizontal.ticks) {
    const at = horizontal.at(t);
    shape(svg, "line", { class: "grid", x1: at, x2: at, y1: top, y2: bottom });
    const place = { x: at, y: bottom + 18, "text-anchor": "middle" };
    shape(svg, "text", place, t.toFixed(horizontal.digits));
  }
  for (const t of vertical.ticks) {
    const at = vertical.at(t);
    shape(svg, "line", { class: "grid", x1: left, x2: right, y1: at, y2: at });
    const place = { x: left - 8, y: at + 4, "text-anchor": "end" };
    shape(svg, "text", place, t.toFixed(vertical.digits));
  }
  const middle = { x: (left + right) / 2, y: 292, "text-anchor": "middle" };
  shape(svg, "text", middle, x);
  const turned = `translate(13 ${(top + bottom) / 2}) rotate(-90)`;
  shape(svg, "text", { transform: turned, "text-anchor": "middle" }, y);
  const where = (p) => [
    horizontal.at(p.rewards[x].mean),
    vertical.at(p.rewards[y].mean),
  ];
  const names = state.front.objectives;
  if (names.length === 2) {
    const first = (p) => p.weights[names[0]];
    const line = [...points].sort((a, b) => first(a) - first(b)).map(where);
    shape(svg, "polyline", { class: "line", points: line.join(" ") });
  }
  for (const p of points) {
    const [cx, cy] = where(p);
    const reach = (s, name) => [
      s.at(p.rewards[name].mean - p.rewards[name].stderr),
      s.at(p.rewards[name].mean + p.rewards[name].stderr),
    ];
    const [x1, x2] = reach(horizontal, x);
    const [y1, y2] = reach(vertical, y);
    shape(svg, "line", { class: "bar", x1, x2, y1: cy, y2: cy });
    shape(svg, "line", { class: "bar", x1: cx, x2: cx, y1, y2 });
    const dot = shape(svg, "circle", { class: "point", cx, cy, r: 5 });
    const weights = names.map((n) => p.weights[n]);
    const value = (e) => `${e.mean.toFixed(3)} ± ${e.stderr.toFixed(3)}`;
    const rewards = names.map((n) => {
      const raw = p.raw?.[n];  // of what training normalised
      return `${n} ${value(p.rewards[n])}${raw ? `, raw ${value(raw)}` : ""}`;
    });
    shape(dot, "title", {}, `weights: ${shown(weights)}\n${rewards.join("\n")}`);
    dot.addEventListener("click", () => steer(weights));
  }
  const here = rewardsHere(points, names);
  const ring = { cx: horizontal.at(here(x)), cy: vertical.at(here(y)), r: 10 };
  shape(svg, "circle", { class: "here", ...ring });
  const values = names.map((n) => `${n} ${here(n).toFixed(3)}`).join(", ");
  svg.setAttribute("aria-label", `The front; at this weighting: ${values}`);
  $("front-note").textContent =
    `Ring: this weighting (${values}). Means over ${state.front.prompts} ` +
    "held-out documents, with standard errors.";
}

function makeAxes() {
  const names = state.front.objectives;
  if (names.length < 3) return;
  $("axes").hidden = false;
  ["axis-x", "axis-y"].forEach((id, i) => {
    $(id).replaceChildren(...names.map((n) => element("option", {}, n)));
    $(id).value = names[i];
    $(id).addEventListener("change", showFront);
  });
}

// ---- Start ----

async function start() {
  const models = await call("v1/models");
  $("key-form").hidden = true;
  state.model = models.data[0];
  $("model").textContent = state.model.id;
  document.title = `Steer ${state.model.id}`;
  const text = readAddress();
  makeControls();
  const { data: examples, note } = await call("v1/documents");
  makeExamples(examples, note);
  $("document").value = text ?? examples[0]?.document ?? "";
  try {
    state.front = await call("v1/front");
    makeAxes();
  } catch (error) {
    if (error.status !== 404) throw error;
    $("front").remove();
    $("front-note").textContent = error.message;
  }
  showView();
  showWeighting();
  askSummary();
  askRow();
}

function makeExamples(examples, note) {
  const select = $("examples");
  if (!examples.length) return;
  $("examples-note").textContent = note && `The examples: ${note}`;
  $("examples-note").hidden = !note;
  const title = (text) => (text.length > 36 ? `${text.slice(0, 35)}…` : text);
  select.replaceChildren(
    element("option", { value: "" }, "Examples"),
    ...examples.map((e, i) => element("option", { value: i }, title(e.document))),
  );
  select.hidden = false;
  select.addEventListener("change", () => {
    if (select.value === "") return;
    $("document").value = examples[select.value].document;
    select.value = "";
    askSummary();
    askRow();
  });
}

$("document").addEventListener("input", () => {
  later("summary", askSummary, 2 * PAUSE);
  later("row", askRow, 3 * PAUSE);
});
$("view").addEventListener("click", () => {
  state.chatting = !state.chatting;
  showView();
  askSummary();
  askRow();
});
$("message-form").addEventListener("submit", (event) => {
  event.preventDefault();
  if ($("send").disabled) return;
  const content = $("message").value.trim();
  if (!content) return;
  // In place of one that was not answered.
  if (state.turns.at(-1)?.role === "user") state.turns.pop();
  state.turns.push({ role: "user", content });
  $("message").value = "";
  askTurn();
});
$("message").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("message-form").requestSubmit();
});
$("forget").addEventListener("click", () => {
  asked.summary?.abort();
  state.turns = [];
  showTurns();
  report(null);
  $("send").disabled = false;
  $("message").focus();
});
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("key", $("key").value.trim());
  start().catch(report);
});
$("share").addEventListener("click", async () => {
  saveAddress();
  try {
    await navigator.clipboard.writeText(location.href);
    $("share").textContent = "Copied";
  } catch {
    $("share").textContent = "The address bar has it";
  }
  setTimeout(() => ($("share").textContent = "Copy link"), 2000);
});
window.addEventListener("hashchange", () => {
  if (!state.model) return;
  const text = readAddress();
  if (text !== null) $("document").value = text;
  showView();
  showWeighting();
  askSummary();
  askRow();
});
start().catch(report);
