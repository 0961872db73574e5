// @ts-check
// The page of a cause: when it began, how often it happens, and the runs that it hit:
// `#/cause?workflow=offers&failed_node=choose&cause=…`.

import { differenceText, earlierText, hitBy, shareText, shortInputs, successText, summaryText } from "../library/causes.js";
import { get } from "../library/api.js";
import { byId, copyWith, findAll, make, makeSvg, show, timeOf, write } from "../library/dom.js";
import { runs as live, STATES } from "../library/model.js";
import { addressOf, comparisonWith } from "../library/router.js";
import { ago, clock, counted, hourOf } from "../library/times.js";
import { runAllAgain } from "../parts/again.js";
import { differencesOf } from "../parts/incident.js";

const HOUR = 3600;
const LEAST_HOURS = 12; // in the plot
const MOST_HOURS = 48;
const HEIGHT = 60;
const AXIS = 18;
const BAR = 12;
const EVERY = 6; // hours between two labels

let shown = new URLSearchParams();
let page = null;
let success; // the last one
let asked = 0;

export const causeView = {
  element: byId("view-cause"),

  show(_, params) {
    shown = params;
    page = null;
    write(byId("cause-title"), `${params.get("workflow") ?? ""}: why runs failed`);
    write(byId("cause-reason"), params.get("cause") ?? "");
    for (const id of ["cause-copied", "cause-facts", "cause-hits", "cause-difference"]) write(byId(id), "");
    byId("cause-batches").hidden = true;
    byId("cause-plot").replaceChildren();
    byId("cause-runs").replaceChildren();
    showBatches();
    return load();
  },

  onBoard: showBatches, // it knows whether there are batches

  onExecution(run, before) {
    if (run.data.state !== before.state) setTimeout(load, 500); // once it is recorded
  },

  title: () => `${shown.get("workflow") ?? "Cause"}: why runs failed · Executions`,

  keys: {
    items: () => findAll("#cause-runs .name > a"),
    isWanted: () => true,
  },
};

async function load() {
  const number = (asked += 1);
  const workflow = shown.get("workflow") ?? "";
  let usual;
  try {
    page = await get(`api/cause?${shown}`);
    usual = await get(`api/history/usual?${new URLSearchParams({ workflow })}`);
  } catch (error) {
    return show(byId("cause-problem"), error.message);
  }
  if (number !== asked) return;
  show(byId("cause-problem"), null);
  success = usual.successes[0];
  render();
}

// The batches of which items failed for the same reason. Their runs are in no history.
async function showBatches() {
  if (byId("to-batches").hidden) return;
  const params = shown;
  let hit;
  try {
    hit = await get(`api/batches/failures?${params}`);
  } catch {
    return; // the page of batches shows why
  }
  if (params !== shown) return;
  const links = hit.flatMap(({ name, count, reason }, index) => [
    index === 0 ? "" : ", ",
    make("a", { href: addressOf(["batches", name], { reason }) }, `${counted(count, "item")} of batch ${name}`),
  ]);
  byId("cause-batches").replaceChildren("Failed for the same reason: ", ...links);
  byId("cause-batches").hidden = hit.length === 0;
}

function render() {
  const { runs, failed_node: node } = page;
  write(byId("cause-where"), node === "" ? "" : `in ${node}`);
  write(byId("cause-facts"), factsOf(page));
  write(byId("cause-hits"), hitBy(present().map((run) => run.inputs)));
  byId("cause-plot").replaceChildren(...(page.hours.length > 0 ? [plotOf(page.hours)] : []));
  byId("cause-run-all").hidden = !runs.some((run) => run.has_inputs);
  byId("cause-copy").hidden = page.count === 0;
  byId("cause-compare").hidden = success === undefined || runs.length === 0;
  if (!byId("cause-compare").hidden) {
    const newest = { id: runs[0].execution_id, data: { state: "failed" } };
    byId("cause-compare").href = comparisonWith(success.execution_id, newest);
  }

  const focused = document.activeElement?.getAttribute("href");
  byId("cause-runs").replaceChildren(...runs.map(rowOf));
  if (focused) findAll("#cause-runs a").find((link) => link.getAttribute("href") === focused)?.focus({ preventScroll: true });
  showDifference();
}

