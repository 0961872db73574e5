// @ts-check
// The view of the history: every execution that somebody watched or started here.

import { call, get } from "../library/api.js";
import { announce, byId, clone, confirmIn, draw, find, findAll, make, oneLine, part, show, timeOf, write, writeTime } from "../library/dom.js";
import { groupOf, runs, STATES } from "../library/model.js";
import { trendOf } from "../parts/plot.js";
import { addressOf, causeAddress, comparisonOf, go, replace } from "../library/router.js";
import { ago, clock, duration } from "../library/times.js";

const PAUSE = 150; // milliseconds without typing until it searches
const FIRST_PAGE = 100;
const MOST_CAUSES = 5;

const picked = new Map(); // by execution id: the entry
let entries = [];
let matching = 0;
let asked = 0;
let typing = 0;

export const historyView = {
  element: byId("view-history"),

  show(_, params) {
    byId("history-search").value = params.get("search") ?? "";
    byId("history-days").value = params.get("days") ?? "";
    const outcome = params.get("outcome") ?? "";
    const choice = find(`input[name=outcome][value="${CSS.escape(outcome)}"]`);
    (choice ?? find("input[name=outcome]")).checked = true;
    chooseWorkflow(params.get("workflow") ?? "");
    loadTrends();
    return load();
  },

  // A search that is still to come would write its filters into the address of the next view.
  hide() {
    clearTimeout(typing);
  },

  // An execution on the board is new, or has finished.
  onExecution(run, before) {
    if (run.data.state === before.state) return;
    const row = find(`.entry[data-id="${CSS.escape(run.id)}"]`);
    const entry = entries.find((one) => one.execution_id === run.id);
    if (row && entry) showState(row, entry);
    if (before.state === "waiting" || run.isEnded) loadAgain();
  },

  refresh() {
    for (const entry of entries) {
      const row = find(`.entry[data-key="${entry.key}"]`);
      if (row !== null) showMoment(part(row, "began"), entry);
    }
  },

  title: () => "History · Executions",

  keys: {
    items: () => findAll(".entry .name > a"),
    isWanted: (item) => item.closest(".entry").dataset.state === "failed",
  },
};

function filters() {
  const params = new URLSearchParams();
  const set = (name, value) => value && params.set(name, value);
  set("search", byId("history-search").value.trim());
  set("outcome", find("input[name=outcome]:checked").value);
  set("workflow", byId("history-workflow").value);
  set("days", byId("history-days").value);
  return params;
}

// Unless somebody is using the list.
function loadAgain() {
  const isUsed = byId("entries").contains(document.activeElement) || picked.size > 0;
  if (isUsed || entries.length > FIRST_PAGE) return;
  clearTimeout(typing);
  typing = setTimeout(() => {
    load();
    loadTrends();
  }, PAUSE);
}

async function load(isMore = false) {
  const number = (asked += 1);
  const params = filters();
  replace(["history"], params);
  if (isMore) params.set("offset", String(entries.length));
  let found;
  try {
    found = await get(`api/history?${params}`);
  } catch (error) {
    const off = "There is no history: the viewer runs with --no-history.";
    return show(byId("history-problem"), error.status === 404 ? off : error.message);
  }
  if (number !== asked) return; // the filters have changed in the meantime
  show(byId("history-problem"), null);
  const first = entries.length;
  entries = isMore ? [...entries, ...found.entries] : found.entries;
  matching = found.matching;
  const rows = found.entries.map(rowOf);
  if (isMore) byId("entries").append(...rows);
  else byId("entries").replaceChildren(...rows);
  if (isMore) part(byId("entries").children[first], "title").focus();
  showCounts(found.counts);
}

function showCounts(counts) {
  const all = Object.values(counts).reduce((sum, one) => sum + one, 0);
  for (const [name, count] of Object.entries({ all, ...counts })) {
    write(find(`#outcomes [data-outcome=${name}]`), count.toLocaleString("en"));
  }
  const isFiltered = filters().size > 0;
  const nothing = isFiltered
    ? "No remembered execution matches."
    : "The history is empty.\nExecutions that you follow or start here appear in this list.";
  write(byId("history-empty"), entries.length === 0 ? nothing : "");
  const rest = matching - entries.length;
  byId("history-more").hidden = rest <= 0;
  write(byId("history-more"), `Show more (${rest.toLocaleString("en")} left)`);
  byId("forget-all").disabled = all === 0 && !isFiltered;
}

function rowOf(entry) {
  const root = clone("entry-template").firstElementChild;
  /** @type {(name: Part) => any} */
  const at = (name) => part(root, name);
  const id = entry.execution_id;
  root.dataset.key = entry.key;
  if (id !== null) root.dataset.id = id;
  const name = entry.workflow ?? `Execution ${id}`;
  write(at("title"), name);
  if (id !== null) at("title").href = addressOf(["executions", id]);
  const about = [id === null || entry.workflow === null ? null : id];
  if (entry.version !== null) about.push(`version ${entry.version}`);
  if (entry.label !== null) about.push(entry.label);
  write(at("subtitle"), about.filter((one) => one !== null).join(" · "));
  const problem = runs.get(id)?.data.state === "running" ? null : entry.problem; // which is over
  write(at("preview"), oneLine(problem ?? entry.inputs ?? ""));
  write(at("line-inputs"), problem === null ? "" : oneLine(entry.inputs ?? ""));
  at("preview").classList.toggle("wrong", problem !== null);
  showMoment(at("began"), entry);
  write(at("duration"), lengthOf(entry));
  showState(root, entry);
  const label = id === null ? `${name}, unknown start` : `${name}, execution ${id}`;
  at("rerun").setAttribute("aria-label", `Run again: ${label}`);
  at("forget").setAttribute("aria-label", `Delete: ${label}`);
  at("menu").setAttribute("aria-label", `More: ${label}`);
  at("rerun").hidden = entry.workflow === null;
  at("rerun").addEventListener("click", () => go(addressOf(["start"], startOf(entry))));
  at("forget").addEventListener("click", () => forget(entry, root));
  const box = at("pick");
  box.setAttribute("aria-label", `Select for comparison: ${label}`);
  box.disabled = id === null;
  box.checked = picked.has(id);
  box.addEventListener("change", () => pick(entry, box));
  return root;
}

