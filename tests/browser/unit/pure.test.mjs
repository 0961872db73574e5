// The page's modules that need no browser.

import assert from "node:assert/strict";
import { readdirSync, readFileSync } from "node:fs";
import test from "node:test";

import { page } from "./hooks.mjs";

const { NotJson, readJson, writeJson, readContainer } = await page("library/json.js");
const { diffLines, diffWords } = await page("library/diff.js");
const { fold } = await page("library/fold.js");
const { layOut } = await page("library/layout.js");
const { ago, duration, tickLabel, ticks } = await page("library/times.js");
const { sentenceOf, textOf } = await page("library/sentence.js");
const { causesOf, countInputs, differenceText, hitBy, shareText, shortInputs, summaryText } = await page("library/causes.js");
const { criticalPath } = await page("library/critical.js");
const { comparisonOf } = await page("library/router.js");

const SIZES = { along: 10, across: 10, gapAlong: 5, gapAcross: 5 };
const edgesOf = (pairs) => pairs.map(([source, target]) => ({ source, target }));

test("JSON is read as Python writes it", () => {
  const text = '[1180591620717411303424, -0.5, 1e+300, NaN, -Infinity, null, true, {"a\\n": "\\ud800"}]';
  assert.equal(writeJson(readJson(text)), text);
  assert.equal(writeJson(readJson('{"a": 1, "a": [] , "b":{}}')), '{"a": 1, "a": [], "b": {}}');
  for (const wrong of ["", "{", "[1,]", "01", "{a: 1}", "'a'", "[1] 2", "[".repeat(300), '"\\x"', "nan"]) {
    assert.throws(() => readJson(wrong), NotJson, wrong);
  }
  assert.equal(readContainer("7"), null);
  assert.equal(readContainer("{nonsense"), null);
});

test("equal lines are beside each other", () => {
  for (const [left, right, pairs] of [
    ["a b c", "a c", [["a", "a"], ["b", null], ["c", "c"]]],
    ["a x", "a y z", [["a", "a"], ["x", "y"], [null, "z"]]],
    ["a", "a", [["a", "a"]]],
  ]) {
    assert.deepEqual(diffLines(left.replaceAll(" ", "\n"), right.replaceAll(" ", "\n")), pairs);
  }
});

test("large texts that differ are compared as a whole, in time", () => {
  const lines = (prefix) => Array.from({ length: 100_000 }, (_, index) => prefix + index).join("\n");
  const began = performance.now();
  assert.equal(diffLines(lines("a"), lines("b")).length, 100_000);
  assert.ok(performance.now() - began < 2000);
});

test("words that differ are marked in lines that have some in common", () => {
  assert.deepEqual(diffWords("two red otters", "two old otters swim"), [
    [["two ", false], ["red", true], [" otters", false]],
    [["two ", false], ["old", true], [" otters", false], [" swim", true]],
  ]);
  assert.equal(diffWords("one, two", "three; four"), null);
});

// Stages of shards, each of which depends on the shard of the stage before.
function staged(stages, shards, nameOf) {
  const layers = Array.from({ length: stages }, (_, stage) => Array.from({ length: shards }, (_, shard) => nameOf(stage, shard)));
  const nodes = Object.fromEntries(layers.flat().map((name) => [name, { type: "CODE", is_output: false }]));
  const edges = layers.slice(1).flatMap((layer, index) =>
    layer.map((target, shard) => ({ source: layers[index][shard], target, conditional: false })),
  );
  return { layers, nodes, edges };
}

test("like nodes of a large graph are one box", () => {
  const graph = staged(3, 30, (stage, shard) => `stage ${stage} shard ${shard}`);
  const { layers, edges, boxes } = fold(graph);
  assert.deepEqual([...boxes.values()].map((box) => box.label), ["stage 0 shard …", "stage 1 shard …", "stage 2 shard …"]);
  assert.deepEqual(layers.map((layer) => layer.length), [1, 1, 1]);
  assert.deepEqual(edges.map((edge) => edge.pairs.length), [30, 30]);

  const [first] = layers[0];
  const opened = fold(graph, new Set([first]));
  assert.deepEqual(opened.layers.map((layer) => layer.length), [30, 1, 1]);
  assert.equal(opened.edges.length, 31);
});

