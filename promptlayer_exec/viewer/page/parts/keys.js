// @ts-check
// Keys with one letter, which go through the lines of a view. You can turn them off.

import { byId, find, part } from "../library/dom.js";

const WANTED = "keys";
const FIELDS = "input:not([type=checkbox], [type=radio]), textarea, select";

const isOn = () => localStorage.getItem(WANTED) !== "0";

// `view()` returns the current view. Its `keys` has the lines as `items()`, `isWanted(item)`
// for those to which n goes, and `onMove(item)`.
export function listenToKeys(view) {
  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || !isOn()) return;
    const { target } = event;
    if ((target instanceof Element && target.matches(FIELDS)) || find("dialog[open]") !== null) return;
    const keys = view()?.keys;
    if (event.key === "?") {
      event.preventDefault();
      showKeys();
    } else if (event.key === "/") {
      const search = view()?.element.querySelector("input[type=search]:not([data-part=find])");
      if (!search) return;
      event.preventDefault();
      search.focus();
    } else if (keys && ["j", "k", "n"].includes(event.key)) {
      event.preventDefault();
      move(keys, event.key);
    } else if (event.key === "o") {
      foldAt(target);
    }
  });
}

// Unfolds the line with the focus, or folds it again.
/** @type {(target: any) => void} */
function foldAt(target) {
  const line = target.closest("li");
  if (line !== null) part(line, "fold")?.click();
}

function move({ items, isWanted, onMove }, key) {
  const all = [...items()].filter((one) => one.checkVisibility());
  const marked = all.findIndex((one) => one.getAttribute("aria-current") === "true");
  const focused = all.indexOf(document.activeElement);
  const at = focused >= 0 ? focused : marked;
  let next = all[key === "k" ? Math.max(0, at - 1) : at + 1];
  if (key === "n") next = [...all.slice(at + 1), ...all.slice(0, at + 1)].find(isWanted);
  if (next === undefined) return;
  next.focus({ preventScroll: true });
  (next.closest(".line-head, .incident-head, li") ?? next).scrollIntoView({ block: "nearest" });
  onMove?.(next);
}

function showKeys() {
  byId("keys-on").checked = isOn();
  byId("keys-dialog").showModal();
}

byId("keys").addEventListener("click", showKeys);
byId("keys-on").addEventListener("change", () => {
  localStorage.setItem(WANTED, byId("keys-on").checked ? "1" : "0");
});