function startOf({ key, workflow, label, version, metadata }) {
  const number = version === null ? null : String(version);
  return { line: String(key), workflow, label, version: number, metadata };
}

// The board has newer facts than the history.
function showState(root, entry) {
  const live = runs.get(entry.execution_id);
  const isLive = live !== undefined && live.data.state !== "waiting";
  const state = isLive ? live.data.state : entry.outcome;
  const isOld = state === "running" && !isLive;
  const [word, icon] = isOld ? ["Running when last seen", "queued"] : STATES[state];
  root.dataset.state = isOld ? "old" : groupOf(state);
  write(part(root, "state"), word);
  draw(part(root, "icon"), icon);
}

function showMoment(time, { began, is_started }) {
  const verb = is_started ? "" : "seen "; // others started it, before that
  writeTime(time, began, `${verb}${clock(began)} (${ago(began)})`);
}

function lengthOf({ duration: seconds, is_started }) {
  if (seconds === null) return "";
  return is_started ? duration(seconds) : `≥ ${duration(seconds)}`;
}

async function forget(entry, root) {
  try {
    await call("DELETE", `api/history/${entry.key}`);
  } catch (error) {
    return show(byId("history-problem"), error.message);
  }
  const next = root.nextElementSibling ?? root.previousElementSibling;
  root.remove();
  picked.delete(entry.execution_id);
  entries = entries.filter((one) => one !== entry);
  (next ? part(next, "menu") : byId("history-title")).focus();
  announce("Deleted from the history. The execution itself stays on PromptLayer.");
  const found = await get(`api/history?${filters()}`);
  matching = found.matching;
  showCounts(found.counts);
  showPicked();
  loadTrends();
}

byId("forget-all").addEventListener("click", async () => {
  const answer = await confirmIn({
    title: "Delete the whole history?",
    text: "This deletes all executions, with their inputs, from this machine. They stay on PromptLayer.",
    yes: "Delete all",
  });
  if (answer !== "yes") return;
  try {
    await call("DELETE", "api/history");
    picked.clear();
    showPicked();
    byId("history-title").focus();
    load();
    loadTrends();
  } catch (error) {
    show(byId("history-problem"), error.message);
  }
});

// You can compare two of one workflow.

function pick(entry, box) {
  if (box.checked) picked.set(entry.execution_id, entry);
  else picked.delete(entry.execution_id);
  showPicked();
}

function showPicked() {
  const [one, other] = picked.values();
  const isPair = picked.size === 2;
  const isSame = isPair && (one.workflow === other.workflow || !one.workflow || !other.workflow);
  byId("history-compare").disabled = !isSame;
  byId("history-compare").title = isPair && !isSame ? "They are runs of different workflows" : "";
}

byId("history-compare").addEventListener("click", () => {
  const [one, other] = [...picked.values()].map(({ execution_id: id, outcome }) => ({ id, hasSucceeded: outcome === "succeeded" }));
  picked.clear();
  go(comparisonOf(one, other));
});

// Which causes made runs fail lately, the most frequent first.
async function loadCauses() {
  const causes = await get("api/causes?days=1").catch(() => []); // the list shows the reason
  byId("failing").hidden = causes.length === 0;
  const items = causes.slice(0, MOST_CAUSES).map((one) => {
    const where = one.failed_node === "" ? "" : ` in ${one.failed_node}`;
    const link = make("a", { href: causeAddress(one) }, `${one.count} × ${one.workflow}${where}`);
    return make("li", {}, link, make("span", {}, one.cause), timeOf(one.latest));
  });
  byId("failing-list").replaceChildren(...items);
}

// Trends

async function loadTrends() {
  loadCauses();
  let trends;
  try {
    trends = await get("api/history/trends");
  } catch {
    return; // the list shows the reason
  }
  const chosen = byId("history-workflow").value;
  const names = trends.map((trend) => trend.workflow);
  const options = [...new Set([...names, chosen])].filter((name) => name !== "");
  const every = byId("history-workflow").firstElementChild;
  byId("history-workflow").replaceChildren(
    every,
    ...options.map((name) => make("option", { value: name }, name)),
  );
  byId("history-workflow").value = chosen;
  const plotted = trends.filter(({ runs: known }) => known.length >= 3);
  byId("trends").hidden = plotted.length === 0;
  byId("trend-list").replaceChildren(...plotted.map((trend) => make("li", {}, trendOf(trend))));
}

function chooseWorkflow(name) {
  const select = byId("history-workflow");
  if (![...select.options].some((one) => one.value === name)) {
    select.append(make("option", { value: name }, name));
  }
  select.value = name;
}

byId("trend-list").addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (button === null) return;
  const isChosen = byId("history-workflow").value === button.dataset.workflow;
  chooseWorkflow(isChosen ? "" : button.dataset.workflow);
  load();
});

byId("history-form").addEventListener("submit", (event) => event.preventDefault());
byId("history-search").addEventListener("input", () => {
  clearTimeout(typing);
  typing = setTimeout(load, PAUSE);
});
for (const id of ["history-workflow", "history-days", "outcomes"]) {
  byId(id).addEventListener("change", () => load());
}
byId("history-more").addEventListener("click", () => load(true));
