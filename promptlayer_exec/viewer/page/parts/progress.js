// @ts-check
// What the line of an execution and its own page have in common: state, sentence, segments, time.

import { runAgain } from "./again.js";
import { draw, make, part, show, write } from "../library/dom.js";
import { isServerWide, STATES } from "../library/model.js";
import { addressOf, causeAddress, comparisonWith } from "../library/router.js";
import { sentenceOf } from "../library/sentence.js";
import { clock, duration, sinceText } from "../library/times.js";
import { usualOf } from "../library/usual.js";

export function showState(root, run) {
  const { data } = run;
  root.dataset.state = data.state;
  write(part(root, "title"), run.name);
  draw(part(root, "icon"), STATES[data.state][1]);
  const warning = data.warning === null ? null : `Warning from PromptLayer: ${data.warning}`;
  show(part(root, "warning"), warning);
  part(root, "again").hidden = data.state !== "lost";
}

// A segment for each status, as wide as its share of the nodes.
export function showSegments(root, run) {
  const { data } = run;
  const bar = part(root, "progress");
  const text = `${data.final} of ${data.total} nodes final`;
  bar.setAttribute("aria-valuenow", data.final);
  bar.setAttribute("aria-valuemax", Math.max(data.total, 1));
  bar.setAttribute("aria-valuetext", text);
  bar.title = text;
  const counts = Object.entries(run.counts());
  if (bar.children.length === 0) {
    bar.append(...counts.map(([status]) => make("span", { "data-status": status })));
  }
  counts.forEach(([, count], index) => {
    bar.children[index].hidden = count === 0;
    bar.children[index].style.flexGrow = String(count);
  });
}

export function showTime(root, run) {
  const length = run.length();
  write(part(root, "elapsed"), length === null ? "" : duration(length, !run.isEnded));
  const problem = run.problem();
  write(part(root, "state"), run.stateText());
  root.classList.toggle("old", problem !== null && run.data.state === "running");
  // A banner above all runs shows what concerns every run.
  return problem === null || isServerWide(problem) ? null : problemText(run, problem);
}

function problemText({ data }, { text, since, until }) {
  if (data.state === "lost") {
    const ends = "The viewer has given up. The run itself continues on PromptLayer.";
    return `${text} ${ends} Noticed at ${clock(since)}.`;
  }
  const wait = until === null ? 0 : until - Date.now() / 1000;
  const next = wait > 5 ? `the next attempt is at ${clock(until)}` : "the viewer keeps trying";
  return `${text} Since ${sinceText(since)}, ${next}.`;
}

// Writes the sentence. Its links stay the same elements while only words change, and so keep the
// focus.
export function showSentence(root, run, longest, offersAgain) {
  const { pieces, isSlow } = sentenceOf(run, usualOf(run), longest, offersAgain);
  root.classList.toggle("slow", isSlow);
  writePieces(part(root, "sentence"), pieces, run);
}

// `run` may be anything with an `id`, unless a piece is "Run again".
export function writePieces(place, pieces, run) {
  const kinds = pieces.map((piece) => piece.kind).join(" ");
  if (place.dataset.kinds !== kinds) {
    place.dataset.kinds = kinds;
    place.replaceChildren(...pieces.map((piece) => elementOf(piece, run)));
  }
  pieces.forEach((piece, index) => {
    const element = place.children[index];
    write(element, piece.text);
    const address = addressFor(piece, run);
    if (address !== null && element.getAttribute("href") !== address) element.setAttribute("href", address);
  });
}

function elementOf({ kind }, run) {
  if (kind === "text") return make("span");
  if (["node", "compare", "cause"].includes(kind)) return make("a", { "data-piece": kind });
  const button = make("button", { type: "button", class: "link", "data-piece": kind });
  button.addEventListener("click", () => runAgain(run));
  return button;
}

function nodeAddress({ id, item = null }, node) {
  return addressOf(["executions", id], { ...item, node });
}

/** @type {(piece: import("../library/sentence.js").Piece, run: any) => string | null} */
function addressFor({ kind, text, id }, run) {
  if (kind === "node") return nodeAddress(run, text);
  if (kind === "cause") return causeAddress(run.data);
  return kind === "compare" ? comparisonWith(id, run) : null;
}
