// @ts-check
// The form that starts a run: a field for each required input, and the rest as JSON.

import { get, getInputs, getRemembered, getText } from "../library/api.js";
import { confirmStart, startRun } from "../parts/again.js";
import { byId, make, oneLine, show, write } from "../library/dom.js";
import { handle, listWorkflows, showErrors } from "../parts/forms.js";
import { NotJson, readJson, writeJson } from "../library/json.js";
import { board, runs, STATES } from "../library/model.js";
import { addressOf, go, replace } from "../library/router.js";
import { clock } from "../library/times.js";

let definition = null;
let isAgain = false;
let asked = 0;
let chosen = ""; // the workflow of the fields
let requested = ""; // the one whose fields are on their way, or here

export const startView = {
  element: byId("view-start"),

  async show(_, params) {
    byId("unknown-start").hidden = true;
    listWorkflows();
    const again = params.get("again");
    const line = params.get("line");
    isAgain = again !== null || line !== null;
    if (again !== null) await refill(again);
    else if (line !== null) await refillFrom(line, params);
    else await choose(params.get("workflow") ?? byId("workflow").value);
  },

  title: () => "Start a run",
};

async function refill(id) {
  const run = runs.get(id);
  const inputs = await getInputs(id).catch(() => null);
  const { workflow = "", label = null, version = null, metadata = null } = run?.data ?? {};
  byId("metadata").value = linesOf(metadata);
  await choose(workflow ?? "", releaseOf(label, version), inputs);
}

async function refillFrom(line, params) {
  const inputs = await rememberedInputs(line);
  byId("metadata").value = linesOf(JSON.parse(params.get("metadata") ?? "{}"));
  const release = releaseOf(params.get("label"), params.get("version"));
  await choose(params.get("workflow") ?? "", release, inputs);
}

const rememberedInputs = (line) => getText(`api/history/${line}/inputs`).catch(() => null);
const linesOf = (metadata) => Object.entries(metadata ?? {}).map((pair) => pair.join("=")).join("\n");

function releaseOf(label, version) {
  if (label !== null) return `label:${label}`;
  return version === null ? "" : `version:${version}`;
}

// Shows the form for a workflow: its versions, and a field for each input that it requires.
async function choose(workflow, release = "", inputs = null) {
  const number = (asked += 1);
  requested = workflow;
  byId("workflow").value = workflow;
  showErrors(byId("start-form"), null);
  if (workflow.trim() === "") return showDefinition("", null, "", inputs);
  write(byId("definition"), "Looking for its definition …");
  const [kind, value] = release.split(/:(.*)/s);
  const query = new URLSearchParams({ workflow, ...(release === "" ? {} : { [kind]: value }) });
  let answer;
  try {
    answer = await get(`api/definition?${query}`);
  } catch (error) {
    answer = { definition: null, reason: error.message };
  }
  if (number !== asked) return; // somebody chose another one in the meantime
  showDefinition(workflow, answer.definition, answer.reason, inputs, release);
  offerEarlier(workflow);
}

function showDefinition(workflow, found, reason, inputs = null, release = "") {
  const before = new Map(required().map(([name], index) => [name, fieldAt(index).value]));
  // What somebody typed for a workflow without a description is for no other workflow.
  const isOther = definition !== null && workflow !== chosen;
  definition = found;
  chosen = workflow;
  showReleases(release);
  const names = required();
  byId("fields").hidden = names.length === 0;
  write(byId("inputs-label"), names.length > 0 ? "More inputs (a JSON object)" : "Inputs (a JSON object)");
  const fields = names.map(([name, type], index) => fieldOf(name, type, index));
  byId("fields").replaceChildren(byId("fields").firstElementChild, ...fields);
  let text = "";
  if (found === null && reason) text = `Its definition is unavailable, so the page cannot check inputs: ${reason}`;
  if (found !== null && names.length === 0) text = "It has no required inputs.";
  write(byId("definition"), text);
  if (inputs !== null) {
    spread(inputs, names);
    return write(byId("dropped"), "");
  }
  const dropped = [...before].filter(([name, value]) => value !== "" && !names.some(([one]) => one === name));
  for (const [index, [name]] of names.entries()) fieldAt(index).value = before.get(name) ?? "";
  const rest = spread(byId("inputs").value, names, isOther);
  const gone = [...dropped.map(([name]) => name), ...rest];
  write(byId("dropped"), gone.length > 0 ? `Left out, because ${workflow || "it"} does not ask for it: ${gone.join(", ")}.` : "");
}