test("nodes of a small graph, and those of another type, stay apart", () => {
  assert.equal(fold(staged(3, 26, (stage, shard) => `stage ${stage} shard ${shard}`)).boxes.size, 78);
  const graph = staged(3, 30, (stage, shard) => `stage ${stage} shard ${shard}`);
  graph.nodes["stage 1 shard 3"].type = "PROMPT_TEMPLATE";
  assert.deepEqual(fold(graph).layers.map((layer) => layer.length), [1, 2, 1]);
});

test("nodes without numbers are like each other if they have the same neighbours", () => {
  const animals = ["otter", "newt", "stork", "heron", "crane", "vole"];
  const others = Array.from({ length: 80 }, (_, index) => `${String.fromCharCode(97 + (index % 26)).repeat(1 + index)}`);
  const all = ["plan", ...animals, ...others];
  const nodes = Object.fromEntries(all.map((name) => [name, { type: "CODE", is_output: false }]));
  const edges = animals.map((target) => ({ source: "plan", target, conditional: true }));
  edges.push(...others.map((name, index) => ({ source: others[index - 1] ?? "otter", target: name, conditional: false })));
  const { boxes, edges: drawn } = fold({ layers: [["plan"], animals, ...others.map((name) => [name])], nodes, edges });
  const box = [...boxes.values()].find(({ names }) => names.length > 1);
  assert.deepEqual([box.label, box.names.length], ["newt and 4 others", 5]);
  assert.equal(drawn.find(({ target }) => target === box.key).conditional, true);
});

test("nodes are beside what they depend on", () => {
  const at = (layers, pairs) => {
    const { positions } = layOut(layers, edgesOf(pairs), SIZES);
    return Object.fromEntries([...positions].map(([name, [, across]]) => [name, across]));
  };
  const fork = at([["a"], ["b", "c"], ["d"], ["e"]], ["ab", "ac", "bd", "cd", "de"]);
  assert.ok(Math.abs(fork.a - (fork.b + fork.c) / 2) < 0.001);
  assert.ok(Math.abs(fork.a - fork.d) + Math.abs(fork.d - fork.e) < 0.001);
  const crossed = at([["a", "b"], ["c", "d"]], ["ad", "bc"]);
  assert.ok(Math.abs(crossed.a - crossed.d) + Math.abs(crossed.b - crossed.c) < 0.001);
});

test("cycles are drawn", () => {
  const { routes, positions } = layOut([["a"], ["b", "c"]], edgesOf(["ab", "bc", "cb", "cc"]), SIZES);
  assert.ok([...routes.flat(2), ...[...positions.values()].flat()].every(Number.isFinite));
});

test("durations and moments are text", () => {
  assert.deepEqual(
    [0, 59.94, 59.96, 3599.6, 3660, 54_600].map(duration),
    ["<0.1 s", "59.9 s", "1 min 00 s", "1 h 00 min", "1 h 01 min", "15 h 10 min"],
  );
  assert.deepEqual([0.5, 90, 5400].map(tickLabel), ["0.5 s", "1.5 min", "1.5 h"]);
  assert.deepEqual(ticks(6.3), [0, 2, 4]);
  for (const seconds of [0.001, 0.9, 61, 7200, 400_000]) assert.ok(ticks(seconds).length <= 6);
  const now = Date.now() / 1000;
  assert.deepEqual([now, now - 90, now - 90_000].map(ago), ["just now", "1 minute ago", "1 day ago"]);
});

test("the critical path is what the execution waited for", () => {
  const node = (name, running, final) => [name, { name, status: "SUCCESS", running, final }];
  const nodes = new Map([node("quick", 0, 1), node("slow", 0, 3), node("end", 3, 4), node("unseen", null, null)]);
  assert.deepEqual(criticalPath(nodes, null, 4), ["slow", "end"]);
  const dependencies = new Map([["end", ["unseen"]], ["unseen", ["quick"]]]);
  assert.deepEqual(criticalPath(nodes, dependencies, 4), ["quick", "unseen", "end"]);
  const skipped = new Map(nodes).set("unseen", { name: "unseen", status: "SKIPPED", running: null, final: null });
  assert.deepEqual(criticalPath(skipped, dependencies, 4), ["quick", "end"]);
  const more = new Map([...nodes, node("last", null, 4), node("aside", null, 1)]);
  const longer = new Map([...dependencies, ["last", ["end"]], ["aside", ["quick"]]]);
  assert.deepEqual(criticalPath(more, longer, 4), ["quick", "unseen", "end", "last"]);
  assert.deepEqual(criticalPath(new Map(), null, 0), []);
});

