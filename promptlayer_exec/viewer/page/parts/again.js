// @ts-check
// Running again, which costs again: behind a question.

import { call, getInputs } from "../library/api.js";
import { announce, confirmIn, notify } from "../library/dom.js";
import { addressOf, go } from "../library/router.js";

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

export function confirmStart(workflow, details) {
  const text = `This starts a new run with these inputs. ${COST}`;
  return confirmIn({ title: `Run ${workflow} again?`, text, details, yes: "Start a new run" });
}
