// @ts-check
// The view of all executions on the board: a line each, the failed ones first.

import { call, getRemembered } from "../library/api.js";
import { announce, byId, clone, find, findAll, make, oneLine, part, placeAt, timeOf, write, writeTime } from "../library/dom.js";
import { followAgain, followAllAgain, remove } from "../parts/actions.js";
import { handle, showErrors } from "../parts/forms.js";
import { causesOf, keyOf, shortInputs } from "../library/causes.js";
import { Incident } from "../parts/incident.js";
import { board, groupOf, runs, STATES } from "../library/model.js";
import { showSegments, showSentence, showState, showTime } from "../parts/progress.js";
import { addressOf, replace } from "../library/router.js";
import { matches, Rows } from "../parts/rows.js";
import { ago, counted, fully } from "../library/times.js";

const FEW = 5; // succeeded runs to show before somebody asks for the others
const REST = 5000; // milliseconds without use, after which lines move again

const lines = new Map(); // by id
const open = new Set(); // ids of lines that show their nodes, also while a viewer restarts
const incidents = new Map(); // by the key of a cause
const unfolded = new Set(); // keys of causes that show their lines
const groups = findAll(".group");
const shownIn = new Map(); // by the group: its runs that match the filter
let isShown = false;
let frame = 0;
let usedAt = -Infinity; // when somebody last used a line
let resting = 0; // the timer that arranges the lines once nobody does
let isUnfolded = false;
let isRecentKnown = false;

export const boardView = {
  element: byId("view-board"),

  show(_, params) {
    isShown = true;
    byId("filter").value = params.get("filter") ?? "";
    const state = params.get("state") ?? "all";
    const choice = find(`input[name=state][value="${CSS.escape(state)}"]`);
    (choice ?? find("input[name=state][value=all]")).checked = true;
    // What happened while the page showed another view.
    this.onBoard();
    for (const line of lines.values()) {
      line.rows?.update();
      showLine(line);
    }
    arrange();
  },

  hide() {
    isShown = false;
    isRecentKnown = false;
  },

  onBoard() {
    for (const id of lines.keys()) if (!runs.get(id)?.isListed) drop(id);
    for (const run of listed()) lineOf(run);
    arrangeSoon();
  },

  onNodes(run, names) {
    if (!run.isListed) return;
    const line = lineOf(run);
    line.rows?.update(names);
    showLine(line);
    if (byId("filter").value !== "") arrangeSoon();
  },

  onExecution(run, before) {
    if (!run.isListed) return;
    showLine(lineOf(run));
    if (groupOf(before.state) !== groupOf(run.data.state) || before.workflow !== run.data.workflow) arrangeSoon();
  },

  tick(isWhole) {
    for (const line of lines.values()) if (line.run.isDue(isWhole)) tick(line);
  },

  refresh() {
    for (const line of lines.values()) tick(line);
    for (const incident of incidents.values()) incident.tick();
    for (const group of groups) showLatest(group);
  },

  title: () => "Executions",

  keys: {
    items: () => findAll(".line-name > a"),
    isWanted: (item) => item.closest(".line, .incident").dataset.state === "failed",
  },
};

const listed = () => [...runs.values()].filter((run) => run.isListed);

function lineOf(run) {
  const known = lines.get(run.id);
  // If somebody removed a run and added it again, it is another object.
  if (known?.run === run) return known;
  known?.root.remove();
  const { id } = run;
  const root = clone("line-template").firstElementChild;
  const line = { run, root, rows: null };
  root.dataset.id = id;
  const title = part(root, "title");
  title.id = `title-${id}`;
  title.href = addressOf(["executions", id]);
  // The whole line leads to the run, but one can select its text.
  find(".line-head", root).addEventListener("click", ({ target }) => {
    if (target.closest("a, button") !== null || !getSelection().isCollapsed) return;
    title.focus({ preventScroll: true }); // where Back returns to
    title.click();
  });
  part(root, "progress").setAttribute("aria-label", `Final nodes of execution ${id}`);
  part(root, "remove").setAttribute("aria-label", `Remove execution ${id} from this page`);
  part(root, "fold").setAttribute("aria-label", `Nodes of execution ${id}`);
  part(root, "remove").addEventListener("click", () => remove(id));
  part(root, "again").addEventListener("click", async () => {
    if (await followAgain(id, part(root, "again"))) title.focus();
  });
  part(root, "fold").addEventListener("click", () => expand(line, line.rows === null || part(root, "body").hidden));
  lines.set(id, line);
  showLine(line);
  if (open.has(id)) expand(line, true);
  return line;
}

