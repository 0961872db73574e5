// The page of `promptlayer-exec view`. It receives the events of all executions on one connection.
// Everything that it receives is text, and is set as text.

const RETRY = 1000; // milliseconds until the next attempt to connect
const SILENCE = 45_000; // milliseconds without data, not even heartbeats, until it reconnects
const STALE = 15; // seconds without an answer from PromptLayer after which a card says so
const TICK = 200;

const KNOWN = ["queued", "running", "success", "failed", "skipped"];
const STATES = {
  waiting: ["Waiting for the first answer", "queued"],
  running: ["Running", "running"],
  succeeded: ["Succeeded", "success"],
  failed: ["Failed", "failed"],
  lost: ["No longer followed", "unknown"],
};
const CONNECTIONS = {
  connecting: "Connecting",
  live: "Live",
  reconnecting: "Connection lost, reconnecting",
  ended: "The viewer has stopped; waiting for it to start again",
  refused: "Refused",
};

const byId = (id) => document.getElementById(id);
const part = (root, name) => root.querySelector(`[data-part="${name}"]`);
const cards = new Map(); // by execution id; their order is that of the document

// The token: read from the fragment, which is sent to no server, and removed from the address bar.

let token = sessionStorage.getItem("token");

function takeToken() {
  const given = new URLSearchParams(location.hash.slice(1)).get("token");
  if (given === null) return false;
  token = given;
  sessionStorage.setItem("token", token);
  history.replaceState(null, "", location.pathname);
  return true;
}

function showRefusal(reason) {
  showConnection("refused");
  byId("viewer").hidden = true;
  byId("refused").hidden = false;
  write(byId("refused-reason"), reason);
  byId("refused-title").focus();
}

// Requests

class Refusal extends Error {
  constructor(message, field) {
    super(message);
    this.field = field;
  }
}

function request(path, options = {}) {
  const headers = { Authorization: `Bearer ${token}`, ...options.headers };
  return fetch(path, { cache: "no-store", ...options, headers });
}

async function call(method, path, content, hint = "Is it still running?") {
  const options = { method };
  if (content !== undefined) {
    options.body = JSON.stringify(content);
    options.headers = { "Content-Type": "application/json" };
  }
  let response;
  try {
    response = await request(path, options);
  } catch {
    throw new Refusal(`The viewer did not answer. ${hint}`);
  }
  if (response.ok) return response;
  const { message, field } = await response.json().catch(() => ({}));
  if (response.status === 401) showRefusal(message);
  throw new Refusal(message ?? `The viewer answered ${response.status}.`, field);
}

// The connection

let connection = "connecting";
let lostAt = 0; // when the times on the page stopped being current
let instance = null;

function showConnection(state) {
  if (connection === "live" && state !== "live") lostAt = performance.now();
  connection = state;
  byId("connection").dataset.state = state;
  if (write(byId("connection-text"), CONNECTIONS[state]) && state !== "connecting") {
    announce(CONNECTIONS[state]);
  }
}

async function follow() {
  while (true) {
    const abort = new AbortController();
    try {
      const response = await request("api/events", { signal: abort.signal });
      if (response.status === 401) {
        return showRefusal(
          "The viewer was restarted and has a new token, or this token is incomplete.",
        );
      }
      if (!response.ok) throw new Error(`${response.status}`);
      for await (const [kind, data] of events(response, abort)) on[kind]?.(data);
    } catch (error) {
      if (!(error instanceof TypeError) && error.name !== "AbortError") console.warn(error);
    }
    abort.abort();
    if (connection !== "ended") showConnection("reconnecting");
    await new Promise((resolve) => setTimeout(resolve, RETRY));
  }
}

async function* events(response, abort) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  while (true) {
    const watchdog = setTimeout(() => abort.abort(), SILENCE);
    const { value, done } = await reader.read().finally(() => clearTimeout(watchdog));
    if (done) return;
    const blocks = (text + value).split("\n\n");
    text = blocks.pop();
    for (const block of blocks) {
      const found = /^event: (.*)\ndata: (.*)$/.exec(block);
      if (found) yield [found[1], JSON.parse(found[2])];
    }
  }
}

const on = {
  board(data) {
    showConnection("live");
    const isRestarted = instance !== null && instance !== data.instance;
    instance = data.instance;
    const shown = [...byId("cards").children].map((one) => one.dataset.id);
    const missing = shown.filter((id) => !data.executions.includes(id));
    for (const id of missing) drop(id);
    data.executions.forEach((id, index) => moveTo(index, cardOf(id).root));
    write(byId("note"), data.note);
    byId("note").hidden = data.note === "";
    applyFilter();
    if (isRestarted) addAgain(missing);
  },
  nodes(data) {
    const card = cardOf(data.execution_id);
    if (data.all) {
      const names = new Set(data.nodes.map((node) => node.name));
      for (const [name, row] of card.rows) {
        if (!names.has(name)) {
          row.root.remove();
          card.rows.delete(name);
        }
      }
    }
    for (const node of data.nodes) showNode(card, node);
    applyFilter();
  },
  execution(data) {
    showExecution(cardOf(data.execution_id), data);
    applyFilter();
  },
  end() {
    showConnection("ended");
  },
};

