// @ts-check
// The form on an execution's page that chooses another one to compare it with.

import { getRemembered } from "../library/api.js";
import { make, part, write } from "../library/dom.js";
import { board, runs, STATES } from "../library/model.js";
import { comparisonOf, go } from "../library/router.js";
import { clock } from "../library/times.js";

export function offerComparison(root, current) {
  const form = part(root, "compare-form");
  const button = part(root, "compare");
  let others = [];
  button.addEventListener("click", async () => {
    form.hidden = !form.hidden;
    button.setAttribute("aria-expanded", String(!form.hidden));
    if (form.hidden) return;
    others = await othersOf(current());
    part(root, "others").replaceChildren(
      make("option", { value: "" }, others.length > 0 ? "Choose one" : "No other run is known here"),
      ...others.map(({ id, text }) => make("option", { value: id }, text)),
    );
    part(root, "others").value = others.find((one) => one.hasSucceeded)?.id ?? "";
    part(root, "others").focus();
  });
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const other = part(root, "other-id").value.trim() || part(root, "others").value;
    const { id, data } = current();
    const isId = /^[0-9]{1,19}$/.test(other) && other !== id;
    write(part(root, "compare-error"), isId ? "" : "Choose another execution, or enter its id.");
    if (!isId) return;
    const isOther = others.some((one) => one.id === other && one.hasSucceeded);
    go(comparisonOf({ id, hasSucceeded: data.state === "succeeded" }, { id: other, hasSucceeded: isOther }));
  });
}

// Other runs of the same workflow, live or remembered; the latest of the remembered ones first.
async function othersOf(run) {
  const found = new Map();
  const { workflow } = run.data;
  for (const one of runs.values()) {
    if (one.id !== run.id && one.data.workflow === workflow) {
      found.set(one.id, { state: one.data.state, when: "" });
    }
  }
  if (board.hasHistory && workflow !== null) {
    for (const { execution_id, began, outcome } of await getRemembered({ workflow })) {
      if (execution_id === null || execution_id === run.id) continue;
      found.set(execution_id, { state: outcome, when: `, ${clock(began)}` });
    }
  }
  return [...found].map(([id, { state, when }]) => {
    return { id, text: `${id}, ${STATES[state][0].toLowerCase()}${when}`, hasSucceeded: state === "succeeded" };
  });
}