const runOf = ({ state, nodes, time = 0, ended = null, problem = null, workflow = "w" }) => ({
  id: "787",
  data: { state, workflow, final: 1, total: 3, problem },
  now: () => time,
  latest: () => Math.max(...nodes.map((node) => Math.max(node.running ?? 0, node.final ?? 0))),
  length: () => time,
  endedAt: () => ended,
  problem: () => problem,
  running: () => nodes.filter((node) => node.status === "RUNNING"),
  failed: () => nodes.filter((node) => node.status === "FAILED"),
});
const NOTHING = { duration: null, nodes: {}, successes: [], failed: 0, causes: [], total: 0 };

test("the sentence of a running run says whether it is stuck", () => {
  const nodes = [
    { name: "plan", status: "SUCCESS", running: 0, final: 4 },
    { name: "rank", status: "RUNNING", running: 0, final: null },
  ];
  const usual = { duration: 40, nodes: { rank: 8.4 }, successes: [] };
  const slow = sentenceOf(runOf({ state: "running", nodes, time: 26 }), usual);
  assert.equal(textOf(slow), "Running in rank for 26 s (usually 8.4 s). No change for 22 s.");
  assert.equal(slow.isSlow, true);
  const known = { ...usual, successes: [{ execution_id: "7", ended: Date.now() / 1000 - 90 }] };
  const next = textOf(sentenceOf(runOf({ state: "running", nodes, time: 26 }), known));
  assert.match(next, / No change for 22 s\. The last success was 1 minute ago: Compare\.$/);
  const long = { ...nodes[0], status: "FAILED", error_message: "x".repeat(300) };
  const brief = sentenceOf(runOf({ state: "failed", nodes: [long], workflow: null }), NOTHING, 100);
  assert.equal(textOf(brief), `Failed in plan: ${"x".repeat(100)}…`);
  const early = textOf(sentenceOf(runOf({ state: "running", nodes, time: 9 }), known));
  assert.equal(early, "Running in rank for 9.0 s (usually 8.4 s). The last success was 1 minute ago: Compare.");
  const soon = sentenceOf(runOf({ state: "running", nodes, time: 9 }), usual);
  assert.deepEqual([textOf(soon), soon.isSlow], ["Running in rank for 9.0 s (usually 8.4 s).", false]);
  const whole = sentenceOf(runOf({ state: "running", nodes, time: 130 }), { ...usual, nodes: {} });
  assert.match(textOf(whole), /^Running in rank for 2 min 10 s. The whole run usually takes 40 s\./);
  assert.equal(whole.isSlow, true);
  // During an outage, what was slow stays slow, and nothing becomes slow unseen.
  const inOutage = (seconds) => {
    const problem = { since: Date.now() / 1000 - seconds };
    return sentenceOf(runOf({ state: "running", nodes, time: 26, problem }), usual).isSlow;
  };
  assert.deepEqual([inOutage(0), inOutage(20)], [true, false]);
  // As long as the node usually takes, and since the node began, no change says nothing.
  const usually = { ...usual, nodes: { rank: 60 } };
  assert.equal(textOf(sentenceOf(runOf({ state: "running", nodes, time: 26 }), usually)), "Running in rank for 26 s (usually 1 min 00 s).");
  const alone = [{ name: "rank", status: "RUNNING", running: 0, final: null }];
  assert.equal(textOf(sentenceOf(runOf({ state: "running", nodes: alone, time: 26 }), NOTHING)), "Running in rank for 26 s.");
  const two = [...nodes, { name: "grade", status: "RUNNING", running: 1, final: null }];
  assert.equal(textOf(sentenceOf(runOf({ state: "running", nodes: two, time: 5 }), NOTHING)), "Running in rank and 1 other node for 5.0 s.");
});

