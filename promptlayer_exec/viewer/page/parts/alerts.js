// @ts-check
// What shows the state of the tab: its icon, and a notification when a run finishes, if allowed.

import { byId } from "../library/dom.js";
import { groupOf, STATES } from "../library/model.js";
import { addressOf, go } from "../library/router.js";
import { tellingOf } from "../library/sentence.js";

const WANTED = "notify";

export function showIcon(runs) {
  const states = new Set(runs.map((run) => groupOf(run.data.state)));
  const state = ["failed", "lost", "running", "succeeded"].find((one) => states.has(one));
  const name = state === undefined || state === "lost" ? "favicon.svg" : `favicon-${state}.svg`;
  const icon = byId("favicon");
  if (icon.getAttribute("href") !== name) icon.setAttribute("href", name);
}

const isAllowed = () => Notification.permission === "granted";

export function notifyOfEnd(run) {
  if (!("Notification" in window) || !isAllowed() || localStorage.getItem(WANTED) !== "1") return;
  if (document.visibilityState === "visible" && document.hasFocus()) return;
  const [state] = STATES[run.data.state];
  const options = {
    body: tellingOf(run),
    tag: `execution-${run.id}`,
    icon: run.data.state === "lost" ? "favicon.svg" : `favicon-${run.data.state}.svg`,
  };
  const shown = new Notification(`${titleOf(run)}: ${state.toLowerCase()}`, options);
  shown.addEventListener("click", () => {
    window.focus();
    go(addressOf(["executions", run.id]));
    shown.close();
  });
}

const titleOf = (run) => (run.data.workflow === null ? run.name : `${run.name} ${run.id}`);

function showBell() {
  const bell = byId("bell");
  const isOn = isAllowed() && localStorage.getItem(WANTED) === "1";
  bell.hidden = false;
  bell.setAttribute("aria-pressed", String(isOn));
  bell.title = isOn
    ? "You get a notification when a run finishes, unless you are looking at this page"
    : "Show a notification when a run finishes";
  if (Notification.permission === "denied") {
    bell.title = "This browser does not allow notifications for this page";
    bell.disabled = true;
  }
}

if ("Notification" in window) {
  showBell();
  byId("bell").addEventListener("click", async () => {
    const isOn = byId("bell").getAttribute("aria-pressed") === "true";
    if (!isOn && !isAllowed()) await Notification.requestPermission();
    localStorage.setItem(WANTED, !isOn && isAllowed() ? "1" : "0");
    showBell();
  });
}
