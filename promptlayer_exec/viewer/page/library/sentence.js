// @ts-check
// A run in one sentence: its state, node, reason, moment, what is usual, and what to do next. Every
// view shows this one.

import { ago, counted, duration } from "./times.js";

const QUIET = 10; // seconds without a change from which the sentence mentions them
const SLOW = 3; // times the usual time, from which a run may be stuck
const FEW = 4; // runs, from which the sentence counts those that failed
const REASON = 220; // characters of a reason, unless a view needs fewer

// What is usual for a workflow of which the history has nothing.
export const NOTHING_USUAL = { duration: null, nodes: {}, successes: [], failed: 0, causes: [], total: 0 };

/** @typedef {{ kind: "text" | "node" | "compare" | "again" | "cause", text: string, id?: string }} Piece */

// The pieces of the sentence: { pieces, isSlow }. `usual` is what `usualOf` returns, and `longest`
// the most characters of a reason. Without `offersAgain`, a button beside it runs it again.
/** @returns {{ pieces: Piece[], isSlow: boolean }} */
export function sentenceOf(run, usual, longest = REASON, offersAgain = true) {
  const { state } = run.data;
  if (state === "waiting") return plain("Waiting for the first response from PromptLayer.");
  if (state === "running") return runningSentence(run, usual);
  if (state === "failed") return plain(...failedPieces(run, whenOf(run), longest), ...oftenOf(run, usual), ...nextOf(run, usual, offersAgain));
  if (state === "lost") return plain(...lostPieces(run));
  return succeededSentence(run, usual, longest);
}

export const textOf = ({ pieces }) => pieces.map((piece) => piece.text).join("");

// For a notification: without what needs a click, and without a moment, because it may be read later.
export function tellingOf(run) {
  if (run.data.state === "failed") return textOf(plain(...failedPieces(run, "")));
  return textOf(sentenceOf(run, NOTHING_USUAL));
}

/** @type {(text: string) => Piece} */
const say = (text) => ({ kind: "text", text });

/** @type {(node: any) => Piece} */
const naming = (node) => ({ kind: "node", text: node.name });

/** @returns {{ pieces: Piece[], isSlow: boolean }} */
function plain(...pieces) {
  return { pieces: pieces.map((piece) => (typeof piece === "string" ? say(piece) : piece)), isSlow: false };
}

function runningSentence(run, usual) {
  const problem = run.problem();
  const isOld = problem !== null;
  // What is slow was so when PromptLayer last responded.
  const unseen = isOld ? Date.now() / 1000 - problem.since : 0;
  const time = run.now() - unseen;
  const nodes = run.running();
  const verb = isOld ? "Last seen running" : "Running";
  const quiet = time - run.latest();
  const total = run.length();
  const isLate = total !== null && usual.duration !== null && total - unseen > SLOW * usual.duration;
  const change = ` No change for ${duration(quiet, true)}.`;

  const [node] = nodes;
  if (node === undefined) {
    const { final, total: count } = run.data;
    const words = `${verb}: ${final} of ${count} nodes are done, none is running.`;
    return { pieces: [say(quiet >= QUIET && !isOld ? words + change : words)], isSlow: isLate };
  }

  const others = nodes.length === 1 ? "" : ` and ${counted(nodes.length - 1, "other node")}`;
  const length = time - node.running;
  const normal = usual.nodes[node.name] ?? null;
  const isSlow = isLate || (normal !== null && length > SLOW * normal);
  // For how long, nobody has seen.
  if (isOld) return { pieces: [say(`${verb} in `), naming(node), say(`${others}.`)], isSlow };

  let rest = node.running === null ? "" : ` for ${duration(length, true)}`;
  if (normal !== null) rest += ` (usually ${duration(normal, true)})`;
  else if (usual.duration !== null) rest += `. The whole run usually takes ${duration(usual.duration, true)}`;
  // The latest change may be that the node began, and the node may usually take that long.
  const isQuiet = quiet >= Math.max(QUIET, normal ?? 0) && (node.running === null || quiet < length - 1);
  const next = lastSuccess(run, usual);
  return { pieces: [say("Running in "), naming(node), say(`${others}${rest}.${isQuiet ? change : ""}`), ...next], isSlow };
}

