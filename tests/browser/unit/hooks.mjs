// Lets node import the page's modules: they are modules, and one of them is made by the server.

import { register } from "node:module";

const STATUSES = `
const entry = (final) => ({ final, mark: "" });
export const STATUSES = new Map([["QUEUED", entry(false)], ["RUNNING", entry(false)],
  ["SUCCESS", entry(true)], ["FAILED", entry(true)], ["SKIPPED", entry(true)]]);
export const UNKNOWN = entry(false);`;

const hooks = `
export async function resolve(specifier, context, next) {
  if (specifier === "../statuses.js") {
    return { url: ${JSON.stringify(`data:text/javascript,${encodeURIComponent(STATUSES)}`)}, shortCircuit: true };
  }
  const found = await next(specifier, context);
  return found.url.includes("/viewer/page/") ? { ...found, format: "module" } : found;
}`;

register(`data:text/javascript,${encodeURIComponent(hooks)}`);

export const page = (name) => import(new URL(`../../../promptlayer_exec/viewer/page/${name}`, import.meta.url));