// The runs of the present incident. Earlier ones were another.
const present = () => page.runs.filter((run) => run.began >= page.first);

// "All 9 runs since 10:02 failed for this reason … It had also happened once before, on Nov 29."
function factsOf({ count, total, first, latest, earlier }) {
  if (count === 0) return "The history has no such run any more.";
  const since = `Since ${clock(first)} (${ago(first)}), ${shareText({ count, total })}, last at ${clock(latest)}.`;
  const words = [since, successText(success, latest), earlierText(earlier)];
  return words.filter((text) => text !== "").join(" ");
}

function rowOf(run) {
  const link = make("a", { href: addressOf(["executions", run.execution_id]) }, `Execution ${run.execution_id}`);
  const inputs = shortInputs(run.inputs);
  const about = make("span", {}, inputs === "" ? "Its inputs are not known here" : inputs);
  return make("li", {}, make("span", { class: "name" }, link), timeOf(run.began), about, ...againOf(run));
}

// What became of the same inputs since then.
function againOf({ again }) {
  if (again === null) return [];
  const { execution_id: id, outcome } = again;
  const [word] = STATES[live.get(id)?.data.state ?? outcome];
  const run = id === null ? "a start" : make("a", { href: addressOf(["executions", id]) }, `Execution ${id}`);
  return [make("span", { class: "muted later" }, "Later, with the same inputs: ", run, ` ${word.toLowerCase()}`)];
}

async function showDifference() {
  const ids = present().map((run) => run.execution_id);
  if (success === undefined || ids.length === 0) return;
  write(byId("cause-difference"), differenceText(await differencesOf(ids, success.execution_id)));
}

// A bar for each hour, the present one at the right.
function plotOf(hours) {
  const counts = new Map(hours);
  const last = Math.floor(Date.now() / 1000 / HOUR) * HOUR;
  const from = Math.max(Math.min(hours[0][0], last - (LEAST_HOURS - 1) * HOUR), last - (MOST_HOURS - 1) * HOUR);
  const all = [];
  for (let hour = from; hour <= last; hour += HOUR) all.push([hour, counts.get(hour) ?? 0]);
  const most = Math.max(1, ...all.map(([, count]) => count));
  const width = all.length * BAR;
  const text = `At most ${counted(most, "failure")} an hour since ${clock(from)}`;
  const size = { viewBox: `0 0 ${width} ${HEIGHT + AXIS}`, width, height: HEIGHT + AXIS };
  const svg = makeSvg("svg", { ...size, role: "img", "aria-label": text });
  all.forEach(([hour, count], index) => {
    const height = count === 0 ? 1 : Math.max(3, (count / most) * HEIGHT);
    const shape = { x: index * BAR, y: HEIGHT - height, width: BAR - 2, height };
    svg.append(makeSvg("rect", shape, makeSvg("title", {}, `${clock(hour)}: ${counted(count, "failure")}`)));
    // A label at the edge would be cut off.
    const isLabelled = new Date(1000 * hour).getHours() % EVERY === 0 && index >= 2 && index < all.length - 1;
    if (isLabelled) svg.append(makeSvg("text", { x: (index + 0.5) * BAR, y: HEIGHT + AXIS - 4 }, hourOf(hour)));
  });
  const figure = make("figure", {}, svg, make("figcaption", { class: "muted" }, text));
  requestAnimationFrame(() => figure.scrollTo(figure.scrollWidth, 0)); // a phone has no room for all
  return figure;
}

const summary = () => summaryText(page, success, byId("cause-difference").textContent, location.href);
copyWith(byId("cause-copy"), byId("cause-copied"), summary);

byId("cause-run-all").addEventListener("click", async () => {
  if (await runAllAgain(page.workflow, page.execution_ids)) load();
});