function showReleases(release) {
  const select = byId("version");
  byId("release").hidden = definition === null && release === "";
  const options = [make("option", { value: "" }, latestText())];
  const labels = new Set(definition?.labels ?? []);
  if (release.startsWith("label:")) labels.add(release.slice(6));
  for (const label of labels) options.push(make("option", { value: `label:${label}` }, `Label ${label}`));
  const versions = new Set();
  for (let one = definition?.latest_version ?? 0; one > 0 && versions.size < 100; one -= 1) versions.add(one);
  if (release.startsWith("version:")) versions.add(Number(release.slice(8)));
  for (const one of versions) options.push(make("option", { value: `version:${one}` }, `Version ${one}`));
  select.replaceChildren(...options);
  select.value = release;
}

function latestText() {
  const latest = definition?.latest_version;
  return latest ? `Latest version (${latest})` : "Latest version";
}

const isString = (type) => /^(string|str|text)$/i.test(type);

function fieldOf(name, type, index) {
  const id = `field-${index}`;
  const kind = isString(type) ? "" : ` (${type}${isScalar(type) ? "" : ", as JSON"})`;
  const error = make("p", { class: "error", id: `${id}-error`, role: "alert" });
  const common = { id, name: `field:${name}`, "aria-describedby": `${id}-error`, "aria-required": "true" };
  const area = makeInput(type, { spellcheck: "false", ...common });
  return make("div", { class: "field-of" }, make("label", { for: id }, `${name}${kind}`), area, error);
}

const isScalar = (type) => /^(number|integer|boolean)$/i.test(type);

// What is easiest to fill in for a type.
function makeInput(type, attributes) {
  if (/^boolean$/i.test(type)) {
    const options = ["", "true", "false"].map((value) => make("option", { value }, value || "Choose"));
    return make("select", attributes, ...options);
  }
  if (isScalar(type)) return make("input", { ...attributes, inputmode: /^integer$/i.test(type) ? "numeric" : "decimal", autocomplete: "off" });
  return make("textarea", { ...attributes, rows: "2" });
}

const fieldAt = (index) => byId(`field-${index}`);
const required = () => Object.entries(definition?.required_inputs ?? {});

// Puts the values of a JSON object into the fields, and the rest into the text. Returns the names
// that were left out: with `isOther`, all that the workflow does not ask for.
function spread(text, names, isOther = false) {
  let root;
  try {
    root = readJson(text);
  } catch (error) {
    if (!(error instanceof NotJson)) throw error;
    byId("inputs").value = text; // sending it as it is fails, with an error in the form
    return [];
  }
  if (root.kind !== "object") {
    byId("inputs").value = text;
    return [];
  }
  const rest = { kind: "object", entries: [] };
  for (const [key, value] of root.entries) {
    const index = names.findIndex(([name]) => name === key);
    const isPlain = index >= 0 && isString(names[index][1]) && value.kind === "string";
    if (index < 0) rest.entries.push([key, value]);
    else fieldAt(index).value = isPlain && value.value !== "" ? value.value : writeJson(value);
  }
  if (isOther) {
    byId("inputs").value = "{}";
    return rest.entries.map(([key]) => key);
  }
  byId("inputs").value = rest.entries.length === root.entries.length ? text : pretty(rest);
  return [];
}

function pretty(root) {
  if (root.entries.length === 0) return "{}";
  const lines = root.entries.map(([key, value]) => `  ${JSON.stringify(key)}: ${writeJson(value)}`);
  return `{\n${lines.join(",\n")}\n}`;
}

const WANTED = {
  integer: "Enter a whole number, such as 42.",
  number: "Enter a number, such as 4.2.",
  boolean: "Enter true or false.",
};

class Wrong extends Error {
  // `others` are the wrong fields after this one.
  constructor(field, message, others = []) {
    super(message);
    this.field = field;
    this.others = others;
  }
}

function jsonOf(text, field, type = "") {
  try {
    return readJson(text);
  } catch (error) {
    if (!(error instanceof NotJson)) throw error;
    const wanted = WANTED[type.toLowerCase()];
    throw new Wrong(field, wanted ?? `This is not JSON: ${error.message}.`);
  }
}

