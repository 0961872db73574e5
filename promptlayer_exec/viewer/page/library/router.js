// @ts-check
// The address of each view: `#/executions/787?node=Plan`. Reload, back and bookmarks work with it.

// Returns the path's parts and the parameters of the present address.
export function route() {
  const [path, query = ""] = location.hash.replace(/^#\/?/, "").split(/\?(.*)/s);
  const parts = path.split("/").filter((one) => one !== "");
  return { parts: parts.map(decode), params: new URLSearchParams(query) };
}

export function addressOf(parts, params = {}) {
  const query = params instanceof URLSearchParams ? params : new URLSearchParams();
  if (!(params instanceof URLSearchParams)) {
    for (const [name, value] of Object.entries(params)) {
      for (const one of [value].flat()) if (one) query.append(name, one);
    }
  }
  const text = query.toString();
  return `#/${parts.map(encodeURIComponent).join("/")}${text ? `?${text}` : ""}`;
}

// The page of the run of a batch's item, which then shows what the batch knows of it.
export function addressOfRun(batch, item, id) {
  return addressOf(["executions", id ?? ""], { batch, item });
}

// Of two executions, the one that succeeded is on the left. If both did, or none, it is the older one.
export function comparisonOf(one, other) {
  const isOlder = BigInt(one.id) < BigInt(other.id);
  const isFirst = one.hasSucceeded === other.hasSucceeded ? isOlder : one.hasSucceeded;
  return addressOf(["compare", ...(isFirst ? [one.id, other.id] : [other.id, one.id])]);
}

// The comparison with a success of the same workflow.
export function comparisonWith(success, run) {
  const { id, data } = run;
  return comparisonOf({ id: success, hasSucceeded: true }, { id, hasSucceeded: data.state === "succeeded" });
}

// The page of a cause.
export function causeAddress({ workflow, failed_node, cause }) {
  return addressOf(["cause"], { workflow, failed_node, cause });
}

export function go(address) {
  if (location.hash === address) dispatchEvent(new HashChangeEvent("hashchange"));
  else location.hash = address;
}

// Changes the address without a new entry of the browser's history.
export function replace(parts, params) {
  const address = addressOf(parts, params);
  if (location.hash !== address && !(location.hash === "" && address === "#/")) {
    history.replaceState(history.state, "", address === "#/" ? location.pathname : address);
  }
}

function decode(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}