// A viewer that was restarted does not know the executions that were on the page before.
async function addAgain(ids) {
  for (const id of ids.reverse()) {
    try {
      await call("POST", "api/executions", { execution_id: id });
    } catch (error) {
      notify(`Execution ${id} could not be followed again. ${error.message}`);
    }
  }
}

// Cards

function cardOf(id) {
  const known = cards.get(id);
  if (known) return known;
  const root = byId("card-template").content.cloneNode(true).firstElementChild;
  const card = { id, root, rows: new Map(), data: null, at: 0 };
  root.dataset.id = id;
  root.dataset.state = "waiting";
  const title = part(root, "title");
  title.id = `title-${id}`;
  root.setAttribute("aria-labelledby", title.id);
  part(root, "remove").setAttribute("aria-label", `Remove execution ${id} from this page`);
  part(root, "progress").setAttribute("aria-label", `Final nodes of execution ${id}`);
  part(root, "nodes").setAttribute("aria-label", `Nodes of execution ${id}`);
  part(root, "remove").addEventListener("click", () => remove(card));
  part(root, "again").addEventListener("click", () => followAgain(card));
  cards.set(id, card);
  const first = { workflow: null, warning: null, state: "waiting", error: null };
  showExecution(card, { ...first, elapsed: 0, final: 0, total: 0 });
  return card;
}

function moveTo(index, root) {
  const list = byId("cards");
  if (list.children[index] !== root) list.insertBefore(root, list.children[index] ?? null);
}

function drop(id) {
  const card = cards.get(id);
  cards.delete(id);
  if (!card) return;
  const next = card.root.nextElementSibling ?? card.root.previousElementSibling;
  const hadFocus = card.root.contains(document.activeElement);
  card.root.remove();
  if (hadFocus) (next ? part(next, "title") : byId("execution-id")).focus();
}

async function remove(card) {
  try {
    await call("DELETE", `api/executions/${card.id}`);
    announce(`Execution ${card.id} was removed from this page; it continues at PromptLayer.`);
  } catch (error) {
    notify(error.message);
  }
}

async function followAgain(card) {
  const button = part(card.root, "again");
  button.disabled = true;
  try {
    await call("POST", "api/executions", { execution_id: card.id });
    part(card.root, "title").focus();
  } catch (error) {
    notify(error.message);
  }
  button.disabled = false;
}

function nameOf(data, id) {
  return data.workflow === null ? `Execution ${id}` : data.workflow;
}

function showExecution(card, data) {
  const { root, id } = card;
  const before = card.data;
  card.data = data;
  card.at = performance.now();
  const [state, icon] = STATES[data.state];
  root.dataset.state = data.state;
  write(part(root, "title"), nameOf(data, id));
  write(part(root, "subtitle"), data.workflow === null ? "" : `Execution ${id}`);
  write(part(root, "state"), state);
  draw(part(root, "icon"), icon);
  const progress = part(root, "progress");
  progress.max = Math.max(data.total, 1);
  progress.value = data.final;
  write(part(root, "count"), `${data.final} of ${data.total} nodes`);
  const warning = data.warning === null ? null : `Warning from PromptLayer: ${data.warning}`;
  show(part(root, "warning"), warning);
  part(root, "again").hidden = data.state !== "lost";
  part(root, "columns").hidden = data.total === 0;
  showProblem(card);
  tick(card);
  const ended = ["succeeded", "failed", "lost"].includes(data.state);
  if (ended && before && ["waiting", "running"].includes(before.state) && before.total > 0) {
    announce(`${nameOf(data, id)}, execution ${id}: ${state}.`);
  }
}

// The error of an execution, or that PromptLayer does not answer, as then the times may be old.
function showProblem(card) {
  const silent = (performance.now() - card.at) / 1000;
  const isStale = connection === "live" && card.data.state === "running" && silent > STALE;
  const stale = `PromptLayer has not answered for ${duration(Math.floor(silent))}.`;
  show(part(card.root, "problem"), card.data.error ?? (isStale ? stale : null));
}

// Nodes

