// @ts-check
// Running again, which costs again: behind a question.

import { call, get, getInputs } from "../library/api.js";
import { announce, byId, confirmIn, notify, tell } from "../library/dom.js";
import { serverProblem } from "../library/model.js";
import { addressOf, go } from "../library/router.js";
import { counted } from "../library/times.js";

const COST = "It costs what a run of this workflow costs, and you cannot cancel it.";
const LOST = "The run may have started: look in PromptLayer before you start it again.";

// Why a start may fail now, or null.
function troubleNow() {
  const problem = serverProblem();
  return problem === null ? null : `${problem.words}: ${problem.text} A start may fail now.`;
}

export async function startRun(content) {
  const response = await call("POST", "api/runs", content, LOST);
  const { execution_id } = await response.json();
  announce(`Execution ${execution_id} started.`);
  return execution_id;
}

// Asks, and starts a run of the same workflow with the same inputs, or opens the form with them.
export async function runAgain(run) {
  const { workflow, label, version, metadata, has_inputs } = run.data;
  if (run.data.item !== null) return retryItem(run.data);
  const form = addressOf(["start"], { again: run.id });
  if (!has_inputs) return go(form);
  let inputs;
  try {
    inputs = await getInputs(run.id);
  } catch (error) {
    return notify(error.message);
  }
  const answer = await confirmIn({
    title: `Run ${workflow} again?`,
    text: `This starts a new run with the same inputs, ${versionOf(run.data)}. ${COST}`,
    details: inputs,
    yes: "Start a new run",
    other: "Edit the inputs first",
    problem: troubleNow(),
  });
  if (answer === "other") return go(form);
  if (answer !== "yes") return;
  const number = version === null ? null : String(version);
  const content = { workflow, inputs, label, version: number, metadata };
  try {
    go(addressOf(["executions", await startRun(content)]));
  } catch (error) {
    notify(error.isUnknown ? `The run may have started. ${error.message}` : error.message);
  }
}

// By the state of an item: what the batch does with it.
const RETRIES = {
  failed: `If its run certainly failed, the batch starts a new one. ${COST} If the run may still bring an output, the batch follows it again, for free.`,
  succeeded: `Its run has succeeded. The batch starts a second one. ${COST}`,
};

// Asks, and lets the batch run its item again, so that the batch counts that run.
async function retryItem({ batch, item: key }) {
  let item;
  try {
    item = await get(`api/item?${new URLSearchParams({ batch, item: key })}`);
  } catch (error) {
    return notify(error.message);
  }
  const text = RETRIES[item.state];
  if (text === undefined) return notify(`Item ${key} of batch ${batch} is ${item.state}, so it does not run again now.`);
  const nobody = item.workers > 0 ? "" : ` Nobody works on the batch now: start a worker with ${item.work}`;
  const answer = await confirmIn({
    title: `Run item ${key} of batch ${batch} again?`,
    text: `This is the retry of the batch. ${text}${nobody}`,
    yes: "Run the item again",
  });
  if (answer !== "yes") return;
  try {
    await call("POST", "api/item/retry", { batch, item: key });
    go(addressOf(["item", batch, key]));
  } catch (error) {
    notify(error.message);
  }
}

// Asks, and starts runs with the settings of several that failed: one for each setting, unless a
// later run with it is running or has succeeded. Returns whether it started any.
export async function runAllAgain(workflow, ids) {
  let plan;
  try {
    plan = await (await call("POST", "api/reruns", { execution_ids: ids })).json();
  } catch (error) {
    notify(error.message);
    return false;
  }
  byId("notice").hidden = true; // which may be about the runs of an earlier click
  const { runs } = plan;
  const rest = leftOut(plan, ids.length);
  if (runs.length === 0) {
    tell(`There is nothing to run again. ${rest}`, workflow);
    return false;
  }
  const count = counted(runs.length, "new run");
  const answer = await confirmIn({
    title: `Run ${workflow} again ${runs.length === 1 ? "once" : `${runs.length} times`}?`,
    text: `This starts ${count} with the same inputs, ${versionsOf(runs)}. You pay for each, and cannot cancel them. ${rest}`,
    details: runs.map(({ inputs }) => inputs).join("\n"),
    yes: `Start ${count}`,
    problem: troubleNow(),
  });
  if (answer !== "yes") return false;

  let started = 0;
  for (const run of runs) {
    const version = run.version === null ? null : String(run.version);
    try {
      await startRun({ ...run, version });
      started += 1;
    } catch (error) {
      const maybe = error.isUnknown ? `${started === 0 ? "One" : "Another one"} may have started. ` : "";
      notify(`${started} of ${count} started, and the page starts no more. ${maybe}${error.message}`);
      return started > 0;
    }
  }
  announce(`${count} of ${workflow} started.`);
  return true;
}

// Why fewer runs start than failed.
function leftOut({ equal, since, without_inputs: unreadable }, all) {
  const { unknown = 0, ...known } = since;
  const again = Object.values(known).reduce((sum, number) => sum + number, 0);
  const reasons = [];
  if (again > 0) {
    const states = Object.entries(known).map(([state, number]) => `${number} ${SINCE[state]}`);
    reasons.push(`${again} ran again since (${states.join(", ")})`);
  }
  if (unknown > 0) reasons.push(`${unknown} may have run again`);
  if (equal > 0) reasons.push(`${equal} had the same inputs as another`);
  if (unreadable > 0) reasons.push(`${unreadable} whose inputs are not known here`);
  return reasons.length === 0 ? "" : `Left out of the ${all} that failed: ${reasons.join("; ")}.`;
}

// The states of a later run with the same inputs.
const SINCE = {
  waiting: "running",
  running: "running",
  succeeded: "succeeded",
  lost: "no longer followed",
};

// "with version 2", "2 with version 2 and 1 with the latest version".
function versionsOf(runs) {
  const counts = new Map();
  for (const run of runs) counts.set(versionOf(run), (counts.get(versionOf(run)) ?? 0) + 1);
  if (counts.size === 1) return versionOf(runs[0]);
  return new Intl.ListFormat("en").format([...counts].map(([version, count]) => `${count} ${version}`));
}

function versionOf({ version, label }) {
  if (version !== null) return `with version ${version}`;
  return label === null ? "with the latest version" : `with the version labelled ${label}`;
}

export function confirmStart(workflow, details) {
  const text = `This starts a new run with these inputs. ${COST}`;
  return confirmIn({ title: `Run ${workflow} again?`, text, details, yes: "Start a new run", problem: troubleNow() });
}
