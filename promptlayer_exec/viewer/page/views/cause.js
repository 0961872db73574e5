// @ts-check
// The page of a cause: when it began, how often it happens, and the runs that it hit:
// `#/cause?workflow=offers&failed_node=choose&cause=…`.

import { differenceText, hitBy, shortInputs } from "../library/causes.js";
import { call, get } from "../library/api.js";
import { byId, findAll, make, makeSvg, show, timeOf, write } from "../library/dom.js";
import { addressOf, comparisonOf } from "../library/router.js";
import { clock, counted } from "../library/times.js";
import { runAllAgain } from "../parts/again.js";
import { differenceOf } from "../parts/incident.js";

const HOUR = 3600;
const MOST_HOURS = 48; // in the plot
const HEIGHT = 60;
const BAR = 12;

let shown = new URLSearchParams();
let page = null;
let success = null;
let asked = 0;

export const causeView = {
  element: byId("view-cause"),

  show(_, params) {
    shown = params;
    page = null;
    write(byId("cause-title"), `${params.get("workflow") ?? ""}: why runs failed`);
    write(byId("cause-reason"), params.get("cause") ?? "");
    for (const id of ["cause-facts", "cause-hits", "cause-difference"]) write(byId(id), "");
    byId("cause-plot").replaceChildren();
    byId("cause-runs").replaceChildren();
    return load();
  },

  onExecution(run, before) {
    if (run.isEnded && run.data.state !== before.state) setTimeout(load, 500); // once it is recorded
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
  success = usual.successes[0]?.execution_id ?? null;
  render(usual);
}

function render(usual) {
  const { runs, count, first, latest, failed_node: node, cause, hours } = page;
  const known = usual.causes.find((one) => one.cause === cause && one.failed_node === node);
  const words = count === 0 ? ["The history has no such run any more."] : [`${counted(count, "run")} failed for this reason, first at ${clock(first)} and last at ${clock(latest)}.`];
  if (known !== undefined) {
    words.push(`${known.count} of the latest ${counted(usual.total, "run")} failed for it, and ${usual.failed} failed in all.`);
  }
  write(byId("cause-where"), node === "" ? "" : `in ${node}`);
  write(byId("cause-facts"), words.join(" "));
  write(byId("cause-hits"), hitBy(runs.map((run) => run.inputs)));
  byId("cause-plot").replaceChildren(...(hours.length > 0 ? [plotOf(hours)] : []));
  byId("cause-run-all").hidden = !runs.some((run) => run.has_inputs);
  byId("cause-compare").hidden = success === null || runs.length === 0;
  if (!byId("cause-compare").hidden) byId("cause-compare").href = comparisonOf(runs[0].execution_id, success);

  const focused = document.activeElement?.getAttribute("href");
  byId("cause-runs").replaceChildren(...runs.map(rowOf));
  if (focused) findAll("#cause-runs a").find((link) => link.getAttribute("href") === focused)?.focus({ preventScroll: true });
  showDifference(runs);
}

function rowOf(run) {
  const link = make("a", { href: addressOf(["executions", run.execution_id]) }, `Execution ${run.execution_id}`);
  const inputs = shortInputs(run.inputs);
  return make("li", {}, make("span", { class: "name" }, link), timeOf(run.began), make("span", {}, inputs === "" ? "Its inputs are not known here" : inputs));
}

// The viewer must follow the failed run to read its values.
async function showDifference(runs) {
  if (success === null || runs.length === 0) return;
  const id = runs[0].execution_id;
  try {
    await call("POST", "api/executions", { execution_id: id });
  } catch {
    return; // PromptLayer no longer has it
  }
  const text = differenceText(await differenceOf(id, success));
  write(byId("cause-difference"), text === "" ? "" : `Differs first from the last success in ${text}`);
}

// A bar for each hour, the present one at the right.
function plotOf(hours) {
  const counts = new Map(hours);
  const last = Math.floor(Date.now() / 1000 / HOUR) * HOUR;
  const from = Math.max(hours[0][0], last - (MOST_HOURS - 1) * HOUR);
  const all = [];
  for (let hour = from; hour <= last; hour += HOUR) all.push([hour, counts.get(hour) ?? 0]);
  const most = Math.max(1, ...all.map(([, count]) => count));
  const width = all.length * BAR;
  const text = `At most ${counted(most, "run")} an hour since ${clock(from)}`;
  const svg = makeSvg("svg", { viewBox: `0 0 ${width} ${HEIGHT}`, width, height: HEIGHT, role: "img", "aria-label": text });
  all.forEach(([hour, count], index) => {
    const height = count === 0 ? 1 : Math.max(3, (count / most) * HEIGHT);
    const shape = { x: index * BAR, y: HEIGHT - height, width: BAR - 2, height };
    const bar = makeSvg("rect", shape, makeSvg("title", {}, `${clock(hour)}: ${counted(count, "run")}`));
    svg.append(bar);
  });
  return make("figure", {}, svg, make("figcaption", { class: "muted" }, text));
}

byId("cause-run-all").addEventListener("click", () => {
  const contents = page.runs.map(({ key, label, version, metadata, has_inputs }) => {
    return { path: has_inputs ? `api/history/${key}/inputs` : null, label, version, metadata };
  });
  runAllAgain(page.workflow, contents);
});
