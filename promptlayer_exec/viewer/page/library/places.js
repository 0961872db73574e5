// @ts-check
// Where somebody was on each address that this tab has left, so that Back returns to that line.

import { find } from "./dom.js";

// By the number of an entry of the browser's history, which the entry itself carries.
const places = new Map();
const SETTLING = 1500; // milliseconds in which a view may still change its height by itself
let current = 0;
let latest = 0;

history.scrollRestoration = "manual"; // the browser would scroll before the lines are there

// Remembers the place on the address that is being left. Returns where somebody was on the
// address that is being shown, or null if it is a new one.
export function changePlace() {
  const focused = document.activeElement;
  const link = focused instanceof HTMLAnchorElement ? focused.getAttribute("href") : null;
  const top = link === null ? 0 : focused.getBoundingClientRect().top;
  places.set(current, { scroll: scrollY, focused, link, top });

  const known = history.state?.entry;
  if (known === undefined) {
    latest += 1;
    history.replaceState({ entry: latest }, "");
  }
  current = known ?? latest;
  latest = Math.max(latest, current); // a reload begins to count again
  return known === undefined ? null : (places.get(known) ?? null);
}

// Scrolls back, and focuses the link again. The link keeps its distance from the window's edge,
// even if lines above it have come or gone. Returns whether the link is still there.
export function returnTo({ scroll, focused, link, top }, view) {
  scrollTo(0, scroll);
  if (link === null) return false;
  const isThere = focused.isConnected && focused.getAttribute("href") === link;
  const target = isThere ? focused : find(`a[href="${CSS.escape(link)}"]`, view);
  if (target === null || !target.checkVisibility()) return false;

  target.focus({ preventScroll: true });
  settle(view, () => {
    if (target.isConnected) scrollBy(0, target.getBoundingClientRect().top - top);
  });
  return true;
}

// Lines have their true height only after drawing, and parts of a view arrive later than others.
// Aligns until then, or until somebody scrolls.
function settle(view, align) {
  align();
  const ended = new AbortController();
  const observer = new ResizeObserver(align);
  ended.signal.addEventListener("abort", () => observer.disconnect());
  for (const kind of ["wheel", "pointerdown", "keydown"]) {
    addEventListener(kind, () => ended.abort(), { passive: true, signal: ended.signal });
  }
  observer.observe(view);
  setTimeout(() => ended.abort(), SETTLING);
}
