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
export type Node = {
    name: string;
    /**
     * "QUEUED", "RUNNING", "SUCCESS", "FAILED", "SKIPPED", or a new one
     */
    status: string;
    value?: any;
    error_message?: string | null;
    raw_error_message?: any;
    is_output_node: boolean | null;
    /**
     * seconds from the first poll to when it was first seen running
     */
    running: number | null;
    /**
     * the same, for its final status
     */
    final: number | null;
};
export type View = {
    /**
     * "waiting": there
     * is nothing new for now, and the rest is what was last known. "failed": it could not be followed
     * to its end. An execution with failed nodes is "complete", and has not succeeded
     */
    state: "connecting" | "waiting" | "running" | "complete" | "failed";
    /**
     * why it waits, or could not be followed
     */
    message: string | null;
    /**
     * 0 to 1
     */
    progress: number;
    /**
     * null until it is complete
     */
    succeeded: boolean | null;
    nodes: ReadonlyMap<string, Node>;
};
export type Options = {
    /**
     * for reading the executions. One can cover many
     */
    ticket?: string | null | undefined;
    /**
     * returns a new ticket after a refusal
     */
    renew?: (() => Promise<string>) | undefined;
    /**
     * the URL of the route `executions`, if it is not beside this
     * module
     */
    base?: string | undefined;
};
/**
 * The view of an execution before its first event.
 *
 * @type {View}
 */
export declare const UNSEEN: View;
/**
 * Start a run. If this fails, the run may still have started. With a `key`, such as the id of an
 * order, call it again to get the same run. The app's session needs `starts=`.
 *
 * @param {string} workflow
 * @param {Record<string, any>} [inputs]
 * @param {{base?: string, headers?: Record<string, string>, key?: string | null}} [options]
 * @returns {Promise<{execution_id: string, ticket?: string, warning?: string}>}
 */
export declare function start(workflow: string, inputs?: Record<string, any>, { base, headers, key }?: {
    base?: string;
    headers?: Record<string, string>;
    key?: string | null;
}): Promise<{
    execution_id: string;
    ticket?: string;
    warning?: string;
}>;
/**
 * Follow an execution until it is complete, through lost connections and restarts of servers.
 *
 * @param {string} executionId
 * @param {(view: View) => void} show  called at each change
 * @param {Options} [options]
 * @returns {() => void} a function that stops following
 */
export declare function follow(executionId: string, show: (view: View) => void, { ticket, renew, base }?: Options): () => void;
/**
 * Follow many executions. One ticket can cover all of them.
 *
 * @param {Iterable<string>} executionIds
 * @param {(view: View, executionId: string) => void} show  called at each change of one
 * @param {Options} [options]
 * @returns {() => void} a function that stops following
 */
export declare function followAll(executionIds: Iterable<string>, show: (view: View, executionId: string) => void, { ticket, renew, base }?: Options): () => void;
