// @ts-check
// The lines, and in them the words, in which two texts differ.

import Diff from "../vendor/diff/base.js";
import { diffWordsWithSpace } from "../vendor/diff/word.js";

const PATIENCE = 150; // milliseconds, after which a text counts as wholly different
const LONG = 5000; // characters of a line whose words are not compared

class Lines extends Diff {
  tokenize(text) {
    return text.split("\n");
  }

  removeEmpty(lines) {
    return lines;
  }

  join(lines) {
    return lines;
  }
}

const lines = new Lines();

// Returns pairs of [left, right], with null for a missing line. Removed lines are beside those that
// came in their place.
export function diffLines(left, right) {
  const all = (text, key) => [{ value: text.split("\n"), [key]: true }];
  const changes =
    lines.diff(left, right, { timeout: PATIENCE }) ?? [...all(left, "removed"), ...all(right, "added")];
  const pairs = [];
  let [removed, added] = [[], []];
  const flush = () => {
    const count = Math.max(removed.length, added.length);
    for (let index = 0; index < count; index += 1) pairs.push([removed[index] ?? null, added[index] ?? null]);
    [removed, added] = [[], []];
  };
  for (const change of changes) {
    if (change.removed) removed.push(...change.value);
    else if (change.added) added.push(...change.value);
    else {
      flush();
      pairs.push(...change.value.map((line) => [line, line]));
    }
  }
  flush();
  return pairs;
}

// Returns the parts of both lines as [text, isChanged], or null if they share hardly a word.
export function diffWords(left, right) {
  if (left.length > LONG || right.length > LONG) return null;
  const changes = diffWordsWithSpace(left, right, { timeout: PATIENCE });
  if (changes === undefined) return null;
  const same = changes.filter((one) => !one.added && !one.removed);
  if (!same.some((one) => /\w/.test(one.value))) return null;
  const side = (other) =>
    changes.filter((one) => !one[other]).map((one) => [one.value, Boolean(one.added || one.removed)]);
  return [side("added"), side("removed")];
}
