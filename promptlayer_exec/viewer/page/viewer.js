// @ts-check
// The page of `promptlayer-exec view`: which view it shows, and what reaches it.

import * as api from "./library/api.js";
import { notifyOfEnd, showIcon } from "./parts/alerts.js";
import { boardView } from "./views/board.js";
import { announce, byId, find, findAll, hideTold, notify, show, write } from "./library/dom.js";
import { listenToKeys } from "./parts/keys.js";
import { checkKey } from "./library/key.js";
import { changePlace, returnTo } from "./library/places.js";
import { board, connection, connectionChanged, groupOf, Run, runOf, runs, serverProblem, STATES } from "./library/model.js";
import { route } from "./library/router.js";
import { follow } from "./library/stream.js";
import { leads, shareStream } from "./library/tabs.js";
import { clock, sinceText, unbroken } from "./library/times.js";
import { usualMayChange, whenUsualIsKnown } from "./library/usual.js";

const TICK = 200; // milliseconds, of runs in their first seconds
const CALM = 5; // ticks between those of all other runs, whose times are whole seconds
const CONNECTIONS = {
  connecting: "Connecting",
  live: "Connected",
  reconnecting: "Connection lost, reconnecting",
  ended: "The viewer has stopped. Waiting for it to start again",
  refused: "Refused",
};
// The board comes first. The others have most of the code, which is loaded after its lines are there.
const VIEWS = {
  executions: async () => (await import("./views/run.js")).runView,
  history: async () => (await import("./views/history.js")).historyView,
  batches: async () => (await import("./views/batches.js")).batchesView,
  item: async () => (await import("./views/item.js")).itemView,
  start: async () => (await import("./views/start.js")).startView,
  compare: async () => (await import("./views/compare.js")).compareView,
  cause: async () => (await import("./views/cause.js")).causeView,
};

let view = null; // until it is loaded
let wanted = 0; // views, of which the page shows the last
let hasAllViews = false;
let isConnected = false;
let lastBoard = null; // the last event of that kind
let checked = null; // the instance of the viewer whose key this tab has tried

// Views

