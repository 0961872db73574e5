// The view of all executions that are followed: a card each.

import { call } from "./api.js";
import { announce, byId, clone, draw, notify, part, placeAt, show, write } from "./dom.js";
import { handle, showErrors } from "./forms.js";
import { board, groupOf, runs, STATES } from "./model.js";
import { addressOf, replace } from "./router.js";
import { matches, Rows } from "./rows.js";
import { clock, duration, sinceText } from "./times.js";

const cards = new Map(); // by id
let isShown = false;

export const boardView = {
  element: byId("view-board"),

  show(_, params) {
    isShown = true;
    byId("filter").value = params.get("filter") ?? "";
    const state = params.get("state") ?? "all";
    const choice = document.querySelector(`input[name=state][value="${CSS.escape(state)}"]`);
    (choice ?? document.querySelector("input[name=state][value=all]")).checked = true;
    // What happened while another view was shown.
    this.onBoard();
    for (const [id, card] of cards) {
      card.rows.update();
      showExecution(card, runs.get(id));
    }
    applyFilter();
  },

  hide() {
    isShown = false;
  },

  onBoard() {
    for (const id of cards.keys()) if (!runs.has(id)) drop(id);
    [...runs.values()].forEach((run, index) => placeAt(byId("cards"), index, cardOf(run).root));
    applyFilter();
  },

  onNodes(run, names) {
    cardOf(run).rows.update(names);
    if (byId("filter").value !== "") applyFilter();
  },

  onExecution(run) {
    showExecution(cardOf(run), run);
    applyFilter();
  },

  tick() {
    for (const [id, card] of cards) {
      const run = runs.get(id);
      if (["running", "waiting"].includes(run?.data.state)) tick(card, run);
    }
  },

  title() {
    const running = [...runs.values()].filter((run) => groupOf(run.data.state) === "running");
    return running.length > 0 ? `(${running.length}) Executions` : "Executions";
  },
};

function cardOf(run) {
  const known = cards.get(run.id);
  // A run that was removed and added again is another object.
  if (known?.run === run) return known;
  known?.root.remove();
  const { id } = run;
  const root = clone("card-template").firstElementChild;
  const rows = new Rows(run, part(root, "nodes"), part(root, "axis"));
  const card = { run, root, rows };
  root.dataset.id = id;
  const title = part(root, "title");
  title.id = `title-${id}`;
  title.href = addressOf(["executions", id]);
  root.setAttribute("aria-labelledby", title.id);
  part(root, "remove").setAttribute("aria-label", `Remove execution ${id} from this page`);
  part(root, "progress").setAttribute("aria-label", `Final nodes of execution ${id}`);
  part(root, "nodes").setAttribute("aria-label", `Nodes of execution ${id}`);
  part(root, "remove").addEventListener("click", () => remove(id));
  part(root, "again").addEventListener("click", async () => {
    if (await followAgain(id, part(root, "again"))) part(root, "heading").focus();
  });
  cards.set(id, card);
  rows.update();
  showExecution(card, run);
  return card;
}

function showExecution(card, run) {
  showState(card.root, run);
  write(part(card.root, "subtitle"), run.data.workflow === null ? "" : `Execution ${run.id}`);
  tick(card, run);
}

// What a card and the page of an execution have in common.
export function showState(root, run) {
  const { data } = run;
  const [, icon] = STATES[data.state];
  root.dataset.state = data.state;
  write(part(root, "title"), run.name);
  draw(part(root, "icon"), icon);
  const progress = part(root, "progress");
  progress.max = Math.max(data.total, 1);
  progress.value = data.final;
  write(part(root, "count"), `${data.final} of ${data.total} nodes`);
  const warning = data.warning === null ? null : `Warning from PromptLayer: ${data.warning}`;
  show(part(root, "warning"), warning);
  part(root, "again").hidden = data.state !== "lost";
  part(root, "columns").hidden = data.total === 0;
}

export function tick({ root, rows }, run) {
  const time = run.now();
  const length = run.length();
  write(part(root, "elapsed"), length === null ? "" : duration(length));
  const problem = run.problem();
  show(part(root, "problem"), problem === null ? null : problemText(run, problem));
  const isOld = problem !== null && run.data.state === "running";
  write(part(root, "state"), isOld ? "Running when last seen" : STATES[run.data.state][0]);
  root.classList.toggle("old", isOld);
  rows.tick(time);
}

function problemText({ data }, { text, since, until }) {
  if (data.state === "lost") {
    const ends = "The viewer has given up; the run itself goes on at PromptLayer.";
    return `${text} ${ends} Noticed at ${clock(since)}.`;
  }
  const wait = until === null ? 0 : until - Date.now() / 1000;
  const next = wait > 5 ? `it is asked again at ${clock(until)}` : "the viewer keeps asking";
  return `${text} It is so ${sinceText(since)}; ${next}.`;
}

function drop(id) {
  const card = cards.get(id);
  cards.delete(id);
  const next = card.root.nextElementSibling ?? card.root.previousElementSibling;
  const hadFocus = card.root.contains(document.activeElement);
  card.root.remove();
  if (hadFocus) (next ? part(next, "heading") : byId("execution-id")).focus();
}

export async function remove(id) {
  try {
    await call("DELETE", `api/executions/${id}`);
    announce(`Execution ${id} was removed from this page; it continues at PromptLayer.`);
    return true;
  } catch (error) {
    notify(error.message);
    return false;
  }
}

export async function followAgain(id, button) {
  button.disabled = true;
  try {
    await call("POST", "api/executions", { execution_id: id });
    return true;
  } catch (error) {
    notify(error.message);
    return false;
  } finally {
    button.disabled = false;
  }
}

// The filter

function applyFilter() {
  if (!isShown) return;
  const text = byId("filter").value.trim().toLowerCase();
  const state = document.querySelector("input[name=state]:checked").value;
  const counts = { all: 0, running: 0, succeeded: 0, failed: 0, lost: 0 };
  let shown = 0;
  for (const card of cards.values()) {
    const group = groupOf(card.run.data.state);
    const isFound = showMatching(card, text);
    if (isFound) {
      counts.all += 1;
      counts[group] += 1;
    }
    card.root.hidden = !isFound || (state !== "all" && state !== group);
    shown += card.root.hidden ? 0 : 1;
  }
  for (const [name, count] of Object.entries(counts)) {
    write(document.querySelector(`[data-count=${name}]`), String(count));
  }
  byId("states").hidden = cards.size === 0;
  const none = "There is no execution on this page yet.\nAdd one by its id, or start a run.";
  const nothing = cards.size === 0 ? none : "No execution matches the filter.";
  write(byId("empty"), shown > 0 || !board.isKnown ? "" : nothing);
}

// Either the whole card matches, or it shows only the nodes that match.
function showMatching({ rows, run }, text) {
  const about = [run.name, run.id, STATES[run.data.state][0]];
  const isWhole = about.some((one) => one.toLowerCase().includes(text));
  rows.filter(text, isWhole);
  return isWhole || [...run.nodes.values()].some((node) => matches(node, text));
}

function changeFilter() {
  const state = document.querySelector("input[name=state]:checked").value;
  const params = new URLSearchParams();
  if (byId("filter").value !== "") params.set("filter", byId("filter").value);
  if (state !== "all") params.set("state", state);
  replace([], params);
  applyFilter();
}

byId("filter-form").addEventListener("submit", (event) => event.preventDefault());
byId("filter").addEventListener("input", changeFilter);
byId("states").addEventListener("change", changeFilter);

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
