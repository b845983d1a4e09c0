/** The figures on top: tokens per second, sequences, the KV cache, requests. */

import { element, setText } from "./dom.js";
import { bytes, count, percent, rate } from "./format.js";
import { History } from "./rates.js";
import { Sparkline } from "./sparkline.js";

const MINUTES = 3;

/** A rate with its line of the last minutes. */
class TokenFigure {
  /**
   * @param {HTMLElement} parent
   * @param {string} name
   * @param {string} kind
   */
  constructor(parent, name, kind) {
    this.history = new History(MINUTES * 60);
    this.sparkline = new Sparkline();
    this.value = element("span", { class: "value" }, "–");
    this.beside = element("span", { class: "beside" });
    parent.append(
      element(
        "div",
        { class: `figure wide ${kind}` },
        element("dt", {}, name),
        element("dd", {}, this.value, this.beside, this.sparkline.svg),
      ),
    );
  }

  /**
   * @param {number} time
   * @param {number | undefined} last  The rate of the last second, for the line.
   * @param {number | undefined} smooth  That of the last seconds, as the figure.
   */
  show(time, last, smooth) {
    if (last === undefined || smooth === undefined) return;
    this.history.push(time, last);
    setText(this.value, rate(smooth));
    setText(this.beside, `peak ${rate(this.history.peak)} in ${MINUTES} min`);
    this.sparkline.show(this.history);
  }
}

/** A value with a line of text beside it. */
class Figure {
  /**
   * @param {HTMLElement} parent
   * @param {string} name
   */
  constructor(parent, name) {
    this.value = element("span", { class: "value" }, "–");
    this.beside = element("span", { class: "beside" });
    parent.append(
      element("div", { class: "figure" }, element("dt", {}, name), element("dd", {}, this.value, this.beside)),
    );
  }

  /**
   * @param {string} value
   * @param {string} beside
   */
  show(value, beside) {
    setText(this.value, value);
    setText(this.beside, beside);
  }
}

/** All of them. */
export class Figures {
  /** @param {HTMLElement} list  A description list. */
  constructor(list) {
    this.generation = new TokenFigure(list, "Tokens generated per second", "generation");
    this.prompt = new TokenFigure(list, "Prompt tokens per second", "prompt");
    this.running = new Figure(list, "Running");
    this.waiting = new Figure(list, "Waiting");
    this.cache = new Figure(list, "KV cache");
    this.requests = new Figure(list, "Requests");
  }

  /**
   * @param {import("./rates.js").Machine} machine
   * @param {import("./rates.js").Rates | null} last
   * @param {import("./rates.js").Rates | null} smooth
   */
  show(machine, last, smooth) {
    this.generation.show(machine.time, last?.generation, smooth?.generation);
    this.prompt.show(machine.time, last?.prompt, smooth?.prompt);
    const ready = machine.replicas.filter((replica) => replica.alive && replica.ready).length;
    this.running.show(count(total(machine.replicas, "running")), `${ready} of ${machine.replicas.length} replicas ready`);
    this.waiting.show(count(total(machine.replicas, "waiting")), "sequences");
    const pes = machine.cards.flatMap((card) => card.pes);
    const [used, room] = [total(pes, "kv_used_nbytes"), total(pes, "kv_nbytes")];
    this.cache.show(room > 0 ? percent(used / room) : "none", room > 0 ? `${bytes(used)} of ${bytes(room)}` : "");
    const { received, succeeded, cancelled, failed } = machine.requests;
    this.requests.show(count(received), `${count(succeeded)} done, ${count(cancelled)} stopped, ${count(failed)} failed`);
  }
}

/**
 * @template {string} K
 * @param {Record<K, number>[]} of
 * @param {K} name
 * @returns {number}
 */
function total(of, name) {
  return of.reduce((sum, one) => sum + one[name], 0);
}
