/**
 * Starts and follows executions by the routes of `promptlayer_exec.fastapi.create_router`, which
 * serve this module at `executions/client.js`. Bundlers import a copy, with `client.d.ts`.
 *
 * All executions that a page follows share one connection for each hundred of them.
 *
 * @typedef {object} Node  with `value` and the error messages only if the app shows them
 * @property {string} name
 * @property {string} status  "QUEUED", "RUNNING", "SUCCESS", "FAILED", "SKIPPED", or a new one
 * @property {any} [value]
 * @property {string | null} [error_message]
 * @property {any} [raw_error_message]
 * @property {boolean | null} is_output_node
 * @property {number | null} running  seconds from the first poll to when it was first seen running
 * @property {number | null} final  the same, for its final status
 *
 * @typedef {object} View  the state of an execution, as far as it is known
 * @property {"connecting" | "waiting" | "running" | "complete" | "failed"} state  "waiting": there
 *   is nothing new for now, and the rest is what was last known. "failed": it could not be followed
 *   to its end. An execution with failed nodes is "complete", and has not succeeded
 * @property {string | null} message  why it waits, or could not be followed
 * @property {number} progress  0 to 1
 * @property {boolean | null} succeeded  null until it is complete
 * @property {ReadonlyMap<string, Node>} nodes
 *
 * @typedef {object} Options
 * @property {string | null | undefined} [ticket]  for reading the executions. One can cover many
 * @property {(() => Promise<string>) | undefined} [renew]  returns a new ticket after a refusal
 * @property {string | undefined} [base]  the URL of the route `executions`, if it is not beside this
 *   module
 */

