// @ts-check
// What you can do with an execution on the board, in every view.

import { call } from "../library/api.js";
import { announce, notify } from "../library/dom.js";

export async function remove(id) {
  try {
    await call("DELETE", `api/executions/${id}`);
    announce(`Execution ${id} was removed from this page. It continues on PromptLayer.`);
    return true;
  } catch (error) {
    notify(error.message);
    return false;
  }
}

// Follows several again, one after the other. If one fails, the others would, too.
export async function followAllAgain(ids, button) {
  for (const id of ids) if (!(await followAgain(id, button))) return false;
  return true;
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
