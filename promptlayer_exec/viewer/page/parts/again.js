// @ts-check
// Running again, which costs again: behind a question.

import { call, get, getInputs, getText } from "../library/api.js";
import { announce, confirmIn, notify } from "../library/dom.js";
import { addressOf, go } from "../library/router.js";
import { counted } from "../library/times.js";

const COST = "It costs what a run of this workflow costs, and you cannot cancel it.";
const LOST = "The run may have started: look in PromptLayer before you start it again.";

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
    text: `This starts a new run with the same inputs. ${COST}`,
    details: inputs,
    yes: "Start a new run",
    other: "Edit the inputs first",
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

// Asks, and starts a run for each of several that failed. `contents` has the settings of each, and
// the path of its inputs, or null if they are not known.
export async function runAllAgain(workflow, contents) {
  const known = contents.filter(({ path }) => path !== null);
  let all;
  try {
    all = await Promise.all(known.map(({ path }) => getText(path)));
  } catch (error) {
    return notify(error.message);
  }
  const count = counted(known.length, "new run");
  const missing = contents.length - known.length;
  const others = missing === 0 ? "" : ` The inputs of ${missing} others are not known here, so they do not run again.`;
  const answer = await confirmIn({
    title: `Run ${workflow} again ${known.length} times?`,
    text: `This starts ${count} with the same inputs, and you pay for each. You cannot cancel them.${others}`,
    details: all.join("\n"),
    yes: `Start ${count}`,
  });
  if (answer !== "yes") return;

  let started = 0;
  for (const [index, { label, version, metadata }] of known.entries()) {
    const number = version === null ? null : String(version);
    try {
      await startRun({ workflow, inputs: all[index], label, version: number, metadata });
      started += 1;
    } catch (error) {
      const rest = `${started} of ${count} started, and the page starts no more.`;
      return notify(`${rest} ${error.isUnknown ? "Another one may have started. " : ""}${error.message}`);
    }
  }
  announce(`${count} of ${workflow} started.`);
}

export function confirmStart(workflow, details) {
  const text = `This starts a new run with these inputs. ${COST}`;
  return confirmIn({ title: `Run ${workflow} again?`, text, details, yes: "Start a new run" });
}
