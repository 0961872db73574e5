// Forms: errors at their fields, and a button that cannot be pressed twice.

import { byId, write } from "./dom.js";

export function showErrors(form, error) {
  for (const input of form.querySelectorAll("input, textarea, select")) {
    const place = byId(`${input.id}-error`);
    if (place === null) continue;
    const isWrong = error !== null && error.field === input.name;
    write(place, isWrong ? error.message : "");
    if (isWrong) input.setAttribute("aria-invalid", "true");
    else input.removeAttribute("aria-invalid");
    if (isWrong) input.focus();
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