function rowOf(card, name) {
  const known = card.rows.get(name);
  if (known) return known;
  const root = byId("node-template").content.cloneNode(true).firstElementChild;
  const row = { root, node: null };
  part(root, "copy").addEventListener("click", () => copy(card, row));
  part(root, "show-all").addEventListener("click", () => showAll(card, row));
  part(root, "copy").setAttribute("aria-label", `Copy the value of ${name}`);
  part(root, "value").setAttribute("aria-label", `Value of ${name}`);
  part(root, "trace").setAttribute("aria-label", `Error details of ${name}`);
  card.rows.set(name, row);
  return row;
}

function showNode(card, node) {
  const row = rowOf(card, node.name);
  row.node = node;
  const { root } = row;
  const list = part(card.root, "nodes");
  if (list.children[node.index] !== root) {
    list.insertBefore(root, list.children[node.index] ?? null);
  }
  const status = node.status.toLowerCase();
  const isKnown = KNOWN.includes(status);
  root.dataset.status = isKnown ? status : "unknown";
  draw(part(root, "icon"), isKnown ? status : "unknown");
  write(part(root, "status"), isKnown ? capitalised(status) : node.status);
  write(part(root, "name"), node.name);
  part(root, "output").hidden = !node.is_output_node;
  write(part(root, "preview"), node.error_message ?? oneLine(node.value ?? ""));
  write(part(root, "error"), node.error_message ?? "");
  show(part(root, "trace"), node.raw_error_message);
  part(root, "failure").hidden = node.error_message === null && node.raw_error_message === null;
  show(part(root, "value"), node.value);
  part(root, "result").hidden = node.value === null;
  const button = part(root, "show-all");
  button.hidden = node.length <= (node.value ?? "").length;
  write(button, `Show all ${node.length.toLocaleString("en")} characters`);
  write(part(root, "times"), timesOf(node));
  tickNode(row, now(card));
}

function timesOf(node) {
  if (node.running === null && node.final === null) return "Not seen running yet.";
  if (node.running === null) return `First seen at ${duration(node.final)}, already final.`;
  const started = `First seen running at ${duration(node.running)}`;
  return node.final === null ? `${started}.` : `${started}, and final at ${duration(node.final)}.`;
}

async function fullText(card, row) {
  const { node } = row;
  if (node.length <= node.value.length) return node.value;
  const response = await call("GET", `api/executions/${card.id}/nodes/${node.index}`);
  return response.text();
}

async function copy(card, row) {
  const result = part(row.root, "copied");
  write(result, "");
  try {
    await navigator.clipboard.writeText(await fullText(card, row));
    write(result, "Copied");
  } catch (error) {
    if (error instanceof Refusal) return write(result, error.message);
    getSelection().selectAllChildren(part(row.root, "value"));
    write(result, "The browser does not allow copying. The text is selected: copy it yourself.");
  }
}

async function showAll(card, row) {
  const { node } = row;
  try {
    const text = await fullText(card, row);
    if (row.node !== node) return; // it has changed in the meantime
    write(part(row.root, "value"), text);
    part(row.root, "show-all").hidden = true;
    part(row.root, "value").focus();
  } catch (error) {
    write(part(row.root, "copied"), error.message);
  }
}

// Times: those that the server sent, plus the seconds since then while it is connected.

function now(card) {
  const { state, elapsed } = card.data;
  if (state !== "running") return elapsed;
  const until = connection === "live" ? performance.now() : lostAt;
  return elapsed + Math.max(0, until - card.at) / 1000;
}

function tick(card) {
  const time = now(card);
  write(part(card.root, "elapsed"), card.data.total === 0 ? "" : duration(time));
  write(part(card.root, "axis"), duration(time));
  for (const row of card.rows.values()) tickNode(row, time);
}

function tickNode(row, time) {
  const { node, root } = row;
  const stretch = part(root, "stretch");
  const end = node.final ?? (node.is_final || node.running === null ? null : time);
  const start = node.running ?? end;
  const hasRun = node.status !== "SKIPPED" && start !== null && end !== null;
  stretch.hidden = !hasRun;
  const isTimed = hasRun && node.running !== null;
  write(part(root, "time"), isTimed ? duration(Math.max(0, end - start)) : "");
  if (!hasRun) return;
  const scale = Math.max(time, 0.001);
  stretch.style.setProperty("--from", Math.min(1, start / scale).toFixed(4));
  stretch.style.setProperty("--to", Math.min(1, end / scale).toFixed(4));
}

setInterval(() => {
  if (connection !== "live") return;
  for (const card of cards.values()) {
    if (card.data.state !== "running") continue;
    tick(card);
    showProblem(card);
  }
}, TICK);