test("the sentence of a run that ended says why, and what is next", () => {
  const nodes = [{ name: "fetch", status: "FAILED", error_message: "HTTP 503\n  at x", running: 0, final: 1 }];
  const now = Date.now() / 1000;
  const failed = runOf({ state: "failed", nodes, ended: now - 185 });
  assert.equal(textOf(sentenceOf(failed, NOTHING)), "Failed 3 minutes ago in fetch: HTTP 503 at x. Run again.");
  const successes = [{ execution_id: "787", ended: now }, { execution_id: "786", ended: now - 7200 }];
  const { pieces } = sentenceOf(failed, { ...NOTHING, successes });
  assert.match(textOf({ pieces }), / The last success was 2 hours ago: Compare · Run again\.$/);
  assert.equal(pieces.find((piece) => piece.kind === "compare").id, "786");
  const often = textOf(sentenceOf(failed, { ...NOTHING, failed: 2, total: 8 }));
  assert.equal(often, "Failed 3 minutes ago in fetch: HTTP 503 at x. 2 of the latest 8 runs failed. Run again.");
  const because = (causes) => {
    const known = { state: "failed", nodes, ended: now - 185 };
    const run = runOf(known);
    Object.assign(run.data, cause);
    return textOf(sentenceOf(run, { ...NOTHING, failed: 3, total: 8, causes }));
  };
  const cause = { failed_node: "fetch", cause: "HTTP 503 at …" };
  assert.match(because([{ ...cause, count: 2 }]), / 3 of the latest 8 runs failed, 2 for this reason\. Run again\.$/);
  assert.match(because([{ ...cause, count: 3 }]), / failed, all for this reason\. /);
  assert.match(because([{ ...cause, count: 1 }]), / 3 of the latest 8 runs failed\. /);
  const later = textOf(sentenceOf(failed, { ...NOTHING, successes: [{ execution_id: "788", ended: now - 70 }] }));
  assert.match(later, / A later run succeeded 1 minute ago: Compare · Run again\.$/);
  const unknown = runOf({ state: "failed", nodes: [], workflow: null });
  assert.equal(textOf(sentenceOf(unknown, NOTHING)), "Failed: no output node succeeded.");
  const fine = runOf({ state: "succeeded", nodes: [], time: 30, ended: now - 5 });
  const slow = sentenceOf(fine, { ...NOTHING, duration: 8 });
  assert.deepEqual([textOf(slow), slow.isSlow], ["Succeeded just now after 30 s (usually 8.0 s).", true]);
});

const folder = new URL("../../../promptlayer_exec/viewer/page/", import.meta.url);
const textAt = (path, base = folder) => readFileSync(new URL(path, base), "utf8");

test("the type checker knows the parts of the page", () => {
  const inPage = [...textAt("index.html").matchAll(/data-part="([^"]+)"/g)].map(([, name]) => name);
  const typed = [...textAt("../types/parts.d.ts", import.meta.url).matchAll(/"([^"]+)"/g)].map(([, name]) => name);
  assert.deepEqual(typed, [...new Set(inPage)].sort());
});

test("views use parts, parts use the library, and nothing goes round", () => {
  const layers = ["library", "parts", "views"];
  const imports = new Map();
  for (const [layer, name] of layers.entries()) {
    for (const file of readdirSync(new URL(name, folder))) {
      const path = `${name}/${file}`;
      const found = [...textAt(path).matchAll(/from "(\.[^"]+)"/g)].map(([, to]) => new URL(to, new URL(path, folder)));
      const targets = found.map((url) => url.pathname.slice(folder.pathname.length)).filter((to) => layers.includes(to.split("/")[0]));
      for (const to of targets) {
        assert.ok(layers.indexOf(to.split("/")[0]) <= layer, `${path} imports ${to}`);
        assert.ok(name !== "views" || !to.startsWith("views/"), `${path} imports ${to}`);
      }
      imports.set(path, targets);
    }
  }
  const visit = (path, above) => {
    assert.ok(!above.includes(path), `a cycle: ${[...above, path].join(" → ")}`);
    for (const to of imports.get(path)) visit(to, [...above, path]);
  };
  for (const path of imports.keys()) visit(path, []);
});

test("every module that the board needs is requested before another one imports it", () => {
  const preloaded = [...textAt("index.html").matchAll(/"modulepreload" href="([^"]+)"/g)].map(([, path]) => path);
  const needed = new Set();
  const visit = (path) => {
    if (needed.has(path)) return;
    needed.add(path);
    if (path === "statuses.js") return; // made by the server
    for (const [, target] of textAt(path).matchAll(/^import [^;]*"(\..*)";/gm)) {
      visit(new URL(target, new URL(path, folder)).pathname.slice(folder.pathname.length));
    }
  };
  visit("viewer.js");
  needed.delete("viewer.js");
  assert.deepEqual(preloaded.sort(), [...needed].sort());
  assert.ok(!needed.has("views/run.js")); // it is loaded after the lines of the board
});