const whenOf = (run) => (run.endedAt() === null ? "" : ` ${ago(run.endedAt())}`);

function failedPieces(run, when, longest = REASON) {
  const nodes = run.failed();
  const [node] = nodes;
  if (node === undefined) return [say(`Failed${when}: no output node succeeded.`)];
  const others = nodes.length === 1 ? "" : ` and ${counted(nodes.length - 1, "other node")}`;
  return [say(`Failed${when} in `), naming(node), say(`${others}: ${reasonOf(node, longest)}`)];
}

// Whether its runs often fail, and how many for this reason; of a few, nobody can tell.
/** @returns {Piece[]} */
function oftenOf({ data: { failed_node: node, cause } }, { failed, total, causes }) {
  if (total < FEW || failed === 0) return [];
  const often = ` ${failed} of the latest ${total} runs failed`;
  const same = causes.find((one) => one.cause === cause && one.failed_node === (node ?? ""));
  if (same === undefined || same.count < 2) return [say(`${often}.`)];
  const count = same.count === failed ? "all" : String(same.count);
  return [say(`${often}, `), { kind: "cause", text: `${count} for this reason` }, say(".")];
}

// What people do next: they compare it with the last success, and run it again.
/** @returns {Piece[]} */
function nextOf(run, usual, offersAgain) {
  if (run.data.workflow === null) return [];
  const compare = lastSuccess(run, usual);
  if (!offersAgain) return compare;
  /** @type {Piece} */
  const again = { kind: "again", text: "Run again" };
  return compare.length === 0 ? [say(" "), again, say(".")] : [...compare.slice(0, -1), say(" · "), again, say(".")];
}

/** @returns {Piece[]} */
function lastSuccess(run, usual) {
  const success = usual.successes.find(({ execution_id }) => execution_id !== run.id);
  if (success === undefined) return [];
  const { ended, execution_id: id } = success;
  const isLater = run.endedAt() !== null && ended > run.endedAt();
  const words = isLater ? "A later run succeeded" : "The last success was";
  return [say(` ${words} ${ago(ended)}: `), { kind: "compare", text: "Compare", id }, say(".")];
}

/** @returns {(Piece | string)[]} */
function lostPieces(run) {
  const [node] = run.running();
  const where = node === undefined ? [] : [say(" Last seen running in "), naming(node), say(".")];
  const text = run.data.problem?.text ?? "";
  return [`No longer followed: ${text}`, ...where, " The run itself continues on PromptLayer."];
}

function succeededSentence(run, usual, longest) {
  const length = run.length();
  let text = `Succeeded${whenOf(run)}`;
  if (length !== null) text += ` after ${duration(length, true)}`;
  if (usual.duration !== null && length !== null) text += ` (usually ${duration(usual.duration, true)})`;
  const isSlow = length !== null && usual.duration !== null && length > SLOW * usual.duration;
  const [node] = run.failed();
  if (node === undefined) return { pieces: [say(`${text}.`)], isSlow };
  return { pieces: [say(`${text}, though `), naming(node), say(` failed: ${reasonOf(node, longest)}`)], isSlow };
}

// The sentence of an item of a batch. The viewer does not follow it, and has only its outcome.
export function itemSentenceOf({ kind, node, reason, finished, execution_id }) {
  const when = ago(finished);
  if (kind === "waiting") return plain(`Joined the queue ${when}.`);
  if (kind === "sending") return plain(`Its start request was sent ${when}, and the response may still come.`);
  if (kind === "following") return plain(`The batch began to follow its run ${when}.`);
  if (kind === "succeeded") return plain(`Succeeded ${when}.`);
  const why = reasonOf({ error_message: reason });
  if (kind === "unknown") return plain(`It may have started (${when}): ${why}`);
  if (node === null || execution_id === null) return plain(`Failed ${when}: ${why}`);
  return plain(`Failed ${when} in `, naming({ name: node }), `: ${why}`);
}

// A reason on one line, with a full stop.
export function reasonOf(node, longest = REASON) {
  const text = (node.error_message ?? "").replace(/\s+/g, " ").trim();
  if (text.length > longest) return `${text.slice(0, longest)}…`;
  return /[.!?…]$/.test(text) ? text : `${text}.`;
}
