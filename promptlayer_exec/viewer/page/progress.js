// @ts-check
// What the line of an execution and its own page have in common: state, segments, time, problem.

import { draw, make, part, show, write } from "./dom.js";
import { STATES } from "./model.js";
import { clock, duration, sinceText } from "./times.js";

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
  write(part(root, "elapsed"), length === null ? "" : duration(length));
  const problem = run.problem();
  write(part(root, "state"), run.stateText());
  root.classList.toggle("old", problem !== null && run.data.state === "running");
  return problem === null ? null : problemText(run, problem);
}

function problemText({ data }, { text, since, until }) {
  if (data.state === "lost") {
    const ends = "The viewer has given up; the run itself goes on at PromptLayer.";
    return `${text} ${ends} Noticed at ${clock(since)}.`;
  }
  const wait = until === null ? 0 : until - Date.now() / 1000;
  const next = wait > 5 ? `the next attempt is at ${clock(until)}` : "the viewer keeps trying";
  return `${text} Since ${sinceText(since)}; ${next}.`;
}
