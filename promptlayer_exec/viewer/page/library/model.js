// @ts-check
// The state of each execution, for all views.

import { STATUSES, UNKNOWN } from "../statuses.js"; // made by the server
import { counted } from "./times.js";

export const STATES = {
  waiting: ["Waiting for the first response", "queued"],
  running: ["Running", "running"],
  succeeded: ["Succeeded", "success"],
  failed: ["Failed", "failed"],
  lost: ["No longer followed", "lost"],
  unknown: ["Unknown whether it started", "unknown"],
};
// The states of items of a batch that executions do not have.
export const STATES_OF_ITEMS = {
  waiting: ["Waiting", "queued"],
  sending: ["Sending", "running"],
  following: ["Following", "running"],
  unknown: ["Unknown", "unknown"],
};
const STALE = 15; // seconds without a response from PromptLayer after which the page shows that
const BRISK = 10; // seconds of a run in which its times change several times a second
const FIRST = {
  workflow: null,
  label: null,
  version: null,
  metadata: null,
  warning: null,
  started: null,
  ended: null,
  batch: null,
  item: null,
  since: null,
  has_inputs: false,
  inputs: null,
  failed_node: null,
  cause: null,
  state: "waiting",
  problem: null,
  elapsed: null,
  duration: null,
  final: 0,
  total: 0,
};

export const runs = new Map(); // by id, in the order of the board
export const board = {
  isKnown: false,
  instance: null,
  note: "",
  server: "",
  hasHistory: false,
  refusal: null, // the problem of a key refused before there was anything to follow
  returning: new Set(), // ids that this page has asked a restarted viewer to follow again
};
export const connection = { state: "connecting", lostAt: 0 }; // lostAt: when the times stopped

export function connectionChanged(state) {
  if (connection.state === "live" && state !== "live") connection.lostAt = performance.now();
  connection.state = state;
}

export class Run {
  constructor(id) {
    this.id = id;
    this.isListed = true; // on the board, and not only on its own page
    this.data = { ...FIRST, execution_id: id };
    this.at = performance.now(); // when the data arrived
    this.nodes = new Map(); // by name, in the server's order
    this.dependencies = null; // name -> names, once the definition is known
  }

  get name() {
    return this.data.workflow ?? `Execution ${this.id}`;
  }

  get isEnded() {
    return ["succeeded", "failed", "lost"].includes(this.data.state);
  }

  // The length of the time line: the seconds that the server sent, plus those since then while it
  // is connected. For a run that was over before, it comes from the recorded times of its nodes.
  now() {
    const { state, elapsed } = this.data;
    if (elapsed === null) return this.latest();
    if (state !== "running") return elapsed;
    const until = connection.state === "live" ? performance.now() : connection.lostAt;
    return elapsed + Math.max(0, until - this.at) / 1000;
  }

  // Whether its time on the page may have changed. After its first seconds, that has no tenths.
  isDue(isWhole) {
    return ["running", "waiting"].includes(this.data.state) && (isWhole || this.now() < BRISK);
  }

  // How many nodes there are of each status, in the order of the segments.
  counts() {
    const counts = { success: 0, failed: 0, unknown: 0, running: 0, queued: 0, skipped: 0 };
    for (const node of this.nodes.values()) counts[statusOf(node)] += 1;
    return counts;
  }

  firstFailed() {
    return this.failed()[0] ?? null;
  }

  failed() {
    return [...this.nodes.values()].filter((node) => node.status === "FAILED");
  }

  // The nodes that run, the one that began first before the others.
  running() {
    const found = [...this.nodes.values()].filter((node) => node.status === "RUNNING");
    return found.sort((one, other) => (one.running ?? 0) - (other.running ?? 0));
  }

  // The node that people come for: it runs, or else it failed. Null if there is none.
  action() {
    return (this.isEnded ? null : this.running()[0]) ?? this.firstFailed() ?? this.running()[0] ?? null;
  }

  // When it finished, or the viewer gave it up, or null if nobody saw that.
  endedAt() {
    const { state, since, elapsed, problem, ended } = this.data;
    if (state === "lost") return problem?.since ?? null;
    if (ended !== null) return ended;
    const isOver = state === "succeeded" || state === "failed";
    return isOver && since !== null && elapsed !== null ? since + elapsed : null;
  }

  // The state in words, including what failed on the way to a success.
  stateText() {
    const { state } = this.data;
    if (state === "running" && this.problem() !== null) return "Last seen running";
    const { failed } = this.counts();
    if (state !== "succeeded" || failed === 0) return STATES[state][0];
    return `Succeeded, ${counted(failed, "node")} failed`;
  }

  latest() {
    const times = [...this.nodes.values()].flatMap(({ running, final }) => [running, final]);
    return Math.max(0, ...times);
  }

  // How long it has run, or ran, or null if nobody saw that.
  length() {
    const { duration, started, since } = this.data;
    if (this.isEnded || since === null) return duration;
    return this.now() + Math.max(0, since - (started ?? since));
  }

