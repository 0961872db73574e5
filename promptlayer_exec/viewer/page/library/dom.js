// @ts-check
// Writing to the document, always as text.

import { ago, fully, machine } from "./times.js";

/** @type {(id: string) => any} - an element of any kind, as the page has it */
export const byId = (id) => document.getElementById(id);

/** @type {(root: ParentNode, name: Part) => any} - a misspelt name is an error of the type checker */
export const part = (root, name) => root.querySelector(`[data-part="${name}"]`);

/** @type {(selector: string, root?: ParentNode) => any} */
export const find = (selector, root = document) => root.querySelector(selector);

/** @type {(selector: string, root?: ParentNode) => any[]} */
export const findAll = (selector, root = document) => [...root.querySelectorAll(selector)];

export const clone = (id) => byId(id).content.cloneNode(true);

export function write(element, text) {
  if (element.textContent === text) return false;
  element.textContent = text;
  return true;
}

export function show(element, text) {
  element.hidden = text === null;
  write(element, text ?? "");
}

export function draw(use, icon) {
  const href = `#icon-${icon}`;
  if (use.getAttribute("href") !== href) use.setAttribute("href", href);
}

export function iconOf(icon) {
  const use = makeSvg("use");
  draw(use, icon);
  return makeSvg("svg", { class: "icon", "aria-hidden": "true" }, use);
}

// An element with attributes and children. Children that are strings become text.
export function make(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

export function makeSvg(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  return fill(element, attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined && value !== false) {
      element.setAttribute(name, value === true ? "" : value);
    }
  }
  element.append(...children);
  return element;
}

// Writes a moment in words, with the exact time as its title.
export function writeTime(time, moment, words) {
  write(time, words);
  time.dateTime = machine(moment);
  time.title = fully(moment);
}

export function timeOf(moment, words = ago(moment)) {
  const time = make("time");
  writeTime(time, moment, words);
  return time;
}

export function announce(text) {
  byId("announcer").textContent = text;
}

export function notify(text) {
  showNotice(text, true);
}

// What is no problem. It goes with the next click, or once a run of that workflow finishes.
export function tell(text, workflow) {
  showNotice(text, false);
  byId("notice").dataset.workflow = workflow;
}

function showNotice(text, isProblem) {
  const notice = byId("notice");
  notice.hidden = false;
  notice.classList.toggle("problem", isProblem);
  delete notice.dataset.workflow;
  byId("notice-text").textContent = text;
}

// Hides what `tell` has shown, about one workflow or about any.
export function hideTold(workflow = null) {
  const notice = byId("notice");
  const about = notice.dataset.workflow;
  if (about !== undefined && (workflow === null || about === workflow)) notice.hidden = true;
}

export function oneLine(text) {
  return text.slice(0, 300).replace(/\s+/g, " ");
}

// The place of the next result of a search, or of the previous one. The first follows the last.
export const stepTo = (current, by, count) => (current + by + count) % count;

// Puts an element at a position, and moves nothing that is already there.
export function placeAt(list, index, element) {
  if (list.children[index] !== element) list.insertBefore(element, list.children[index] ?? null);
}

// A button that copies a text, which may still have to be fetched.
export function copyWith(button, result, text, shown) {
  button.addEventListener("click", async () => {
    write(result, "");
    let copied;
    try {
      copied = await text();
    } catch (error) {
      return write(result, error.message);
    }
    try {
      await navigator.clipboard.writeText(copied);
      write(result, "Copied");
    } catch {
      if (shown) getSelection().selectAllChildren(shown());
      const hint = shown ? " The text is selected: copy it yourself." : "";
      write(result, `The browser does not allow copying.${hint}`);
    }
  });
}

const DOUBLE = 500; // milliseconds between the clicks of a double click
const NEAR = 8; // pixels between them

// Drops the second click of a double click in a dialog, lest it falls on what was beneath the dialog.
function dropSecondClick(first) {
  if (first.detail === 0) return; // by the keyboard
  const dialog = first.currentTarget;
  const drop = (event) => {
    const distance = Math.hypot(event.clientX - first.clientX, event.clientY - first.clientY);
    if (distance > NEAR || dialog.contains(event.target)) return;
    event.preventDefault();
    event.stopPropagation();
  };
  for (const kind of ["mousedown", "click"]) {
    addEventListener(kind, drop, true);
    setTimeout(() => removeEventListener(kind, drop, true), DOUBLE);
  }
}

// Asks in a dialog, and returns "yes", "other", or "" if the user cancelled it. A `problem` stands
// above the buttons.
export function confirmIn({ title, text, yes, other = null, details = null, problem = null }) {
  const dialog = byId("confirm");
  dialog.onclick = dropSecondClick;
  write(byId("confirm-title"), title);
  write(byId("confirm-text"), text);
  write(byId("confirm-yes"), yes);
  show(byId("confirm-other"), other);
  show(byId("confirm-details"), details);
  show(byId("confirm-problem"), problem);
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue), { once: true });
  });
}
