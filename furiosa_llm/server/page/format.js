/** Figures as people read them. */

const UNITS = ["B", "kB", "MB", "GB", "TB", "PB"];
const WHOLE = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const NO_BREAK = "\u00a0";

/**
 * Bytes with three digits at most before the unit: 135 MB, 2.05 GB.
 *
 * @param {number} nbytes
 * @returns {string}
 */
export function bytes(nbytes) {
  let [value, unit] = [nbytes, 0];
  // 999.5 would be written as 1000.
  while (value >= 999.5 && unit < UNITS.length - 1) {
    value /= 1000;
    unit += 1;
  }
  return `${digits(value, unit === 0 ? 0 : 2)}${NO_BREAK}${UNITS[unit]}`;
}

/**
 * Something per second, without a unit: 0, 0.4, 7.3, 1,250.
 *
 * @param {number} perSecond
 * @returns {string}
 */
export function rate(perSecond) {
  return perSecond < 99.95 ? digits(perSecond, 1) : WHOLE.format(perSecond);
}

/**
 * @param {number} number
 * @returns {string}
 */
export function count(number) {
  return WHOLE.format(number);
}

/**
 * A share of one: 0 %, <1 %, 37 %.
 *
 * @param {number} share
 * @returns {string}
 */
export function percent(share) {
  if (share > 0 && share < 0.005) return `<1${NO_BREAK}%`;
  return `${WHOLE.format(share * 100)}${NO_BREAK}%`;
}

/**
 * A time span in its two largest units: 3 d 4 h, 12 min 3 s, 0.42 s.
 *
 * @param {number} seconds
 * @returns {string}
 */
export function duration(seconds) {
  if (seconds < 9.995) return `${digits(seconds, 2)}${NO_BREAK}s`;
  const whole = Math.round(seconds);
  const parts = [
    [Math.floor(whole / 86400), "d"],
    [Math.floor(whole / 3600) % 24, "h"],
    [Math.floor(whole / 60) % 60, "min"],
    [whole % 60, "s"],
  ];
  const first = parts.findIndex(([value]) => value !== 0);
  const shown = parts.slice(first, first + 2).filter(([value]) => value !== 0);
  return shown.map(([value, unit]) => `${value}${NO_BREAK}${unit}`).join(" ");
}

/**
 * With fewer decimals the greater the number is, and none that are zero.
 *
 * @param {number} value
 * @param {number} decimals
 * @returns {string}
 */
function digits(value, decimals) {
  const before = value < 9.995 ? 1 : value < 99.95 ? 2 : 3;
  return String(Number(value.toFixed(Math.max(0, Math.min(decimals, 3 - before)))));
}