const own = /^(.*\/executions)\/client\.js(?:[?#].*)?$/.exec(import.meta.url);
const BASE = own ? own[1] : "/executions"; // a bundler moves this module
const MOST_IDS = 100; // as the route accepts them
const MOST_CHARACTERS = 7000; // of an address: nginx accepts 8 KB
const SLOW = 3_000; // milliseconds until a page gets the message that there is no connection yet
const DEAD = 45_000; // milliseconds without a byte: the server sends a comment every 15 seconds
const HIDDEN = 20_000; // milliseconds until a hidden page lets go of its connections
const SLOW_MESSAGE =
  "Still connecting. The server may be slow, or other tabs may be using all connections.";
const UNREACHABLE_MESSAGE = "Could not reach the server.";
const FULL_MESSAGE = "The server cannot take another connection now. Trying again.";
const TEMPORARY = [408, 425, 429]; // besides each 5xx, which may be a proxy's

/**
 * The view of an execution before its first event.
 *
 * @type {View}
 */
export const UNSEEN = Object.freeze({
  state: "connecting", message: null, progress: 0, succeeded: null, nodes: new Map(),
});

/**
 * Start a run. If this fails, the run may still have started. With a `key`, such as the id of an
 * order, call it again to get the same run. The app's session needs `starts=`.
 *
 * @param {string} workflow
 * @param {Record<string, any>} [inputs]
 * @param {{base?: string, headers?: Record<string, string>, key?: string | null}} [options]
 * @returns {Promise<{execution_id: string, ticket?: string, warning?: string}>}
 */
export async function start(workflow, inputs = {}, { base = BASE, headers = {}, key } = {}) {
  /** @type {Record<string, string>} */
  const all = { "Content-Type": "application/json", ...headers };
  if (key != null) {
    if (/[^\x20-\xff]/.test(key)) throw new Error(`a key must be text of Latin-1, got ${key}`);
    all["Idempotency-Key"] = key;
  }
  const response = await fetch(base, {
    method: "POST",
    headers: all,
    body: JSON.stringify({ workflow, inputs }),
  });
  if (!response.ok) throw new Error(await problem(response));
  return response.json();
}

/**
 * Follow an execution until it is complete, through lost connections and restarts of servers.
 *
 * @param {string} executionId
 * @param {(view: View) => void} show  called at each change
 * @param {Options} [options]
 * @returns {() => void} a function that stops following
 */
export function follow(executionId, show, { ticket = null, renew, base = BASE } = {}) {
  return pageOf(base).add(executionId, show, new Access(ticket, renew));
}

/**
 * Follow many executions. One ticket can cover all of them.
 *
 * @param {Iterable<string>} executionIds
 * @param {(view: View, executionId: string) => void} show  called at each change of one
 * @param {Options} [options]
 * @returns {() => void} a function that stops following
 */
export function followAll(executionIds, show, { ticket = null, renew, base = BASE } = {}) {
  const access = new Access(ticket, renew);
  const stops = Array.from(new Set(executionIds), (id) =>
    pageOf(base).add(id, (view) => show(view, id), access));
  return () => stops.forEach((stop) => stop());
}

/** An execution that this page follows. */
class Run {
  /** @param {string} id @param {Access} access */
  constructor(id, access) {
    this.id = id;
    this.access = access;
    this.view = UNSEEN;
    /** @type {Set<(view: View) => void>} */
    this.shows = new Set();
    this.renewed = false; // whether its ticket was renewed since its last event
  }

  /** @param {Partial<View>} changes */
  update(changes) {
    this.view = { ...this.view, message: null, ...changes };
    Array.from(this.shows).forEach((show) => this.tell(show));
  }

  /** @param {(view: View) => void} show */
  tell(show) {
    if (!this.shows.has(show)) return; // it was stopped
    try {
      show(this.view);
    } catch (error) { // it must not stop the stream, and the console shows it
      queueMicrotask(() => { throw error; });
    }
  }
}

/** One connection. */
class Stream {
  /** @param {Map<string, Run>} runs */
  constructor(runs) {
    // Of the executions that it shows until they finish.
    this.tickets = new Map([...runs].map(([id, run]) => [id, run.access.ticket]));
    this.controller = new AbortController();
    this.live = false; // whether an event has come
  }

  /** @param {Map<string, Run>} runs */
  isFor(runs) {
    return this.tickets.size === runs.size && [...runs.keys()].every((id) => this.tickets.has(id));
  }
}

/** A ticket, which is renewed once for all executions that it is for. */
class Access {
  /**
   * @param {string | null} ticket
   * @param {(() => Promise<string>) | undefined} renew
   */
  constructor(ticket, renew) {
    this.ticket = ticket;
    this.renew = renew;
    /** @type {Promise<void> | null} */
    this.renewal = null;
  }

  /** @param {string | null} refused @returns {Promise<void>} */
  async replace(refused) {
    if (this.ticket !== refused || !this.renew) return; // another execution has renewed it
    this.renewal ??= this.renew()
      .then((ticket) => void (this.ticket = ticket), () => {})
      .finally(() => (this.renewal = null));
    await this.renewal;
  }
}

/** The executions that this page follows by the routes at one address. */
class Page {
  /** @param {string} base */
  constructor(base) {
    this.base = base;
    /** @type {Group[]} */
    this.groups = [];
    /** @type {ReturnType<typeof setTimeout> | undefined} */
    this.hiding = undefined;
    this.asleep = false;
    if (typeof document !== "undefined") {
      document.addEventListener("visibilitychange", () => this.watchVisibility());
      this.watchVisibility();
    }
  }

  /**
   * @param {string} id
   * @param {(view: View) => void} show
   * @param {Access} access
   */
  add(id, show, access) {
    const own = (/** @type {View} */ view) => show(view); // the same function may be given twice
    let group = this.groups.find((group) => group.runs.has(id));
    if (!group) {
      group = this.groups.find((group) => group.hasRoom(id, access));
      if (!group) this.groups.push((group = new Group(this)));
      group.runs.set(id, new Run(id, access));
      group.plan(0);
    }
    const home = group, run = /** @type {Run} */ (group.runs.get(id));
    run.shows.add(own);
    if (access.ticket) run.access = access;
    if (run.view !== UNSEEN) queueMicrotask(() => run.tell(own));
    return () => {
      run.shows.delete(own);
      // A page may be about to follow it again.
      if (!run.shows.size && (home.stream || home.next)) home.plan(1_000);
    };
  }

  // A browser opens six HTTP/1.1 connections to a host, and each tab holds one.
  watchVisibility() {
    clearTimeout(this.hiding);
    if (document.hidden) {
      this.hiding = setTimeout(() => {
        this.asleep = true;
        for (const group of this.groups) group.pause();
      }, HIDDEN);
    } else if (this.asleep) {
      this.asleep = false;
      for (const group of this.groups) group.plan(0);
    }
  }
}

/** Up to a hundred executions, and the connection for them. */
class Group {
  /** @param {Page} page */
  constructor(page) {
    this.page = page;
    /** @type {Map<string, Run>} */
    this.runs = new Map();
    /** @type {Stream | null} */
    this.stream = null; // what shows the executions
    /** @type {Stream | null} */
    this.next = null; // what will replace it, from its first event on
    /** @type {ReturnType<typeof setTimeout> | undefined} */
    this.timer = undefined;
    this.due = Infinity;
    this.failures = 0;
  }

  /** @param {string} id @param {Access} access */
  hasRoom(id, access) {
    if (this.runs.size >= MOST_IDS) return false;
    return this.address([...this.runs.keys(), id], [access]).length <= MOST_CHARACTERS;
  }

  /** @param {string[]} ids @param {Access[]} [more] */
  address(ids, more = []) {
    const query = new URLSearchParams(ids.map((id) => ["id", id]));
    const accesses = [...[...this.runs.values()].map((run) => run.access), ...more];
    for (const ticket of new Set(accesses.map((access) => access.ticket)))
      if (ticket) query.append("ticket", ticket);
    return `${this.page.base}/events?${query}`;
  }

  /** Connect in some milliseconds, or earlier if that is planned. @param {number} delay */
  plan(delay) {
    if (this.page.asleep || (this.due <= Date.now() + delay)) return;
    clearTimeout(this.timer);
    this.due = Date.now() + delay;
    this.timer = setTimeout(() => this.connect(), delay);
  }

  pause() {
    clearTimeout(this.timer);
    this.due = Infinity;
    this.stream?.controller.abort();
    this.next?.controller.abort();
    this.stream = this.next = null;
  }

  connect() {
    this.due = Infinity;
    for (const run of this.runs.values()) if (!run.shows.size) this.runs.delete(run.id);
    if (!this.runs.size) return this.pause();
    if ((this.next ?? this.stream)?.isFor(this.runs)) return;
    this.next?.controller.abort();
    this.next = new Stream(this.runs);
    this.read(this.next, this.address([...this.runs.keys()]));
  }

  /** @param {Stream} stream @param {string} address */
  async read(stream, address) {
    const { signal } = stream.controller;
    const slow = setTimeout(() => {
      // After a failed attempt, the page still shows why that failed.
      if (!this.failures) this.say(stream, SLOW_MESSAGE);
    }, SLOW);
    let retry = (1 + 3 * Math.random()) * 1_000, message = null, status = 0;
    try {
      const response = await fetch(address, { signal, cache: "no-store" });
      status = response.status;
      clearTimeout(slow);
      const type = response.headers.get("Content-Type") ?? "";
      if (status !== 200 || !response.body || !type.startsWith("text/event-stream")) {
        message = await problem(response);
      } else {
        for await (const { kind, data, delay } of events(response.body, stream.controller)) {
          if (delay) retry = delay;
          if (!kind) continue;
          this.promote(stream);
          this.receive(kind, data, stream);
        }
      }
    } catch { // an error of a stream that was open needs no message
      if (!status) message = await problem(null);
    }
    clearTimeout(slow);
    if (this.stream === stream || this.next === stream) this.ended(stream, status, message, retry);
  }

  /** Let a stream show the executions, and close the one that did. @param {Stream} stream */
  promote(stream) {
    this.failures = 0;
    stream.live = true;
    if (this.next !== stream) return;
    this.stream?.controller.abort();
    this.stream = stream;
    this.next = null;
  }

  /**
   * @param {Stream} stream
   * @param {number} status
   * @param {string | null} message
   * @param {number} retry
   */
  ended(stream, status, message, retry) {
    const wasReplacing = this.next === stream && this.stream !== null;
    if (this.stream === stream) this.stream = null;
    if (this.next === stream) this.next = null;
    if (!this.runs.size) return;

    if (status >= 400 && status < 500 && !TEMPORARY.includes(status)) {
      for (const id of stream.tickets.keys()) {
        const data = { execution_id: id, type: "Refused", status, message, last: null };
        this.receive("failure", data, stream);
      }
    } else if (message) {
      this.say(stream, message === UNREACHABLE_MESSAGE ? `${message} Trying again.` : message);
      this.plan(retry * 2 ** Math.min(this.failures++, 3));
    } else {
      if (!stream.live) this.say(stream, FULL_MESSAGE, (run) => run.view.state !== "running");
      if (wasReplacing) { // its place may be the one that this page holds already
        this.stream?.controller.abort();
        this.stream = null;
        retry = Math.min(retry, 4_000);
      }
      this.plan(retry);
    }
  }

  /**
   * Show why there is nothing to show.
   *
   * @param {Stream} stream
   * @param {string} message
   * @param {(run: Run) => boolean} concerns
   */
  say(stream, message, concerns = () => true) {
    for (const run of this.runs.values())
      if (stream.tickets.has(run.id) && !this.stream?.tickets.has(run.id) && concerns(run))
        run.update({ state: "waiting", message });
  }

  /** @param {string} kind @param {any} data @param {Stream} stream */
  receive(kind, data, stream) {
    const { execution_id: id, message, progress, succeeded } = data;
    const run = this.runs.get(id), ticket = stream.tickets.get(id) ?? null;
    if (kind === "complete" || kind === "failure") stream.tickets.delete(id);
    if (!run) return; // it was left
    if (kind === "waiting") return run.update({ state: "waiting", message });
    if (kind !== "failure") run.renewed = false;

    if (kind === "snapshot") run.update({ state: "running", progress, nodes: all(data) });
    if (kind === "resumed") run.update({ state: "running" });
    if (kind === "node") {
      const { execution_id: _, progress, ...node } = data;
      run.update({ progress, nodes: new Map(run.view.nodes).set(node.name, node) });
    }
    if (kind === "complete")
      this.end(run, { state: "complete", progress: 1, succeeded, nodes: all(data) });
    if (kind === "failure") {
      const { type, status, last } = data;
      if (type === "Refused" && [401, 403].includes(status) && run.access.renew && !run.renewed) {
        run.renewed = true;
        run.access.replace(ticket).then(() => this.plan(0));
        return;
      }
      this.end(run, { state: "failed", message, nodes: last ? all(last) : run.view.nodes });
    }
  }

  /** @param {Run} run @param {Partial<View>} changes */
  end(run, changes) {
    this.runs.delete(run.id);
    run.update(changes);
    if (!this.runs.size) this.pause();
  }
}

/** @type {Map<string, Page>} */
const pages = new Map();

/** @param {string} base */
function pageOf(base) {
  let page = pages.get(base);
  if (!page) pages.set(base, (page = new Page(base)));
  return page;
}

/** @param {any} data @returns {Map<string, Node>} */
function all(data) {
  return new Map(Object.entries(data.nodes));
}

/**
 * Yield the events of a stream, and how long to wait after each.
 *
 * @param {ReadableStream<Uint8Array>} body
 * @param {AbortController} controller  closes a stream that is silent for too long
 * @returns {AsyncGenerator<{kind: string, data: any, delay: number}>}
 */
async function* events(body, controller) {
  const reader = body.getReader(), decoder = new TextDecoder();
  const die = () => controller.abort();
  /** @type {string[]} */
  let pieces = [];
  let timer = setTimeout(die, DEAD);
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      clearTimeout(timer);
      timer = setTimeout(die, DEAD);
      const piece = decoder.decode(value, { stream: true });
      pieces.push(piece);
      if (!piece.includes("\n")) continue; // a large event comes in many pieces
      const blocks = pieces.join("").split("\n\n");
      pieces = blocks.splice(-1);
      for (const block of blocks) {
        const fields = new Map(block.split("\n").map((line) => {
          const [name] = line.split(": ", 1);
          return [name, line.slice(name.length + 2)];
        }));
        const data = fields.get("data"), delay = Number(fields.get("retry") ?? 0);
        yield { kind: fields.get("event") ?? "", data: data && JSON.parse(data), delay };
      }
    }
  } finally {
    clearTimeout(timer);
    reader.cancel().catch(() => {});
  }
}

/** @param {Response | null} response */
async function problem(response) {
  const { detail, title } = (await response?.json().catch(() => null)) ?? {};
  return /** @type {string} */ (detail ?? title ?? UNREACHABLE_MESSAGE);
}