function duration(seconds) {
  if (seconds < 59.95) return `${seconds.toFixed(1)} s`;
  const whole = Math.round(seconds);
  const minutes = Math.floor(whole / 60);
  const pad = (value) => String(value).padStart(2, "0");
  if (minutes < 60) return `${minutes} min ${pad(whole % 60)} s`;
  return `${Math.floor(minutes / 60)} h ${pad(minutes % 60)} min`;
}

// The filter

function groupOf(state) {
  return { waiting: "running", lost: "failed" }[state] ?? state;
}

function applyFilter() {
  const text = byId("filter").value.trim().toLowerCase();
  const state = document.querySelector("input[name=state]:checked").value;
  const counts = { all: 0, running: 0, succeeded: 0, failed: 0 };
  let shown = 0;
  for (const card of cards.values()) {
    const group = groupOf(card.data.state);
    const matches = showMatching(card, text);
    if (matches) {
      counts.all += 1;
      counts[group] += 1;
    }
    card.root.hidden = !matches || (state !== "all" && state !== group);
    shown += card.root.hidden ? 0 : 1;
  }
  for (const [name, count] of Object.entries(counts)) {
    write(document.querySelector(`[data-count=${name}]`), String(count));
  }
  byId("states").hidden = cards.size === 0;
  const none = "There is no execution on this page yet.\nAdd one by its id, or start a run.";
  const nothing = cards.size === 0 ? none : "No execution matches the filter.";
  write(byId("empty"), shown > 0 || connection === "connecting" ? "" : nothing);
  document.title = counts.running > 0 ? `(${counts.running}) Executions` : "Executions";
}

// Either the whole card matches, or it shows only the nodes that match.
function showMatching(card, text) {
  const { data, id } = card;
  const about = [nameOf(data, id), id, STATES[data.state][0]];
  const isWhole = about.some((one) => one.toLowerCase().includes(text));
  let some = isWhole;
  for (const { root, node } of card.rows.values()) {
    const found = isWhole || [node.name, node.status].some((one) => one.toLowerCase().includes(text));
    root.hidden = !found;
    some ||= found;
  }
  return some;
}

byId("filter-form").addEventListener("submit", (event) => event.preventDefault());
byId("filter").addEventListener("input", applyFilter);
byId("states").addEventListener("change", applyFilter);

// Forms

function showErrors(form, error) {
  for (const input of form.querySelectorAll("input, textarea")) {
    const isWrong = error?.field === input.name;
    write(byId(`${input.id}-error`), isWrong ? error.message : "");
    if (isWrong) input.setAttribute("aria-invalid", "true");
    else input.removeAttribute("aria-invalid");
    if (isWrong) input.focus();
  }
}

function handle(form, send) {
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const button = form.querySelector("button");
    if (button.disabled) return;
    const label = button.textContent;
    showErrors(form, null);
    button.disabled = true;
    button.textContent = `${label} …`;
    try {
      await send();
    } finally {
      button.disabled = false;
      button.textContent = label;
    }
  });
}

handle(byId("add-form"), async () => {
  const input = byId("execution-id");
  try {
    const response = await call("POST", "api/executions", { execution_id: input.value });
    input.value = "";
    announce(`Execution ${(await response.json()).execution_id} was added to this page.`);
  } catch (error) {
    showErrors(byId("add-form"), { message: error.message, field: "execution_id" });
  }
});

handle(byId("start-form"), async () => {
  const form = byId("start-form");
  const content = { workflow: byId("workflow").value, inputs: byId("inputs").value };
  const hint = "The run may have started: look in PromptLayer before you start it again.";
  write(byId("start-error"), "");
  try {
    const response = await call("POST", "api/runs", content, hint);
    announce(`Execution ${(await response.json()).execution_id} started.`);
  } catch (error) {
    showErrors(form, error);
    if (!error.field) write(byId("start-error"), error.message);
  }
});

// Writing

function write(element, text) {
  if (element.textContent === text) return false;
  element.textContent = text;
  return true;
}

function show(element, text) {
  element.hidden = text === null;
  write(element, text ?? "");
}

function draw(use, icon) {
  const href = `#icon-${icon}`;
  if (use.getAttribute("href") !== href) use.setAttribute("href", href);
}

function announce(text) {
  byId("announcer").textContent = text;
}

function notify(text) {
  byId("notice").hidden = false;
  byId("notice-text").textContent = text;
}

byId("dismiss").addEventListener("click", () => {
  byId("notice").hidden = true;
  byId("execution-id").focus();
});

function oneLine(text) {
  return text.slice(0, 300).replace(/\s+/g, " ");
}

function capitalised(word) {
  return word[0].toUpperCase() + word.slice(1);
}

// A URL that differs only in its fragment does not reload the page.
addEventListener("hashchange", () => {
  if (takeToken()) location.reload();
});
takeToken();
if (token === null) showRefusal("The URL of this page has no token.");
else follow();
