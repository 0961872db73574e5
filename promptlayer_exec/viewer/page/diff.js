// The lines in which two texts differ.

const MOST = 2_000_000; // cells of the table; above that, only the ends are compared

// Returns pairs of [left, right]; null where there is no line.
export function diffLines(left, right) {
  const [a, b] = [left.split("\n"), right.split("\n")];
  let start = 0;
  while (start < a.length && start < b.length && a[start] === b[start]) start += 1;
  let end = 0;
  const shorter = Math.min(a.length, b.length) - start;
  while (end < shorter && a[a.length - 1 - end] === b[b.length - 1 - end]) end += 1;
  const [one, other] = [a.slice(start, a.length - end), b.slice(start, b.length - end)];
  const middle =
    one.length * other.length > MOST ? sideBySide(one, other) : align(one, other);
  const same = (line) => [line, line];
  return [...a.slice(0, start).map(same), ...beside(middle), ...a.slice(a.length - end).map(same)];
}

// Puts lines that were removed beside those that were added in their place.
function beside(pairs) {
  const result = [];
  let [removed, added] = [[], []];
  const flush = () => {
    for (let index = 0; index < Math.max(removed.length, added.length); index += 1) {
      result.push([removed[index] ?? null, added[index] ?? null]);
    }
    [removed, added] = [[], []];
  };
  for (const [left, right] of pairs) {
    if (left !== null && right !== null) {
      flush();
      result.push([left, right]);
    } else if (left !== null) removed.push(left);
    else added.push(right);
  }
  flush();
  return result;
}

function sideBySide(a, b) {
  return [...a.map((line) => [line, null]), ...b.map((line) => [null, line])];
}

// The longest common subsequence.
function align(a, b) {
  const width = b.length + 1;
  const table = new Uint32Array((a.length + 1) * width);
  for (let i = a.length - 1; i >= 0; i -= 1) {
    for (let j = b.length - 1; j >= 0; j -= 1) {
      const below = table[(i + 1) * width + j];
      const beside = table[i * width + j + 1];
      const isSame = a[i] === b[j];
      table[i * width + j] = isSame ? table[(i + 1) * width + j + 1] + 1 : Math.max(below, beside);
    }
  }
  const pairs = [];
  let [i, j] = [0, 0];
  while (i < a.length && j < b.length) {
    if (a[i] === b[j]) pairs.push([a[i++], b[j++]]);
    else if (table[(i + 1) * width + j] >= table[i * width + j + 1]) pairs.push([a[i++], null]);
    else pairs.push([null, b[j++]]);
  }
  return [...pairs, ...sideBySide(a.slice(i), b.slice(j))];
}
