/** The replicas: what each has to do, and how busy its stages are with computing and with collectives. */

import { element, setText } from "./dom.js";
import { bytes, count, percent, rate } from "./format.js";
import { stageKey } from "./rates.js";

const HUES = [250, 55, 310, 140, 15, 95, 345, 280];

/**
 * Gives an element the colour of a stage: the hue is the replica's, the shade the stage's. A label always says both.
 *
 * @param {HTMLElement} where
 * @param {number} replica
 * @param {number} stage
 * @param {number} numStages
 */
export function colour(where, replica, stage, numStages) {
  where.style.setProperty("--hue", String(HUES[replica % HUES.length]));
  where.style.setProperty("--shade", String(numStages > 1 ? stage / (numStages - 1) : 0));
}

/** A share as a bar with its number. */
class Meter {
  /** @param {string} name */
  constructor(name) {
    this.fill = element("span", { class: "fill" });
    this.text = element("span", { class: "share" }, "–");
    this.root = element(
      "div",
      { class: "meter" },
      element("span", { class: "label" }, name),
      element("span", { class: "track", "aria-hidden": "true" }, this.fill),
      this.text,
    );
  }

  /**
   * @param {number} share
   * @param {string} [text]
   */
  show(share, text = percent(share)) {
    this.fill.style.width = `${Math.min(100, share * 100).toFixed(1)}%`;
    setText(this.text, text);
  }
}

/** One stage of one replica. */
class StageBox {
  /**
   * @param {import("./rates.js").Stage} stage
   * @param {number} numStages
   * @param {string[]} kinds
   */
  constructor(stage, numStages, kinds) {
    this.busy = new Meter("busy");
    this.exchange = new Meter("exchanging");
    this.batches = element("span", { class: "batches" });
    this.traffic = new Map(kinds.map((kind) => [kind, [element("dd", {}, "–"), element("dd", {})]]));
    const last = stage.first_block + stage.num_blocks - 1;
    this.root = element(
      "li",
      { class: "stage" },
      element(
        "div",
        { class: "title" },
        element("span", { class: "chip" }, `R${stage.replica} S${stage.stage}`),
        element("span", {}, stage.num_blocks === 1 ? `block ${last}` : `blocks ${stage.first_block}–${last}`),
        this.batches,
      ),
      this.busy.root,
      this.exchange.root,
      element("dl", { class: "traffic" }, ...[...this.traffic].map(([kind, values]) => row(kind, values))),
    );
    colour(this.root, stage.replica, stage.stage, numStages);
  }

  /** @param {import("./rates.js").StageRates | undefined} rates */
  show(rates) {
    if (rates === undefined) return;
    this.busy.show(rates.busy);
    this.exchange.show(rates.exchange);
    setText(this.batches, `${rate(rates.batches)} batches/s`);
    for (const [kind, [nbytes, calls]] of this.traffic) {
      const traffic = rates.traffic.get(kind);
      if (traffic === undefined) continue;
      setText(nbytes, `${bytes(traffic.nbytes)}/s`);
      setText(calls, `${rate(traffic.calls)}×/s`);
    }
  }
}

/** One replica with its stages. */
class ReplicaPanel {
  /**
   * @param {import("./rates.js").Replica} replica
   * @param {StageBox[]} stages
   */
  constructor(replica, stages) {
    this.state = element("span", { class: "lamp" });
    this.running = element("span", {});
    this.pages = new Meter("KV pages");
    const title = element("h4", {}, `Replica ${replica.replica}`);
    this.root = element(
      "section",
      { class: "panel replica", "aria-label": `Replica ${replica.replica}` },
      element("div", { class: "head" }, title, this.state, this.running),
      this.pages.root,
      element("ol", { class: "stages", "aria-label": "Stages" }, ...stages.map((stage) => stage.root)),
    );
    colour(this.root, replica.replica, 0, 1);
    this.show(replica);
  }

  /** @param {import("./rates.js").Replica} replica */
  show(replica) {
    const state = !replica.alive ? "dead" : replica.ready ? "ready" : "starting";
    this.state.dataset.state = state;
    setText(this.state, state);
    setText(this.running, `${count(replica.running)} running, ${count(replica.waiting)} waiting`);
    this.pages.root.hidden = replica.num_pages === 0;
    const share = replica.num_pages === 0 ? 0 : replica.used_pages / replica.num_pages;
    this.pages.show(share, `${count(replica.used_pages)} of ${count(replica.num_pages)}`);
  }
}

/** All of them. */
export class Replicas {
  /** @param {HTMLElement} root */
  constructor(root) {
    this.root = root;
    this.shape = "";
    /** @type {Map<number, ReplicaPanel>} */
    this.panels = new Map();
    /** @type {Map<string, StageBox>} */
    this.boxes = new Map();
  }

  /**
   * @param {import("./rates.js").Machine} machine
   * @param {import("./rates.js").Rates | null} rates
   */
  show(machine, rates) {
    const shape = JSON.stringify([
      machine.replicas.map((replica) => replica.replica),
      machine.stages.map((stage) => [stageKey(stage), stage.first_block, stage.num_blocks]),
      machine.collectives.map((collective) => [stageKey(collective), collective.kind]),
    ]);
    if (shape !== this.shape) this.build(machine);
    this.shape = shape;
    for (const replica of machine.replicas) this.panels.get(replica.replica)?.show(replica);
    for (const [key, box] of this.boxes) box.show(rates?.stages.get(key));
  }

  /** @param {import("./rates.js").Machine} machine */
  build(machine) {
    const numStages = 1 + Math.max(0, ...machine.stages.map((stage) => stage.stage));
    this.boxes = new Map(
      machine.stages.map((stage) => {
        const here = machine.collectives.filter((collective) => stageKey(collective) === stageKey(stage));
        const kinds = [...new Set(here.map((collective) => collective.kind))];
        return [stageKey(stage), new StageBox(stage, numStages, kinds)];
      }),
    );
    this.panels = new Map(
      machine.replicas.map((replica) => {
        const own = machine.stages.filter((stage) => stage.replica === replica.replica);
        const boxes = own.flatMap((stage) => this.boxes.get(stageKey(stage)) ?? []);
        return [replica.replica, new ReplicaPanel(replica, boxes)];
      }),
    );
    this.root.replaceChildren(...[...this.panels.values()].map((panel) => panel.root));
  }
}

/**
 * @param {string} name
 * @param {HTMLElement[]} values
 * @returns {HTMLElement}
 */
function row(name, values) {
  return element("div", {}, element("dt", {}, name), ...values);
}
