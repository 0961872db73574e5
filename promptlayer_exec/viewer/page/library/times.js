// @ts-check
// Durations, moments and counts as text.

// "1 item", "2,000 items".
export const counted = (count, noun) => `${count.toLocaleString("en")} ${noun}${count === 1 ? "" : "s"}`;

// In a sentence, tenths from ten seconds on are noise.
export function duration(seconds, isRough = false) {
  if (seconds >= 0 && seconds < 0.05) return "<0.1 s"; // "0.0 s" reads as if it had not run
  if (isRough && seconds >= 9.95 && seconds < 59.5) return `${Math.round(seconds)} s`;
  if (seconds < 59.95) return `${seconds.toFixed(1)} s`;
  const whole = Math.round(seconds);
  const minutes = Math.floor(whole / 60);
  const pad = (value) => String(value).padStart(2, "0");
  if (minutes < 60) return `${minutes} min ${pad(whole % 60)} s`;
  return `${Math.floor(minutes / 60)} h ${pad(minutes % 60)} min`;
}

// The same text, in which no line breaks between a number and its unit.
export const unbroken = (text) => text.replace(/(\d) (?=(?:s|min|h)\b)/g, "$1\u00a0").replace(/(min|h) (?=\d)/g, "$1\u00a0");

const CLOCK = new Intl.DateTimeFormat(undefined, { timeStyle: "medium" });
const SHORT = new Intl.DateTimeFormat(undefined, { timeStyle: "short" });
const HOUR = new Intl.DateTimeFormat(undefined, { hour: "numeric" });
const DAY = new Intl.DateTimeFormat(undefined, { day: "numeric", month: "short" });
const WHOLE = new Intl.DateTimeFormat(undefined, { dateStyle: "full", timeStyle: "long" });

const date = (moment) => new Date(moment * 1000);

// The time of day, or for another day, the day and the minute.
export function clock(moment) {
  const isToday = date(moment).toDateString() === new Date().toDateString();
  if (isToday) return CLOCK.format(date(moment));
  return `${DAY.format(date(moment))}, ${SHORT.format(date(moment))}`;
}

// The label of a whole hour on an axis: midnight is the day.
export const hourOf = (moment) => (date(moment).getHours() === 0 ? DAY : HOUR).format(date(moment));

export const fully = (moment) => WHOLE.format(date(moment));
// For somebody elsewhere: "2026-12-02 08:53 UTC".
export const universal = (moment) => `${machine(moment).slice(0, 16).replace("T", " ")} UTC`;
export const machine = (moment) => date(moment).toISOString();

/** @type {[Intl.RelativeTimeFormatUnit, number][]} */
const UNITS = [
  ["day", 86_400],
  ["hour", 3600],
  ["minute", 60],
];
const RELATIVE = new Intl.RelativeTimeFormat("en", { numeric: "always" });

export function ago(moment) {
  const seconds = Math.max(0, Date.now() / 1000 - moment);
  for (const [unit, length] of UNITS) {
    if (seconds >= length) return RELATIVE.format(-Math.floor(seconds / length), unit);
  }
  return "just now";
}

// "12:03:10 (2 min 05 s)".
export function sinceText(moment) {
  return `${clock(moment)} (${duration(Math.max(0, Date.now() / 1000 - moment))})`;
}

// The positions of at most six labels on an axis of some seconds.
export function ticks(seconds) {
  const steps = [0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200];
  const step = steps.find((one) => seconds / one <= 5) ?? Math.ceil(seconds / 18_000) * 3600;
  const found = [];
  // None at the right edge, because its label would not fit.
  for (let at = 0; at <= seconds * 0.92; at += step) found.push(Number(at.toFixed(3)));
  return found;
}

export function tickLabel(seconds) {
  if (seconds < 60) return `${Number(seconds.toFixed(1))} s`;
  if (seconds < 3600) return `${Number((seconds / 60).toFixed(1))} min`;
  return `${Number((seconds / 3600).toFixed(1))} h`;
}
