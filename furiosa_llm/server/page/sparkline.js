/** A small line of what a rate was in the last minutes. */

import { drawing } from "./dom.js";

const WIDTH = 240;
const HEIGHT = 40;

/**
 * The corners of the line, the newest point at the right edge, the peak at the top.
 *
 * @param {{time: number, value: number}[]} points
 * @param {number} seconds  What the whole width stands for.
 * @param {number} peak
 * @returns {string}
 */
export function corners(points, seconds, peak) {
  const newest = points.at(-1);
  if (newest === undefined) return "";
  return points
    .map(({ time, value }) => {
      const x = WIDTH * (1 - (newest.time - time) / seconds);
      const y = peak > 0 ? HEIGHT - 1 - (HEIGHT - 2) * (value / peak) : HEIGHT - 1;
      return `${x.toFixed(1)},${y.toFixed(1)}`;
    })
    .join(" ");
}

/** The drawing; what it shows is said in words by whoever owns it. */
export class Sparkline {
  constructor() {
    this.area = drawing("polygon", { class: "area" });
    this.line = drawing("polyline", { class: "line" });
    this.svg = drawing(
      "svg",
      { class: "spark", viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", "aria-hidden": "true" },
      this.area,
      this.line,
    );
  }

  /** @param {import("./rates.js").History} history */
  show(history) {
    const line = corners(history.points, history.seconds, history.peak);
    const [first] = line.split(",");
    this.line.setAttribute("points", line);
    this.area.setAttribute("points", line && `${first},${HEIGHT} ${line} ${WIDTH},${HEIGHT}`);
  }
}