test("runs of one workflow, node and cause are together, if there are two", () => {
  const run = (id, data) => ({ id, data: { state: "failed", workflow: "w", failed_node: "n", cause: "c", ...data } });
  const runs = [
    run(1, {}),
    run(2, { cause: "d" }),
    run(3, {}),
    run(4, { workflow: null }),
    run(5, { workflow: null }),
    run(6, { failed_node: "m" }),
    run(7, { state: "succeeded", cause: null }),
  ];
  const found = [...causesOf(runs).values()];
  assert.deepEqual(found.map((members) => members.map(({ id }) => id)), [[1, 3]]);
});

test("whom a cause hits are the inputs in which its runs differ", () => {
  const all = ["a", "b", "c", "d", "e"].map((customer) => ({ customer, plan: "free" }));
  assert.equal(hitBy([...all, null]), "Hits customer: a, b, c and 2 more. All have plan: free.");
  assert.equal(hitBy([all[0]]), "");
  assert.equal(hitBy([null, null]), "");
  assert.equal(hitBy([{ a: "1" }, { b: "2" }]), "");
  const letters = ["It is broken.", "Two?"].map((letter) => ({ letter, place: "here." }));
  assert.equal(hitBy(letters), "Hits letter: It is broken, Two? All have place: here.");
});

test("inputs and differences are short", () => {
  assert.equal(shortInputs({ a: "1", b: "x".repeat(50), c: "", d: "4", e: "5" }), `a: 1 · b: ${"x".repeat(40)}… · c:  · d: 4`);
  assert.equal(shortInputs(null), "");
  const seats = { where: "load: seats", now: "0", before: "12" };
  const locale = { where: "input locale:", now: null, before: "en" };
  assert.equal(differenceText([locale, seats]), "Differs from the last success in input locale: (none) ← en; load: seats 0 ← 12");
  assert.equal(differenceText([]), "");
  assert.equal(differenceText(null), "");
  assert.equal(shareText({ count: 3, total: 12 }), "3 of 12 runs failed for this reason");
  assert.equal(shareText({ count: 12, total: 12 }), "all 12 runs failed for this reason");
});

test("the summary of an incident has what a colleague needs elsewhere", () => {
  const runs = [{ began: 9000, inputs: { plan: "free", id: "7" } }, { began: 8000, inputs: { plan: "free", id: "8" } }, { began: 1, inputs: {} }];
  const page = { workflow: "offers", failed_node: "choose", cause: "no seats", count: 2, total: 2, first: 8000, latest: 9000, earlier: [1], execution_ids: ["12", "11"], problem: "choose: no seats for 7", runs };
  const text = summaryText(page, { execution_id: "9", ended: 7000 }, "Differs from the last success in load: seats 0 ← 12", "http://x/#/cause");
  const words = [
    "offers fails in choose: no seats. From 1970-01-01 02:13 UTC to 1970-01-01 02:30 UTC, all 2 runs failed for this reason.",
    "It also happened once before on 1970-01-01 00:00 UTC, which was another incident.",
    "The last success was execution 9 at 1970-01-01 01:56 UTC. Hits id: 7, 8. All have plan: free.",
    "Differs from the last success in load: seats 0 ← 12. The whole error of execution 12: no seats for 7.",
    "Failed executions: 12, 11. http://x/#/cause",
  ];
  assert.equal(text, words.join(" "));
  const later = summaryText(page, { execution_id: "13", ended: 9500 }, "", "http://127.0.0.1:8787/#/cause");
  assert.match(later, /A later run succeeded: execution 13 at .* http:\/\/127.0.0.1:8787\/#\/cause \(on the machine of the viewer only\)$/);
});

test("different inputs are counted if they are known as a whole", () => {
  assert.equal(countInputs([{ plan: "free" }, { plan: "free" }, { plan: "pro" }]), 2);
  assert.equal(countInputs([{ plan: "free" }, null]), null);
  assert.equal(countInputs([{ text: "a long text…" }, { text: "a long text…" }]), null);
});

test("of two executions, the success is on the left, or else the older one", () => {
  const run = (id, hasSucceeded) => ({ id, hasSucceeded });
  assert.equal(comparisonOf(run("9", false), run("10", true)), "#/compare/10/9");
  assert.equal(comparisonOf(run("10", true), run("9", true)), "#/compare/9/10");
  assert.equal(comparisonOf(run("9", false), run("10", false)), "#/compare/9/10");
});
