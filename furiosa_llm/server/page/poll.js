/** Asks for the machine's state each second: not while nobody looks, and less often while nobody answers. */

import { AnswerError, request } from "./api.js";

const PERIOD = 1000;
const LONGEST = 15000;
const TIMEOUT = 10000;

/**
 * @typedef {object} Listener
 * @property {(machine: import("./rates.js").Machine) => void} show  A snapshot came.
 * @property {(reason: string, seconds: number) => void} gone  None came; the next try is in so many seconds.
 * @property {() => void} refused  The key is missing or wrong; nothing is asked until `start` is called.
 */

/**
 * Milliseconds to wait behind so many failures in a row.
 *
 * @param {number} failures
 * @returns {number}
 */
export function pause(failures) {
  return failures === 0 ? PERIOD : Math.min(LONGEST, PERIOD * 2 ** (failures - 1));
}

/** One question at a time, the next one a while behind the answer. */
export class Poll {
  /** @param {Listener} listener */
  constructor(listener) {
    this.listener = listener;
    this.failures = 0;
    this.asking = false;
    this.wanted = false;
    /** @type {ReturnType<typeof setTimeout> | undefined} */
    this.timer = undefined;
    document.addEventListener("visibilitychange", () => {
      if (this.wanted) this.start();
    });
  }

  /** Asks now, and from now on. */
  start() {
    this.wanted = true;
    clearTimeout(this.timer);
    if (!document.hidden && !this.asking) void this.ask();
  }

  async ask() {
    this.asking = true;
    this.wanted = true;
    try {
      const response = await request("machine", undefined, AbortSignal.timeout(TIMEOUT));
      this.listener.show(await response.json());
      this.failures = 0;
    } catch (error) {
      this.failed(error);
    }
    this.asking = false;
    if (this.wanted && !document.hidden) this.timer = setTimeout(() => this.start(), pause(this.failures));
  }

  /** @param {unknown} error */
  failed(error) {
    if (error instanceof AnswerError && error.status === 401) {
      this.wanted = false;
      this.listener.refused();
      return;
    }
    this.failures += 1;
    const reason = error instanceof AnswerError ? error.message : "the server does not answer";
    this.listener.gone(reason, pause(this.failures) / 1000);
  }
}
