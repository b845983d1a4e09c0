/** The cards with their PEs: what each PE is, and what lies in its memory. */

import { element, setText } from "./dom.js";
import { bytes } from "./format.js";
import { colour } from "./replicas.js";

/** @typedef {import("./rates.js").PE} PE */

const PARTS = /** @type {const} */ (["weights", "kv-used", "kv-room", "free"]);

/**
 * What the memory of a PE is divided into; free is what is left, never negative.
 *
 * @param {PE} pe
 * @returns {Record<typeof PARTS[number], number>}
 */
export function memoryParts(pe) {
  const used = Math.min(pe.kv_used_nbytes, pe.kv_nbytes);
  return {
    weights: pe.weights_nbytes,
    "kv-used": used,
    "kv-room": pe.kv_nbytes - used,
    free: Math.max(0, pe.memory_nbytes - pe.weights_nbytes - pe.kv_nbytes),
  };
}

/**
 * All that is known of a PE, in words.
 *
 * @param {number} npu
 * @param {PE} pe
 * @returns {string}
 */
export function describe(npu, pe) {
  const name = `npu:${npu} PE ${pe.pe}`;
  if (pe.replica === null) return `${name}: not used`;
  const { free } = memoryParts(pe);
  const where = pe.host ? ` on ${pe.host}` : "";
  return (
    `${name}${where}: replica ${pe.replica}, stage ${pe.stage}, rank ${pe.rank}; ` +
    `weights ${bytes(pe.weights_nbytes)}, KV ${bytes(pe.kv_used_nbytes)} used of ${bytes(pe.kv_nbytes)}, ` +
    `free ${bytes(free)} of ${bytes(pe.memory_nbytes)}`
  );
}

/** One PE. */
class Tile {
  /**
   * @param {number} npu
   * @param {PE} pe
   * @param {number} numStages
   */
  constructor(npu, pe, numStages) {
    this.npu = npu;
    this.pe = pe;
    this.label = element("span", { class: "what" });
    this.taken = element("span", {});
    this.whole = element("span", { class: "whole" });
    this.bars = PARTS.map((part) => element("span", { class: part }));
    this.root = element(
      "div",
      { class: "pe", role: "option", tabindex: -1, "aria-selected": "false" },
      element("span", { class: "number" }, `PE ${pe.pe}`),
      this.label,
      element("span", { class: "bar" }, ...this.bars),
      element("span", { class: "amount" }, this.taken, " ", this.whole),
    );
    if (pe.replica === null || pe.stage === null) {
      this.root.classList.add("unused");
      setText(this.label, "unused");
    } else {
      colour(this.root, pe.replica, pe.stage, numStages);
      setText(this.label, `R${pe.replica} S${pe.stage} r${pe.rank}`);
    }
    this.show(pe);
  }

  /** @param {PE} pe */
  show(pe) {
    this.pe = pe;
    const parts = memoryParts(pe);
    for (const [index, part] of PARTS.entries()) {
      this.bars[index].style.flexGrow = String(parts[part] / (pe.memory_nbytes || 1));
      this.bars[index].hidden = parts[part] === 0;
    }
    setText(this.taken, pe.replica === null ? "–" : bytes(pe.weights_nbytes + pe.kv_nbytes));
    setText(this.whole, pe.replica === null ? "" : `/ ${bytes(pe.memory_nbytes)}`);
    const words = describe(this.npu, pe);
    if (this.root.getAttribute("aria-label") !== words) this.root.setAttribute("aria-label", words);
  }
}

/** All cards, as a list in which one PE is chosen with the arrow keys. */
export class Rack {
  /**
   * @param {HTMLElement} root
   * @param {HTMLElement} readout
   */
  constructor(root, readout) {
    this.root = root;
    this.readout = readout;
    this.shape = "";
    /** @type {Tile[]} */
    this.tiles = [];
    /** @type {Tile | undefined} */
    this.chosen = undefined;
    root.addEventListener("keydown", (event) => this.onKey(event));
    root.addEventListener("click", (event) => this.choose(this.tileOf(event.target)));
    root.addEventListener("focusin", (event) => this.choose(this.tileOf(event.target)));
  }

  /** @param {import("./rates.js").Machine} machine */
  show(machine) {
    const shape = JSON.stringify(
      machine.cards.map((card) => [card.npu, card.pes.map((pe) => [pe.pe, pe.replica, pe.stage, pe.rank])]),
    );
    if (shape !== this.shape) this.build(machine);
    this.shape = shape;
    const pes = machine.cards.flatMap((card) => card.pes);
    for (const [index, tile] of this.tiles.entries()) tile.show(pes[index]);
    if (this.chosen !== undefined) setText(this.readout, describe(this.chosen.npu, this.chosen.pe));
  }

  /** @param {import("./rates.js").Machine} machine */
  build(machine) {
    const numStages = 1 + Math.max(0, ...machine.stages.map((stage) => stage.stage));
    this.chosen = undefined;
    this.tiles = [];
    const cards = machine.cards.map((card) => {
      const tiles = card.pes.map((pe) => new Tile(card.npu, pe, numStages));
      this.tiles.push(...tiles);
      const name = element("div", { class: "npu", "aria-hidden": "true" }, `npu:${card.npu}`);
      const row = element("div", { class: "pes", role: "presentation" }, ...tiles.map((tile) => tile.root));
      return element("div", { class: "card", role: "group", "aria-label": `npu:${card.npu}` }, name, row);
    });
    this.root.replaceChildren(...cards);
    this.tiles[0]?.root.setAttribute("tabindex", "0");
  }

  /**
   * @param {EventTarget | null} target
   * @returns {Tile | undefined}
   */
  tileOf(target) {
    return this.tiles.find((tile) => target instanceof Node && tile.root.contains(target));
  }

  /** @param {Tile | undefined} tile */
  choose(tile) {
    if (tile === undefined) return;
    this.chosen = tile;
    for (const one of this.tiles) {
      one.root.setAttribute("aria-selected", String(one === tile));
      one.root.setAttribute("tabindex", one === tile ? "0" : "-1");
      const together = tile.pe.replica !== null && one.pe.replica === tile.pe.replica && one.pe.stage === tile.pe.stage;
      one.root.classList.toggle("together", together);
    }
    setText(this.readout, describe(tile.npu, tile.pe));
  }

  /** @param {KeyboardEvent} event */
  onKey(event) {
    const at = this.tiles.findIndex((tile) => tile.root === document.activeElement);
    if (at < 0 || event.ctrlKey || event.altKey || event.metaKey) return;
    /** @type {Record<string, number>} */
    const next = {
      ArrowRight: at + 1,
      ArrowLeft: at - 1,
      ArrowDown: at + this.perRow(),
      ArrowUp: at - this.perRow(),
      Home: 0,
      End: this.tiles.length - 1,
    };
    const to = next[event.key];
    if (to === undefined) return;
    event.preventDefault();
    this.tiles[to]?.root.focus();
  }

  /**
   * How many tiles lie beside each other: it depends on the width of the screen.
   *
   * @returns {number}
   */
  perRow() {
    const top = this.tiles[0].root.offsetTop;
    const beside = this.tiles.findIndex((tile) => tile.root.offsetTop !== top);
    return beside < 0 ? this.tiles.length : beside;
  }
}