// Makes the rows of the nodes when somebody wants to see them.
function expand(line, isOpen) {
  const { root, run } = line;
  if (line.rows === null) {
    const hrefOf = (node) => addressOf(["executions", run.id], { node });
    line.rows = new Rows(run, part(root, "nodes"), part(root, "axis"), { hrefOf });
    part(root, "nodes").setAttribute("aria-label", `Nodes of execution ${run.id}`);
    line.rows.update();
  }
  part(root, "body").hidden = !isOpen;
  part(root, "fold").setAttribute("aria-expanded", String(isOpen));
  if (isOpen) open.add(run.id);
  else open.delete(run.id);
  tick(line);
}

function showLine(line) {
  const { root, run } = line;
  showState(root, run);
  showSegments(root, run);
  const { state, final, total } = run.data;
  // All nodes of a failed run are final, which is not what people ask of it.
  const count = state === "failed" ? run.counts().success : final;
  write(part(root, "count"), total === 0 ? "" : `${count}/${total}`);
  part(root, "count").title = `${count} of ${counted(total, "node")} ${state === "failed" ? "succeeded" : "final"}`;
  write(part(root, "subtitle"), run.data.workflow === null ? "" : run.id);
  write(part(root, "line-inputs"), shortInputs(run.data.inputs));
  tick(line);
}

// Runs that take much longer than usual are a group of their own.
function groupNow(run) {
  const group = groupOf(run.data.state);
  const isSlow = lines.get(run.id)?.root.classList.contains("slow") ?? false;
  return isSlow && (group === "running" || group === "succeeded") ? "slow" : group;
}

function tick(line) {
  const { root, run, rows } = line;
  const wasSlow = root.classList.contains("slow");
  const problem = showTime(root, run) ?? run.data.warning ?? "";
  write(part(root, "problem"), run.data.state === "lost" ? "" : problem);
  showSentence(root, run);
  if (run.data.state === "failed" && run.endedAt() !== null) part(root, "sentence").title = fully(run.endedAt());
  if (root.classList.contains("slow") !== wasSlow) arrangeSoon();
  showWhen(part(root, "when"), run.endedAt());
  if (rows !== null && !part(root, "body").hidden) rows.tick(run.now());
}

function showWhen(time, moment) {
  if (moment === null) write(time, "");
  else writeTime(time, moment, ago(moment));
}

// When the latest run of a group that it shows finished. One that waits to move is another group's.
function showLatest(group) {
  const moments = (shownIn.get(group) ?? [])
    .filter((run) => groupNow(run) === group.dataset.group)
    .map((run) => run.endedAt() ?? 0);
  const latest = Math.max(0, ...moments);
  write(part(group, "latest"), latest === 0 ? "" : `latest ${ago(latest)}`);
}

function drop(id) {
  const { root } = lines.get(id);
  lines.delete(id);
  const all = findAll(".line:not([hidden])");
  const at = all.indexOf(root);
  const next = all[at + 1] ?? all[at - 1];
  const hadFocus = root.contains(document.activeElement);
  root.remove();
  if (hadFocus) (next ? part(next, "title") : byId("execution-id")).focus();
}

// The order: groups, the newest first in each. While somebody uses the pointer or the keyboard on a
// line, no line moves away from there. A pointer or a focus that just rests there is no use.

function isUsed() {
  const isThere = byId("board").matches(":hover") || byId("board").contains(document.activeElement);
  return isThere && performance.now() - usedAt < REST;
}