  // What is wrong with PromptLayer's responses: { kind, text, since, until }, or null. This also
  // notices a poll without any response, of which the viewer learns only when it times out.
  problem() {
    if (this.data.problem !== null) return this.data.problem;
    const silent = (performance.now() - this.at) / 1000;
    const isStale = connection.state === "live" && this.data.state === "running" && silent > STALE;
    if (!isStale) return null;
    const since = Date.now() / 1000 - silent;
    return { kind: "stale", text: "PromptLayer has not responded.", since, until: null };
  }

  // The failed nodes that a skipped one waited for, through others that were skipped.
  whySkipped(name) {
    const failed = new Set();
    const seen = new Set();
    const open = [name];
    while (open.length > 0) {
      const one = open.pop();
      if (seen.has(one)) continue;
      seen.add(one);
      const status = this.nodes.get(one)?.status;
      if (status === "FAILED") failed.add(one);
      if (status === "SKIPPED") open.push(...(this.dependencies?.get(one) ?? []));
    }
    if (failed.size > 0) return `Skipped, because it depends on ${[...failed].join(", ")}, which failed.`;
    return "Skipped: no way led to it.";
  }

  // `age` is how many seconds ago another tab received the data.
  take(data, age = 0) {
    const before = this.data;
    this.data = data;
    this.at = performance.now() - 1000 * age;
    return before;
  }

  takeNodes({ all, nodes }) {
    if (all) this.nodes = new Map();
    for (const node of nodes) this.nodes.set(node.name, node);
  }
}

// The settings of a run besides its inputs: version, label, metadata.
export function settingsOf({ data: { version, label, metadata } }) {
  const words = [];
  if (version !== null) words.push(`version ${version}`);
  if (label !== null) words.push(`label ${label}`);
  for (const [name, value] of Object.entries(metadata ?? {})) words.push(`${name}: ${value}`);
  return words;
}

// The names of those settings that two runs do not share. Nothing is known of a run without a workflow.
export function differingSettings({ data: left }, { data: right }) {
  if (left.workflow === null || right.workflow === null) return [];
  const names = ["version", "label"].filter((name) => left[name] !== right[name]);
  const [one, other] = [left.metadata ?? {}, right.metadata ?? {}];
  const all = new Set([...Object.keys(one), ...Object.keys(other)]);
  return [...names, ...[...all].filter((name) => one[name] !== other[name])];
}

const GOES_ON = "Runs continue on PromptLayer. The page shows what it last saw.";
// By kind of problem: a few words, and what to do.
const SERVER = {
  unreachable: ["PromptLayer is unreachable", `Check the network of the machine that runs the viewer. ${GOES_ON}`],
  slow: ["PromptLayer does not respond", GOES_ON],
  stale: ["PromptLayer does not respond", GOES_ON],
  failing: ["PromptLayer has errors", `There is nothing to do but wait. ${GOES_ON}`],
  waiting: ["PromptLayer asks to wait", `Start fewer runs in parallel if this happens often. ${GOES_ON}`],
  refused: ["PromptLayer refuses the key", "The page tries the key every 15 seconds, and follows the runs again once it works. Start the viewer again to use another key."],
};

// Whether a problem is none of a single run.
export const isServerWide = ({ kind }) => kind in SERVER;

// What is wrong with PromptLayer as a whole: { kind, text, since, until }, or null.
function findServerProblem() {
  const problems = board.refusal === null ? [] : [board.refusal];
  for (const run of runs.values()) {
    const problem = ["running", "waiting", "lost"].includes(run.data.state) ? run.problem() : null;
    if (problem === null || !isServerWide(problem)) continue;
    if (run.data.state === "lost" && problem.kind !== "refused") continue;
    problems.push(problem);
  }
  // Only a person can mend a key. All else passes by itself.
  const isRefused = ({ kind }) => Number(kind === "refused");
  const [first] = problems.sort((one, other) => isRefused(other) - isRefused(one) || one.since - other.since);
  if (first === undefined) return null;
  const attempts = problems.map(({ until }) => until).filter((until) => until > Date.now() / 1000);
  return { ...first, until: attempts.length === 0 ? null : Math.min(...attempts) };
}

// The same with a few words, and what to do.
export function serverProblem() {
  const problem = findServerProblem();
  if (problem === null) return null;
  const [words, advice] = SERVER[problem.kind];
  return { ...problem, words, advice };
}

export function runOf(id) {
  if (!runs.has(id)) runs.set(id, new Run(id));
  return runs.get(id);
}

export function groupOf(state) {
  return state === "waiting" ? "running" : state;
}

// The status as styles and icons name it.
export function statusOf(node) {
  return STATUSES.has(node.status) ? node.status.toLowerCase() : "unknown";
}

export function isFinal(node) {
  return (STATUSES.get(node.status) ?? UNKNOWN).final;
}

export function wordOf(node) {
  const status = statusOf(node);
  return status === "unknown" ? node.status : status[0].toUpperCase() + status.slice(1);
}

// When a node ran, in seconds since the first poll, or null if no poll saw that.
export function spanOf(node, time) {
  const end = node.final ?? (isFinal(node) || node.running === null ? null : time);
  const start = node.running ?? end;
  if (node.status === "SKIPPED" || start === null || end === null) return null;
  return { start, end, isTimed: node.running !== null };
}