// The fields and the text as one JSON object. Throws what is wrong with a field.
function composed() {
  const more = byId("inputs").value.trim() || "{}";
  const given = [];
  const missing = [];
  for (const [index, [name, type]] of required().entries()) {
    const text = fieldAt(index).value;
    const field = `field:${name}`;
    if (text === "") missing.push([name, field, type]);
    else if (isString(type) && text !== '""') given.push([name, { kind: "string", value: text }]);
    else given.push([name, jsonOf(text, field, type)]);
  }
  if (required().length === 0) return more; // the response has the reason
  const root = jsonOf(more, "inputs");
  if (root.kind !== "object") throw new Wrong("inputs", "The inputs must be a JSON object.");
  const wrong = missing
    .filter(([name]) => !root.entries.some(([key]) => key === name))
    .map(([name, field, type]) => {
      const empty = isString(type) ? ' "" stands for an empty text.' : "";
      return new Wrong(field, `This workflow requires ${name}.${empty}`);
    });
  if (wrong.length > 0) throw new Wrong(wrong[0].field, wrong[0].message, wrong.slice(1));
  if (given.length === 0) return more;
  return writeJson({ kind: "object", entries: [...given, ...root.entries] });
}

function metadata() {
  const lines = byId("metadata").value.split("\n").filter((line) => line.trim() !== "");
  const pairs = lines.map((line) => {
    const found = /^\s*([^=]*[^=\s])\s*=\s*(.*?)\s*$/.exec(line);
    if (found === null) throw new Wrong("metadata", `This line is not name=value: ${line.trim()}`);
    return found.slice(1);
  });
  return pairs.length === 0 ? null : Object.fromEntries(pairs);
}

// The inputs of earlier runs of the workflow, as far as the history has them.
async function offerEarlier(workflow) {
  const select = byId("earlier");
  const entries = board.hasHistory ? await getRemembered({ workflow }) : [];
  if (workflow !== chosen) return;
  const seen = new Map();
  for (const entry of entries) if (entry.inputs !== null && !seen.has(entry.inputs)) seen.set(entry.inputs, entry);
  byId("earlier-runs").hidden = seen.size === 0;
  const options = [...seen].slice(0, 20).map(([inputs, { key, began, outcome }]) => {
    const text = `${clock(began)}, ${STATES[outcome][0].toLowerCase()}: ${oneLine(inputs).slice(0, 80)}`;
    return make("option", { value: key }, text);
  });
  select.replaceChildren(make("option", { value: "" }, "Choose a run"), ...options);
}

byId("earlier").addEventListener("change", async () => {
  const key = byId("earlier").value;
  const inputs = key === "" ? null : await rememberedInputs(key);
  if (inputs === null) return;
  for (const index of required().keys()) fieldAt(index).value = "";
  spread(inputs, required());
});
// A name from the list brings its fields before somebody leaves this one for the next.
byId("workflow").addEventListener("input", () => {
  const options = [...byId("workflows").options];
  if (options.some(({ value }) => value === byId("workflow").value)) changeWorkflow();
});
byId("workflow").addEventListener("change", () => changeWorkflow());

function changeWorkflow() {
  const workflow = byId("workflow").value;
  if (workflow === requested) return;
  replace(["start"], workflow === "" ? {} : { workflow });
  isAgain = false;
  choose(workflow);
}

byId("version").addEventListener("change", () =>
  choose(byId("workflow").value, byId("version").value),
);

handle(byId("start-form"), async () => {
  const form = byId("start-form");
  write(byId("start-error"), "");
  byId("unknown-start").hidden = true;
  const workflow = byId("workflow").value;
  const [kind, value] = byId("version").value.split(/:(.*)/s);
  let content;
  try {
    content = { workflow, inputs: composed(), metadata: metadata() };
  } catch (error) {
    if (!(error instanceof Wrong)) throw error;
    return showErrors(form, error);
  }
  if (value !== undefined) content[kind] = value;
  if (isAgain && (await confirmStart(workflow, content.inputs)) !== "yes") return;
  try {
    go(addressOf(["executions", await startRun(content)]));
  } catch (error) {
    showErrors(form, error);
    if (error.isUnknown) {
      show(byId("unknown-reason"), error.message);
      byId("unknown-start").hidden = false;
    } else if (!error.field || form.querySelector("[aria-invalid]") === null) {
      write(byId("start-error"), error.message);
    }
  }
});