// Who has started runs wants to see what becomes of them.
function letMove() {
  usedAt = -Infinity;
  arrangeSoon();
}

for (const kind of ["pointermove", "wheel", "keydown", "focusin"]) {
  byId("board").addEventListener(kind, () => (usedAt = performance.now()), { passive: true });
}

// Changes come in bursts: one arrangement is enough for all that come within a frame.
function arrangeSoon() {
  if (!isShown || frame !== 0) return;
  frame = requestAnimationFrame(arrange);
}

function arrange() {
  cancelAnimationFrame(frame);
  frame = 0;
  clearTimeout(resting);
  if (!isShown) return;
  if (isUsed()) resting = setTimeout(arrangeSoon, REST);
  const text = byId("filter").value.trim().toLowerCase();
  const state = find("input[name=state]:checked").value;
  const counts = { all: 0, failed: 0, lost: 0, slow: 0, running: 0, succeeded: 0 };
  const found = new Set(listed().map(lineOf).filter((line) => isFound(line, text)));
  for (const { run } of found) {
    counts.all += 1;
    counts[groupNow(run)] += 1;
  }
  for (const [name, count] of Object.entries(counts)) {
    write(find(`[data-count=${name}]`), String(count));
  }
  slide(() => {
    for (const group of groups) placeGroup(group, found, state);
  });
  byId("states").hidden = lines.size === 0;
  const none = "There is no execution on this page yet.\nAdd one by its id, or start a run.";
  const nothing = lines.size === 0 ? none : "No execution matches the filter.";
  const shown = groups.some((group) => !group.hidden);
  write(byId("empty"), shown || !board.isKnown ? "" : nothing);
  byId("first").hidden = lines.size > 0 || !board.isKnown;
  if (!byId("first").hidden) showRecent();
}

// On an empty board, the last executions of the history lead on.
async function showRecent() {
  if (!board.hasHistory || isRecentKnown) return;
  isRecentKnown = true;
  const recent = (await getRemembered()).filter((entry) => entry.execution_id !== null).slice(0, 5);
  const items = recent.map(({ execution_id: id, workflow, outcome, began, problem }) => {
    const link = make("a", { href: addressOf(["executions", id]) }, workflow ?? `Execution ${id}`);
    const when = make("span", { class: "muted" }, timeOf(began));
    return make("li", {}, link, STATES[outcome][0], when, make("span", { class: "muted" }, oneLine(problem ?? "")));
  });
  find(".recent").replaceChildren(...items);
  byId("recent").hidden = items.length === 0;
}

function placeGroup(group, found, state) {
  const { group: name } = group.dataset;
  const list = group.querySelector(".lines");
  const isStill = isUsed();
  // A line that may not move now stays in its place.
  const groupHere = (line) => (isStill && line.root.isConnected ? line.root.closest(".group").dataset.group : groupNow(line.run));
  const members = listed().map(lineOf).filter((line) => groupHere(line) === name);
  const shown = new Set(members.filter((line) => found.has(line) && ["all", groupNow(line.run)].includes(state)));
  const isFolding = name === "succeeded" && state === "all" && byId("filter").value === "" && !isUnfolded;
  const causes = name === "failed" ? causesNow(members.filter((line) => shown.has(line)), isStill) : new Map();
  placeMembers(list, members, causes);
  let few = 0;
  for (const line of members) {
    const key = keyOf(line.run);
    const isMember = causes.has(key);
    line.root.classList.toggle("member", isMember);
    const isShownHere = shown.has(line) && (!isFolding || few < FEW || open.has(line.run.id));
    few += isShownHere ? 1 : 0;
    line.root.hidden = !isShownHere || (isMember && !unfolded.has(key));
  }
  group.hidden = shown.size === 0;
  shownIn.set(group, [...shown].map((line) => line.run));
  showLatest(group);
  if (name !== "succeeded") return;
  const rest = isUnfolded ? shown.size - FEW : shown.size - few;
  byId("unfold").hidden = rest <= 0 || state !== "all" || byId("filter").value !== "";
  byId("unfold").setAttribute("aria-expanded", String(isUnfolded));
  write(byId("unfold"), isUnfolded ? "Show fewer" : `Show ${rest.toLocaleString("en")} more that succeeded`);
}

