// @ts-check
// Forms: errors at their fields, and a button that works only once.

import { get } from "../library/api.js";
import { byId, make, write } from "../library/dom.js";

let isListed = false;

// The names of workflows, for every field that asks for one. Without them, you can type one.
export async function listWorkflows() {
  if (isListed) return;
  isListed = true;
  try {
    const { workflows, reason } = await get("api/workflows");
    isListed = reason === null;
    byId("workflows").replaceChildren(...workflows.map(({ name }) => make("option", { value: name })));
  } catch {
    isListed = false;
  }
}

// Shows an error at its field, which gets the focus, and `others` that it has at theirs.
export function showErrors(form, error) {
  const errors = error === null ? [] : [error, ...(error.others ?? [])];
  for (const input of form.querySelectorAll("input, textarea, select")) {
    const place = byId(`${input.id}-error`);
    if (place === null) continue;
    const wrong = errors.find(({ field }) => field === input.name);
    write(place, wrong?.message ?? "");
    if (wrong !== undefined) input.setAttribute("aria-invalid", "true");
    else input.removeAttribute("aria-invalid");
    if (wrong !== undefined && wrong === error) input.focus();
  }
}

export function handle(form, send) {
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const button = form.querySelector("button[type=submit]");
    if (button.disabled) return;
    const label = button.textContent;
    showErrors(form, null);
    button.disabled = true;
    button.textContent = `${label} …`;
    try {
      await send();
    } finally {
      button.disabled = false;
      button.textContent = label;
    }
  });
}
