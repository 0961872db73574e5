// @ts-check
// Everything that is known of an item of a batch: `#/item/night/order-42`.

import { get, getText } from "../library/api.js";
import { byId, find, findAll, iconOf, make, show, timeOf, write } from "../library/dom.js";
import { STATES, STATES_OF_ITEMS } from "../library/model.js";
import { addressOf, addressOfRun } from "../library/router.js";
import { clock } from "../library/times.js";
import { commandOf } from "../parts/command.js";
import { linked } from "../parts/links.js";
import { Value } from "../parts/value.js";

const EVERY = 5000; // milliseconds

let batch = "";
let key = "";
let timer = 0;
let shown = ""; // what is on the page, as JSON, to leave it alone if nothing is new
let values = new Map(); // the attempt whose `inputs` and `output` are on the page

export const itemView = {
  element: byId("view-item"),

  show([, chosenBatch, chosenKey]) {
    [batch, key] = [chosenBatch ?? "", chosenKey ?? ""];
    shown = "";
    values = new Map();
    write(byId("item-title"), `Item ${key}`);
    write(byId("item-batch"), batch);
    byId("item-batch").href = addressOf(["batches", batch]);
    byId("item").replaceChildren();
    hideValue("inputs");
    hideValue("output");
    write(byId("item-empty"), "Reading the database …");
    clearInterval(timer);
    timer = setInterval(load, EVERY);
    return load();
  },

  hide() {
    clearInterval(timer);
  },

  title: () => `Item ${key} · Executions`,

  keys: {
    items: () => findAll("#item a"),
    isWanted: () => true,
  },
};

const query = () => new URLSearchParams({ batch, item: key });

async function load() {
  const asked = key;
  let item;
  try {
    item = await get(`api/item?${query()}`);
  } catch (error) {
    write(byId("item-empty"), "");
    return show(byId("item-problem"), error.message);
  }
  if (asked !== key) return;
  write(byId("item-empty"), "");
  show(byId("item-problem"), item.problem);
  showValue("inputs", 1);
  if (item.has_output) showValue("output", item.attempts.length);
  else hideValue("output");

  const text = JSON.stringify(item);
  if (text === shown) return;
  shown = text;
  const focus = find("#item :focus")?.dataset.focus;
  byId("item").replaceChildren(...stateOf(item), ...errorOf(item.error), ...factsOf(item), ...waysOf(item), ...attemptsOf(item));
  if (focus !== undefined) find(`#item [data-focus="${CSS.escape(focus)}"]`)?.focus({ preventScroll: true });
}

function hideValue(name) {
  values.delete(name);
  byId(`item-${name}`).hidden = true;
}

async function showValue(name, attempt) {
  if (values.get(name) === attempt) return;
  values.set(name, attempt);
  const asked = values;
  const place = byId(`item-${name}-value`);
  try {
    const text = await getText(`api/item/${name}?${query()}`);
    if (asked !== values) return; // another item is on the page by now
    place.replaceChildren();
    new Value(place, name === "inputs" ? "inputs" : "the output").show(text, { isText: true });
  } catch (error) {
    place.replaceChildren(error.message);
  }
  byId(`item-${name}`).hidden = false;
}

function stateOf({ state, since }) {
  const [word, icon] = STATES_OF_ITEMS[state] ?? STATES[state];
  const status = make("span", { class: "status", "data-kind": state }, iconOf(icon), word);
  return [make("p", { class: "item-state" }, status, make("span", {}, " since ", timeOf(since, clock(since)), " (", timeOf(since), ")"))];
}

function errorOf(error) {
  if (error === null) return [];
  return [make("p", { class: "error item-error" }, make("strong", {}, error.type), ": ", ...linked(error.text))];
}

function factsOf({ settings, execution_id: id, problem }) {
  const { workflow, label, version, metadata } = settings;
  const facts = [["Workflow", [String(workflow)]]];
  if (label !== null) facts.push(["Label", [label]]);
  if (version !== null) facts.push(["Version", [String(version)]]);
  for (const [name, value] of Object.entries(metadata ?? {})) facts.push([name, [value]]);
  if (id !== null) facts.push(["Latest run", [runOf(id, problem)]]);
  const list = facts.map(([name, content]) => make("div", {}, make("dt", {}, name), make("dd", {}, ...content)));
  return [make("dl", { class: "facts" }, ...list)];
}

// The id of a run of another server means nothing here.
function runOf(id, problem) {
  const text = `Execution ${id}`;
  if (problem !== null) return text;
  return make("a", { href: addressOfRun(batch, key, id), "data-focus": `run ${id}` }, text);
}

function waysOf({ ways }) {
  const commands = ways.map(({ what, command }) => commandOf({ what: `${what[0].toUpperCase()}${what.slice(1)}:`, command }));
  return [make("section", { class: "next" }, make("h3", {}, "What next"), ...commands)];
}

// The error of the last attempt is the item's, which the page shows above.
function attemptsOf({ attempts, problem }) {
  if (attempts.length === 0) return [];
  const lines = attempts.map((attempt, index) => {
    const { number, state, execution_id: id, worker } = attempt;
    const error = index < attempts.length - 1 ? attempt.error : null;
    const words = [`Attempt ${number}: ${state}`];
    for (const event of ["added", "taken", "started", "finished"]) {
      const moment = attempt[event];
      if (moment === null) continue;
      words.push(`, ${event} `, timeOf(moment, clock(moment)));
      if (event === "taken" && worker !== null) words.push(` by ${worker}`);
      if (event === "started") words.push(" as ", runOf(id, problem));
    }
    const failed = error === null ? [] : [make("p", { class: "error" }, `${error.type}: ${error.text}`)];
    return make("li", {}, make("p", {}, ...words), ...failed);
  });
  return [make("h3", {}, "Attempts"), make("ol", { class: "attempts" }, ...lines)];
}