async function showView() {
  const { parts, params } = route();
  const place = changePlace();
  const name = parts[0] === "executions" && !parts[1] ? "board" : parts[0];
  const number = (wanted += 1);
  const next = Object.hasOwn(VIEWS, name) ? await load(name) : boardView;
  if (next === null || number !== wanted) return;

  if (view !== null && view !== next) {
    view.hide?.();
    view.element.hidden = true;
  }
  const isOther = view !== next;
  const isFirst = view === null;
  view = next;
  next.element.hidden = false;
  if (isOther && !isFirst) scrollTo(0, 0); // before the view scrolls to what it shows
  const shown = next.show(parts, params);
  for (const link of findAll(".views a")) {
    const here = next === boardView ? "board" : name === "item" ? "batches" : name;
    if (link.dataset.view === here) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  if (isOther && !isFirst) next.element.querySelector("h2")?.focus({ preventScroll: true });
  showTitle();
  if (place === null) return;
  await shown; // some views request their lines first
  if (view === next) returnTo(place, next.element);
}

async function load(name) {
  try {
    return await VIEWS[name]();
  } catch {
    notify("The viewer did not respond. Reload this page once it runs again.");
    return null;
  }
}

function loadAllViews() {
  if (hasAllViews) return;
  hasAllViews = true;
  for (const name of Object.keys(VIEWS)) VIEWS[name]().catch(() => (hasAllViews = false));
}

function showTitle() {
  const run = view?.run?.() ?? null;
  const shown = run === null ? [...runs.values()].filter((one) => one.isListed) : [run];
  const title = `${run === null ? countsOf(shown) : ""}${view?.title() ?? "Executions"}`;
  if (document.title !== title) document.title = title;
  showIcon(shown);
}

// The title of a tab in the background, failures first.
function countsOf(shown) {
  const count = (state) => shown.filter((run) => groupOf(run.data.state) === state).length;
  const [failed, running] = [count("failed"), count("running")];
  const parts = [failed > 0 ? `${failed} failed` : null, running > 0 ? `${running} running` : null];
  const text = parts.filter((one) => one !== null).join(", ");
  return text === "" ? "" : `${text} · `;
}

// Events

function showConnection(state) {
  const problem = state === "live" ? serverProblem() : null;
  byId("connection").dataset.state = problem === null ? state : "troubled";
  byId("connection").title = problem === null ? "" : `Since ${sinceText(problem.since)}`;
  const text = problem?.words ?? CONNECTIONS[state];
  showOutage(problem);
  if (write(byId("connection-text"), text) && isConnected) announce(text);
  isConnected ||= state === "live";
}

// One banner for all runs: what is wrong, since when, the next attempt, and what to do.
function showOutage(problem) {
  if (problem === null) return show(byId("outage"), null);
  const { text, since, until, advice } = problem;
  const next = until === null ? "" : ` The next attempt is at ${clock(until)}.`;
  show(byId("outage"), unbroken(`${text} Since ${sinceText(since)}.${next} ${advice}`.trim()));
}

// The viewer itself is gone. A short loss of the connection concerns nobody.
function showGone() {
  const { state, lostAt } = connection;
  const silent = (performance.now() - lostAt) / 1000;
  const isGone = lostAt > 0 && (state === "ended" || (state === "reconnecting" && silent > 2));
  if (isGone === !byId("gone").hidden) return;
  const since = clock(Date.now() / 1000 - silent);
  const what = `The viewer has not responded since ${since}: this page shows what was known then.`;
  const next = "Runs continue on PromptLayer. Start promptlayer-exec view again: the page then reconnects by itself.";
  show(byId("gone"), isGone ? `${what} ${next}` : null);
}

const on = {
  connection(state) {
    connectionChanged(state);
    showConnection(state);
  },

  refused(reason) {
    showRefusal(reason);
  },

  board(data) {
    lastBoard = data;
    const isRestarted = board.instance !== null && board.instance !== data.instance;
    const known = [...data.executions, ...data.aside];
    const missing = [...runs.values()].filter(({ id }) => !known.includes(id));
    Object.assign(board, {
      isKnown: true,
      instance: data.instance,
      note: data.note,
      server: data.server,
      hasHistory: data.has_history,
    });
    if (isRestarted) {
      runs.clear();
      board.refusal = null;
    }
    if (known.length === 0) checkKeyOnce();
    for (const { id } of missing) runs.delete(id);
    const ordered = known.map((id) => [id, runs.get(id) ?? new Run(id)]);
    runs.clear();
    for (const [id, run] of ordered) {
      runs.set(id, run);
      run.isListed = data.executions.includes(id);
      board.returning.delete(id);
    }
    write(byId("note"), data.note);
    byId("note").hidden = data.note === "";
    byId("to-history").hidden = !data.has_history;
    byId("to-batches").hidden = !data.has_batches;
    if (isRestarted) missing.forEach(({ id }) => board.returning.add(id));
    view?.onBoard?.();
    if (isRestarted && leads()) addAgain(missing);
    showTitle();
    requestAnimationFrame(() => setTimeout(loadAllViews)); // once the lines are there
  },

  nodes(data) {
    const run = runOf(data.execution_id);
    run.takeNodes(data);
    view?.onNodes?.(run, data.all ? null : data.nodes.map((node) => node.name));
  },

  execution(data) {
    const run = runOf(data.execution_id);
    const before = run.take(data, data.age);
    view?.onExecution?.(run, before);
    showTitle();
    const isNew = ["waiting", "running"].includes(before.state) && before.total > 0;
    if (run.isEnded && before.state !== data.state) {
      usualMayChange(run);
      if (data.workflow !== null) hideTold(data.workflow);
    }
    if (run.isEnded && isNew) {
      announce(`${run.name}, execution ${run.id}: ${STATES[data.state][0]}.`);
      notifyOfEnd(run);
    }
  },
};

// Without an execution, nothing would show that PromptLayer refuses the key. So it is tried, once.
function checkKeyOnce() {
  if (checked === board.instance) return;
  checked = board.instance;
  checkKey();
}

// A refused key may work again, for example if somebody has corrected its rights. Then the banner
// goes, and the viewer follows what it had given up because of the key.
async function checkRefusedKey() {
  if (serverProblem()?.kind !== "refused") return;
  const { kind } = await api.get("api/key").catch(() => ({ kind: "refused" }));
  if (kind === "refused") return;

  board.refusal = null;
  if (!leads()) return;
  const refused = [...runs.values()].filter(({ data }) => data.state === "lost" && data.problem?.kind === "refused");
  for (const { id } of refused) await api.call("POST", "api/executions", { execution_id: id }).catch(() => null);
}

// What a new tab needs.
function replay() {
  if (lastBoard === null) return [];
  const events = [["connection", connection.state], ["board", lastBoard]];
  for (const run of runs.values()) {
    const nodes = [...run.nodes.values()];
    if (nodes.length > 0) events.push(["nodes", { execution_id: run.id, all: true, nodes }]);
    const age = (performance.now() - run.at) / 1000;
    if (run.data.total > 0 || run.isEnded) events.push(["execution", { ...run.data, age }]);
  }
  return events;
}

// A restarted viewer does not have the executions that were on the page before.
async function addAgain(missing) {
  for (const { id, isListed } of missing.reverse()) {
    try {
      await api.call("POST", "api/executions", { execution_id: id, is_listed: isListed });
    } catch (error) {
      notify(`Could not follow execution ${id} again. ${error.message}`);
      board.returning.delete(id);
    }
  }
  view?.onBoard?.();
}

function showRefusal(reason) {
  showConnection("refused");
  byId("viewer").hidden = true;
  byId("refused").hidden = false;
  write(byId("refused-reason"), reason);
  byId("refused-title").focus();
}

byId("dismiss").addEventListener("click", () => {
  byId("notice").hidden = true;
  view?.element.querySelector("input, h2")?.focus();
});

// This tab keeps the token, and the address stays as it is.
byId("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = byId("token").value.trim();
  if (text === "") return;
  api.keepToken(/#token=([^&\s]+)/.exec(text)?.[1] ?? text);
  location.reload();
});

let ticked = 0;
setInterval(() => {
  ticked += 1;
  const isWhole = ticked % CALM === 0;
  view?.tick?.(isWhole);
  if (!isWhole) return;
  showGone();
  if (connection.state === "live") showConnection("live");
}, TICK);
setInterval(() => {
  view?.refresh?.();
  checkRefusedKey();
}, 15_000);

// Menus close as they do elsewhere.
function closeMenus(isMeant) {
  for (const menu of findAll(".menu[open]")) if (isMeant(menu)) menu.open = false;
}
addEventListener("click", ({ target }) => closeMenus((menu) => !menu.contains(target)));
addEventListener("click", () => hideTold());
addEventListener("keydown", ({ key }) => {
  if (key !== "Escape" || find("dialog[open]") !== null) return;
  const focused = find(".menu[open]:focus-within > summary");
  closeMenus(() => true);
  focused?.focus();
});

// What is sticky stays below the bar, however high that is.
const bar = find(".bar");
new ResizeObserver(() => {
  const height = getComputedStyle(bar).position === "sticky" ? bar.offsetHeight : 0;
  document.documentElement.style.setProperty("--bar", `${height}px`);
}).observe(bar);

// A URL that differs only in its fragment does not reload the page.
addEventListener("hashchange", () => {
  if (api.takeToken()) location.reload();
  else if (wanted > 0) showView();
});
listenToKeys(() => view);
whenUsualIsKnown(() => view?.refresh?.());
api.whenRefused(showRefusal);
if (await api.findToken()) {
  await showView();
  shareStream(follow, on, replay);
} else {
  showRefusal("The address of this page has no token.");
}
