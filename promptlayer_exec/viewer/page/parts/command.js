// @ts-check
// A command to copy, and what it is for.

import { clone, copyWith, part, write } from "../library/dom.js";

export function commandOf({ command, what }) {
  const root = clone("command-template").firstElementChild;
  write(part(root, "what"), what);
  write(part(root, "command"), command);
  part(root, "copy").setAttribute("aria-label", `Copy: ${command}`);
  part(root, "copy").dataset.focus = command;
  copyWith(part(root, "copy"), part(root, "copied"), () => command, () => part(root, "command"));
  return root;
}
