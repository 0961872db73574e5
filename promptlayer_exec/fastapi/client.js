/**
 * Starts and follows executions by the routes of `promptlayer_exec.fastapi.create_router`, which
 * serve this module at `executions/client.js`.
 *
 * @typedef {object} Node  with `value` and the error messages only if the app shows them
 * @property {string} name
 * @property {string} status  "QUEUED", "RUNNING", "SUCCESS", "FAILED", "SKIPPED", or a new one
 * @property {*} [value]
 * @property {?string} [error_message]
 * @property {*} [raw_error_message]
 * @property {?boolean} is_output_node
 * @property {?number} running  seconds from the first poll to when it was first seen running
 * @property {?number} final  the same, for its final status
 *
 * @typedef {object} View  what is known of an execution
 * @property {"connecting"|"waiting"|"running"|"complete"|"failed"} state  "failed": it could not
 *   be followed to its end; an execution with failed nodes is "complete", and has not succeeded
 * @property {?string} message  why it waits, or could not be followed
 * @property {number} progress  0 to 1
 * @property {?boolean} succeeded  null until it is complete
 * @property {Map<string, Node>} nodes
 *
 * @typedef {object} Options
 * @property {?string} [ticket]  the execution's ticket, from `start`
 * @property {() => Promise<string>} [renew]  returns a new ticket; called when one is refused
 * @property {string} [base]  the URL of the route `executions`, if this module is served elsewhere
 */

const BASE = new URL(".", import.meta.url).href.replace(/\/$/, "");
const TEMPORARY = [408, 425, 429]; // besides each 5xx, which may be a proxy's

/**
 * Start a run. If this fails, the run may have started all the same.
 *
 * @param {string} workflow
 * @param {Record<string, *>} [inputs]
 * @param {{base?: string, headers?: Record<string, string>}} [options]
 * @returns {Promise<{execution_id: string, ticket?: string, warning?: string}>}
 */
export async function start(workflow, inputs = {}, { base = BASE, headers = {} } = {}) {
  const response = await fetch(base, {
    method: "POST",
    headers: { "Content-Type": "application/json", ...headers },
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
  /** @type {View} */
  let view = { state: "connecting", message: null, progress: 0, succeeded: null, nodes: new Map() };
  /** @type {?EventSource} */
  let source = null;
  let timer = 0, failures = 0, renewed = false, stopped = false;
  const stop = () => (stopped = true, clearTimeout(timer), source?.close());
  /** @param {Partial<View>} changes */
  const update = (changes) => {
    view = { ...view, message: null, ...changes };
    if (!stopped) show(view);
  };
  /** @param {Partial<View>} changes */
  const end = (changes) => (update(changes), stop());
  /** @param {*} data @returns {Map<string, Node>} */
  const all = (data) => new Map(Object.entries(data.nodes));
  /** @type {Record<string, (data: any) => void>} */
  const events = {
    waiting: ({ message }) => update({ state: "waiting", message }),
    snapshot: (data) => update({ state: "running", progress: data.progress, nodes: all(data) }),
    node: ({ execution_id, progress, ...node }) =>
      update({ progress, nodes: new Map(view.nodes).set(node.name, node) }),
    complete: ({ succeeded, ...data }) =>
      end({ state: "complete", progress: 1, succeeded, nodes: all(data) }),
    failure: ({ message, last }) =>
      end({ state: "failed", message, nodes: last ? all(last) : view.nodes }),
  };
  const connect = () => {
    const query = ticket ? `?ticket=${encodeURIComponent(ticket)}` : "";
    source = new EventSource(`${base}/${encodeURIComponent(executionId)}/events${query}`);
    source.onopen = () => void (failures = 0, renewed = false);
    // It reconnects by itself, unless the answer was an error.
    source.onerror = () => source?.readyState === EventSource.CLOSED && recover(source.url);
    for (const [kind, receive] of Object.entries(events))
      source.addEventListener(kind, (event) => receive(JSON.parse(event.data)));
  };
  /** @param {string} url */
  const recover = async (url) => {
    const response = await fetch(url).catch(() => null); // an EventSource hides what was wrong
    const message = response?.ok ? null : await problem(response), status = response?.status ?? 503;
    response?.body?.cancel().catch(() => {});
    if (stopped) return;
    if ((status === 401 || status === 403) && renew && !renewed) {
      renewed = true;
      ticket = await renew().catch(() => ticket);
      if (!stopped) connect();
    } else if (status >= 400 && status < 500 && !TEMPORARY.includes(status)) {
      end({ state: "failed", message });
    } else {
      if (message) update({ state: "waiting", message });
      timer = setTimeout(connect, (1 + 3 * Math.random()) * 1000 * 2 ** Math.min(failures++, 3));
    }
  };
  connect();
  return stop;
}

/** @param {?Response} response */
async function problem(response) {
  const { detail, title } = (await response?.json().catch(() => null)) ?? {};
  return detail ?? title ?? "The server could not be reached.";
}
