// The form that starts a run: a field for each required input, and the rest as JSON.

import { call, get } from "./api.js";
import { confirmStart, startRun } from "./again.js";
import { byId, make, show, write } from "./dom.js";
import { handle, listWorkflows, showErrors } from "./forms.js";
import { NotJson, readJson, writeJson } from "./json.js";
import { runs } from "./model.js";
import { addressOf, go, replace } from "./router.js";

let definition = null;
let isAgain = false;
let asked = 0;

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
  const inputs = await textOf(`api/executions/${id}/inputs`);
  const { workflow = "", label = null, version = null } = run?.data ?? {};
  await choose(workflow ?? "", releaseOf(label, version), inputs);
}

async function refillFrom(line, params) {
  const inputs = await textOf(`api/history/${line}/inputs`);
  const version = params.get("version");
  await choose(params.get("workflow") ?? "", releaseOf(params.get("label"), version), inputs);
}

async function textOf(path) {
  try {
    return await (await call("GET", path)).text();
  } catch {
    return null;
  }
}

function releaseOf(label, version) {
  if (label !== null) return `label:${label}`;
  return version === null ? "" : `version:${version}`;
}

// Shows the form for a workflow: its versions, and a field for each input that it requires.
async function choose(workflow, release = "", inputs = null) {
  const number = (asked += 1);
  byId("workflow").value = workflow;
  showErrors(byId("start-form"), null);
  if (inputs !== null) byId("inputs").value = inputs;
  if (workflow.trim() === "") return showDefinition(null, "", inputs);
  write(byId("definition"), "Looking for its definition …");
  const [kind, value] = release.split(/:(.*)/s);
  const query = new URLSearchParams({ workflow, ...(release === "" ? {} : { [kind]: value }) });
  let answer;
  try {
    answer = await get(`api/definition?${query}`);
  } catch (error) {
    answer = { definition: null, reason: error.message };
  }
  if (number !== asked) return; // another one was chosen in the meantime
  showDefinition(answer.definition, answer.reason, inputs, release);
}

function showDefinition(found, reason, inputs = null, release = "") {
  const kept = inputs ?? composed() ?? byId("inputs").value;
  definition = found;
  showReleases(release);
  const required = Object.entries(found?.required_inputs ?? {});
  byId("fields").hidden = required.length === 0;
  write(byId("inputs-label"), required.length > 0 ? "More inputs (a JSON object)" : "Inputs (a JSON object)");
  const fields = required.map(([name, type], index) => fieldOf(name, type, index));
  byId("fields").replaceChildren(byId("fields").firstElementChild, ...fields);
  let text = "";
  if (found === null && reason) text = `Its definition is not available, so inputs are not checked: ${reason}`;
  if (found !== null && required.length === 0) text = "It has no required inputs.";
  write(byId("definition"), text);
  spread(kept, required);
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
  const kind = isString(type) ? "" : ` (${type}, as JSON)`;
  const error = make("p", { class: "error", id: `${id}-error`, role: "alert" });
  const area = make("textarea", {
    id,
    name: `field:${name}`,
    rows: "2",
    spellcheck: "false",
    "aria-describedby": `${id}-error`,
    "aria-required": "true",
  });
  return make("div", { class: "field-of" }, make("label", { for: id }, `${name}${kind}`), area, error);
}

const fieldAt = (index) => byId(`field-${index}`);
const required = () => Object.entries(definition?.required_inputs ?? {});

// Puts the values of a JSON object into the fields, and the rest into the text.
function spread(text, names) {
  let root;
  try {
    root = readJson(text);
  } catch (error) {
    if (!(error instanceof NotJson)) throw error;
    byId("inputs").value = text;
    return;
  }
  if (root.kind !== "object") return;
  const rest = { kind: "object", entries: [] };
  for (const [key, value] of root.entries) {
    const index = names.findIndex(([name]) => name === key);
    const isPlain = index >= 0 && isString(names[index][1]) && value.kind === "string";
    if (index < 0) rest.entries.push([key, value]);
    else fieldAt(index).value = isPlain && value.value !== "" ? value.value : writeJson(value);
  }
  byId("inputs").value = rest.entries.length === root.entries.length ? text : pretty(rest);
}

function pretty(root) {
  if (root.entries.length === 0) return "{}";
  const lines = root.entries.map(([key, value]) => `  ${JSON.stringify(key)}: ${writeJson(value)}`);
  return `{\n${lines.join(",\n")}\n}`;
}

// The fields and the text as one JSON object; null if the text is none, which the server explains.
function composed() {
  const more = byId("inputs").value.trim() || "{}";
  let root;
  try {
    root = readJson(more);
  } catch {
    return null;
  }
  if (root.kind !== "object") return null;
  const entries = required().map(([name, type], index) => {
    const text = fieldAt(index)?.value ?? "";
    if (text === "") return null;
    const value = isString(type) && text !== '""' ? { kind: "string", value: text } : rawOf(text);
    return [name, value];
  });
  const given = entries.filter((one) => one !== null);
  return given.length === 0 ? more : writeJson({ kind: "object", entries: [...given, ...root.entries] });
}

const rawOf = (text) => {
  try {
    return readJson(text);
  } catch {
    return { kind: "string", value: text };
  }
};

// The first field that is empty, or no JSON where it has to be.
function wrongField() {
  for (const [index, [name, type]] of required().entries()) {
    const text = fieldAt(index).value;
    const field = `field:${name}`;
    if (text === "" && !isInText(name)) {
      const empty = isString(type) ? ' "" stands for an empty text.' : "";
      return { field, message: `This workflow requires ${name}.${empty}` };
    }
    if (text !== "" && !isString(type)) {
      try {
        readJson(text);
      } catch (error) {
        return { field, message: `This is not JSON: ${error.message}.` };
      }
    }
  }
  return null;
}

function isInText(name) {
  try {
    return readJson(byId("inputs").value).entries.some(([key]) => key === name);
  } catch {
    return false;
  }
}

byId("workflow").addEventListener("change", () => {
  const workflow = byId("workflow").value;
  replace(["start"], workflow === "" ? {} : { workflow });
  isAgain = false;
  choose(workflow);
});
byId("version").addEventListener("change", () =>
  choose(byId("workflow").value, byId("version").value),
);

handle(byId("start-form"), async () => {
  const form = byId("start-form");
  write(byId("start-error"), "");
  byId("unknown-start").hidden = true;
  const wrong = wrongField();
  if (wrong !== null) return showErrors(form, wrong);
  const workflow = byId("workflow").value;
  const inputs = composed() ?? byId("inputs").value;
  const [kind, value] = byId("version").value.split(/:(.*)/s);
  const content = { workflow, inputs, ...(value === undefined ? {} : { [kind]: value }) };
  if (isAgain && (await confirmStart(workflow, inputs)) !== "yes") return;
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