// The runs of each cause. While somebody uses the board, no line disappears into a new one.
function causesNow(members, isStill) {
  const causes = causesOf(members.map((line) => line.run));
  if (isStill) for (const key of causes.keys()) if (!incidents.has(key)) causes.delete(key);
  for (const [key, { root }] of incidents) {
    if (causes.has(key)) continue;
    root.remove();
    incidents.delete(key);
  }
  for (const [key, runs] of causes) {
    if (!incidents.has(key)) incidents.set(key, new Incident(key, (isOpen) => unfold(key, isOpen), letMove));
    incidents.get(key).update(runs, unfolded.has(key));
  }
  return causes;
}

// Causes come first, each with its runs below.
function placeMembers(list, members, causes) {
  const ordered = [];
  for (const key of causes.keys()) {
    const same = members.filter((line) => keyOf(line.run) === key);
    ordered.push(incidents.get(key), ...same);
  }
  ordered.push(...members.filter((line) => !causes.has(keyOf(line.run))));
  ordered.forEach(({ root }, index) => placeAt(list, index, root));
}

function unfold(key, isOpen) {
  if (isOpen) unfolded.add(key);
  else unfolded.delete(key);
  arrange();
}

// Moves lines by transforms, so that the eye can follow.
function slide(change) {
  const all = findAll(".group:not([hidden]) > h2, .line:not([hidden]), .incident");
  const before = new Map(all.map((one) => [one, one.getBoundingClientRect().top]));
  /** @type {any} */
  const focused = document.activeElement;
  change();
  if (focused !== document.activeElement && focused.isConnected) focused.focus({ preventScroll: true });
  const moved = [];
  for (const [one, top] of before) {
    const now = one.hidden ? top : one.getBoundingClientRect().top;
    if (now === top || Math.min(now, top) > innerHeight || Math.max(now, top) < -100) continue;
    moved.push(one);
    one.style.transition = "none";
    one.style.transform = `translateY(${top - now}px)`;
  }
  requestAnimationFrame(() => {
    for (const one of moved) {
      one.style.transition = "";
      one.style.transform = "";
    }
  });
}

function isFound({ rows, run }, text) {
  const { inputs, label, metadata } = run.data;
  const known = [label ?? "", ...Object.values(inputs ?? {}), ...Object.entries(metadata ?? {}).flat()];
  const about = [run.name, run.id, run.stateText(), ...known];
  const isWhole = about.some((one) => one.toLowerCase().includes(text));
  rows?.filter(text, isWhole);
  return isWhole || [...run.nodes.values()].some((node) => matches(node, text));
}

function changeFilter() {
  const state = find("input[name=state]:checked").value;
  const params = new URLSearchParams();
  if (byId("filter").value !== "") params.set("filter", byId("filter").value);
  if (state !== "all") params.set("state", state);
  replace([], params);
  arrange();
}

byId("filter-form").addEventListener("submit", (event) => event.preventDefault());
byId("filter").addEventListener("input", changeFilter);
byId("states").addEventListener("change", changeFilter);
byId("board").addEventListener("pointerleave", arrangeSoon);
byId("board").addEventListener("focusout", arrangeSoon);
byId("follow-all").addEventListener("click", () => {
  const lost = listed().filter((run) => run.data.state === "lost");
  followAllAgain(lost.map((run) => run.id), byId("follow-all"));
});
byId("unfold").addEventListener("click", () => {
  isUnfolded = !isUnfolded;
  arrange();
});

handle(byId("add-form"), async () => {
  const input = byId("execution-id");
  try {
    const content = { execution_id: input.value, is_listed: true };
    const response = await call("POST", "api/executions", content);
    input.value = "";
    announce(`Execution ${(await response.json()).execution_id} was added to this page.`);
  } catch (error) {
    showErrors(byId("add-form"), { message: error.message, field: "execution_id" });
  }
});
