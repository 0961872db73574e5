// @ts-check
// The durations of a workflow's latest runs as a small plot.

import { make, makeSvg } from "../library/dom.js";
import { counted, duration, unbroken } from "../library/times.js";

const WIDTH = 180;
const HEIGHT = 40;
const MARGIN = 5;

export function trendOf({ workflow, runs, total }) {
  const lengths = runs.map((run) => run.duration);
  const [least, most] = [Math.min(...lengths), Math.max(...lengths)];
  const failed = runs.filter((run) => run.outcome !== "succeeded").length;
  const typical = median(lengths);
  const range = `median ${duration(typical)}, ${duration(least)} to ${duration(most)}`;
  const text = runs.length === 1 ? duration(typical) : range;
  const about = failed > 0 ? `, ${failed} did not succeed` : "";
  const button = make("button", { type: "button", class: "trend" });
  button.dataset.workflow = workflow;
  button.append(
    make("span", { class: "name" }, workflow),
    make("span", { class: "muted" }, `${counted(total, "run")}${about}`),
    plot(runs, most),
    make("span", { class: "muted" }, unbroken(text)),
  );
  return button;
}

function plot(runs, most) {
  const step = (WIDTH - 2 * MARGIN) / Math.max(1, runs.length - 1);
  const x = (index) => MARGIN + (runs.length === 1 ? (WIDTH - 2 * MARGIN) / 2 : index * step);
  const y = (seconds) => HEIGHT - MARGIN - (seconds / Math.max(most, 0.001)) * (HEIGHT - 2 * MARGIN);
  const line = runs.map((run, index) => `${index ? "L" : "M"}${x(index).toFixed(1)} ${y(run.duration).toFixed(1)}`);
  const svg = makeSvg("svg", {
    class: "plot",
    viewBox: `0 0 ${WIDTH} ${HEIGHT}`,
    width: WIDTH,
    height: HEIGHT,
    "aria-hidden": "true",
  });
  svg.append(
    makeSvg("path", { class: "floor", d: `M0 ${HEIGHT - MARGIN + 0.5}H${WIDTH}` }),
    makeSvg("path", { class: "line", d: line.join("") }),
  );
  runs.forEach((run, index) => {
    const shape = { cx: x(index).toFixed(1), cy: y(run.duration).toFixed(1), r: 2.6 };
    const title = `${run.execution_id}: ${run.is_minimum ? "at least " : ""}${duration(run.duration)}, ${run.outcome}`;
    const dot = makeSvg("circle", { class: "point", ...shape }, makeSvg("title", {}, title));
    dot.dataset.outcome = run.outcome;
    if (run.is_minimum) dot.classList.add("minimum");
    svg.append(dot);
  });
  return svg;
}

function median(values) {
  const sorted = [...values].sort((one, other) => one - other);
  const middle = Math.floor(sorted.length / 2);
  return sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
}
