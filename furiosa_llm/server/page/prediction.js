/** What the requests of the last minute had, beside what a device file predicted; hidden without one. */

import { byId, element, setText } from "./dom.js";
import { count, rate } from "./format.js";

/**
 * @typedef {{measured: number | null, predicted: number | null}} Pair
 *
 * @typedef {object} RecentLoad
 * @property {number} requests
 * @property {number} concurrency
 * @property {number} prompt_tokens
 * @property {number} generated_tokens
 * @property {Pair} ttft_ms
 * @property {Pair} tpot_ms
 * @property {Pair} tokens_per_second
 *
 * @typedef {{device: string, recent: RecentLoad | null}} Expected  The key `prediction` of `GET /machine`.
 */

/** @type {["ttft_ms" | "tpot_ms" | "tokens_per_second", string][]} */
const ROWS = [
  ["ttft_ms", "First token, ms"],
  ["tpot_ms", "Each further token, ms"],
  ["tokens_per_second", "Tokens per second"],
];
const NONE = "–";

/**
 * How far a prediction is off: +12 %, −3 %, 0 %; of nothing if one of both is not there.
 *
 * @param {Pair} pair
 * @returns {string}
 */
export function error({ measured, predicted }) {
  if (measured === null || predicted === null || measured === 0) return NONE;
  const percent = Math.round(100 * (predicted / measured - 1));
  return `${percent > 0 ? "+" : percent < 0 ? "−" : ""}${count(Math.abs(percent))}\u00a0%`;
}

/**
 * @param {RecentLoad} load
 * @returns {string}
 */
export function loadText({ requests, concurrency, prompt_tokens, generated_tokens }) {
  const ended = `${count(requests)} ${requests === 1 ? "request" : "requests"} of the last minute`;
  return `${ended}, ${rate(concurrency)} at once; ${count(prompt_tokens)} tokens in, ${count(generated_tokens)} out`;
}

/** A table of three figures. */
export class Prediction {
  /** @param {HTMLElement} panel */
  constructor(panel) {
    this.panel = panel;
    this.device = byId("prediction-device", HTMLElement);
    this.load = byId("prediction-load", HTMLElement);
    this.table = byId("prediction-table", HTMLElement);
    this.cells = new Map(ROWS.map(([name]) => [name, [0, 1, 2].map(() => element("td"))]));
    const head = ["", "Measured", "Predicted", "Off by"].map((text) =>
      text === "" ? element("td") : element("th", { scope: "col" }, text),
    );
    this.table.append(
      element("thead", {}, element("tr", {}, ...head)),
      element(
        "tbody",
        {},
        ...ROWS.map(([name, text]) =>
          element("tr", {}, element("th", { scope: "row" }, text), ...(this.cells.get(name) ?? [])),
        ),
      ),
    );
  }

  /** @param {import("./rates.js").Machine} machine */
  show({ prediction }) {
    this.panel.hidden = !prediction;
    if (!prediction) return;
    const { device, recent } = prediction;
    setText(this.device, `by ${device}`);
    setText(this.load, recent === null ? "No request ended in the last minute." : loadText(recent));
    this.table.hidden = recent === null;
    if (recent === null) return;
    for (const [name] of ROWS) {
      const pair = recent[name];
      const shown = [pair.measured, pair.predicted].map((value) => (value === null ? NONE : rate(value)));
      for (const [number, cell] of (this.cells.get(name) ?? []).entries()) {
        setText(cell, [...shown, error(pair)][number]);
      }
    }
  }
}
