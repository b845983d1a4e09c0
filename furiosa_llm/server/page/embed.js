/** The box in which an encoder compares two texts. */

import { request } from "./api.js";
import { sentence } from "./chat.js";
import { byId, element } from "./dom.js";
import { count } from "./format.js";

/**
 * The cosine of the angle between two vectors; 0 if one of them has no direction.
 *
 * @param {number[]} a
 * @param {number[]} b
 * @returns {number}
 */
export function cosine(a, b) {
  /** @type {(x: number[], y: number[]) => number} */
  const dot = (x, y) => x.reduce((sum, value, index) => sum + value * y[index], 0);
  const lengths = Math.sqrt(dot(a, a) * dot(b, b));
  return lengths === 0 ? 0 : dot(a, b) / lengths;
}

/** The box. */
export class Embed {
  /** @param {() => string} model  The model's name. */
  constructor(model) {
    this.model = model;
    this.texts = [byId("text-a", HTMLTextAreaElement), byId("text-b", HTMLTextAreaElement)];
    this.button = byId("compare", HTMLButtonElement);
    this.result = byId("similarity", HTMLElement);
    const form = byId("embed", HTMLFormElement);
    form.hidden = false;
    byId("talk-title", HTMLElement).textContent = "Similarity";
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      void this.compare();
    });
  }

  async compare() {
    if (this.result.getAttribute("aria-busy") === "true") return;
    this.result.setAttribute("aria-busy", "true");
    try {
      const response = await request("v1/embeddings", {
        model: this.model(),
        input: this.texts.map((text) => text.value),
      });
      const { data, usage } = await response.json();
      const [a, b] = data.map((/** @type {{embedding: number[]}} */ one) => one.embedding);
      const what = `cosine of two vectors of ${count(a.length)} numbers, from ${count(usage.prompt_tokens)} tokens`;
      this.result.replaceChildren(
        element("span", { class: "value" }, cosine(a, b).toFixed(3)),
        element("span", { class: "beside" }, what),
      );
    } catch (error) {
      this.result.replaceChildren(element("p", { class: "fault" }, sentence(error)));
    }
    this.result.setAttribute("aria-busy", "false");
  }
}
