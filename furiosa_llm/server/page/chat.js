/** The box in which to talk to the model, or to let it complete a text if it has no chat template. */

import { errorMessage, request } from "./api.js";
import { byId, element, setText } from "./dom.js";
import { eventData } from "./events.js";
import { count, duration, rate } from "./format.js";
import { markdown } from "./markdown.js";

const COMPLETION_TOKENS = "64";

/** @typedef {{role: string, content: string}} Message */

/**
 * What one chunk of a stream adds.
 *
 * @param {any} chunk
 * @returns {{text: string, finish: string | null, tokens: number | null}}
 */
export function read(chunk) {
  const choice = chunk.choices[0];
  return {
    text: choice?.delta?.content ?? choice?.text ?? "",
    finish: choice?.finish_reason ?? null,
    tokens: chunk.usage?.completion_tokens ?? null,
  };
}

/** An answer while it comes. */
class Answer {
  /**
   * @param {string} who
   * @param {boolean} rich  Whether it is Markdown.
   */
  constructor(who, rich) {
    this.rich = rich;
    this.text = "";
    this.drawing = 0;
    this.note = element("p", { class: "note" });
    this.words = element("div", { class: rich ? "rich" : "plain" });
    this.body = element("div", { class: "text" }, this.words);
    this.root = element("article", { class: "said model" }, element("h3", {}, who), this.body, this.note);
    this.started = performance.now();
    this.first = 0;
    this.last = 0;
    this.tokens = 0;
    /** @type {string | null} */
    this.finish = null;
  }

  /** @param {string} data  An event of the stream. */
  take(data) {
    const chunk = JSON.parse(data);
    const message = errorMessage(chunk);
    if (message !== null) throw new Error(message);
    const { text, finish, tokens } = read(chunk);
    if (text !== "") {
      this.last = performance.now();
      this.first ||= this.last;
      this.text += text;
      this.drawing ||= requestAnimationFrame(() => this.draw());
    }
    this.finish = finish ?? this.finish;
    this.tokens = tokens ?? this.tokens;
  }

  /** Shows what there is of it. */
  draw() {
    cancelAnimationFrame(this.drawing);
    this.drawing = 0;
    if (this.rich) this.words.replaceChildren(markdown(this.text));
    else setText(this.words, this.text);
  }

  /** Says how it went, once it has ended. */
  sum() {
    const parts = [`${count(this.tokens)} ${this.tokens === 1 ? "token" : "tokens"}`];
    if (this.first > 0) parts.push(`first after ${duration((this.first - this.started) / 1000)}`);
    if (this.tokens > 1 && this.last > this.first) {
      parts.push(`then ${rate((this.tokens - 1) / ((this.last - this.first) / 1000))} tokens/s`);
    }
    if (this.finish === "length") parts.push("cut at the limit");
    setText(this.note, parts.join(", "));
  }
}

/** The box. */
export class Chat {
  /**
   * @param {boolean} template  Whether the model has a chat template.
   * @param {() => string} model  Its name.
   */
  constructor(template, model) {
    this.template = template;
    this.model = model;
    /** @type {Message[]} */
    this.messages = [];
    /** @type {AbortController | null} */
    this.running = null;
    this.log = byId("log", HTMLElement);
    this.field = byId("message", HTMLTextAreaElement);
    this.send = byId("send", HTMLButtonElement);
    this.stop = byId("stop", HTMLButtonElement);
    this.again = byId("again", HTMLButtonElement);
    this.system = byId("system", HTMLTextAreaElement);
    this.temperature = byId("temperature", HTMLInputElement);
    this.maxTokens = byId("max-tokens", HTMLInputElement);
    this.listen();
    byId("chat", HTMLElement).hidden = false;
    byId("system-field", HTMLElement).hidden = !template;
    setText(byId("talk-title", HTMLElement), template ? "Chat" : "Completion");
    setText(byId("message-label", HTMLElement), template ? "Message" : "Text to complete");
    // Without a number a chat goes on as long as the model has something to say, a completion for 16 tokens.
    if (!template) this.maxTokens.value = COMPLETION_TOKENS;
    this.field.placeholder = template ? "Ask the model" : "Begin a text; the model goes on";
  }

  listen() {
    const form = byId("chat-form", HTMLFormElement);
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      void this.submit();
    });
    this.field.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      form.requestSubmit();
    });
    byId("chat", HTMLElement).addEventListener("keydown", (event) => {
      if (event.key === "Escape") this.running?.abort();
    });
    this.stop.addEventListener("click", () => this.running?.abort());
    this.again.addEventListener("click", () => this.clear());
  }

  clear() {
    this.running?.abort();
    this.messages = [];
    this.log.replaceChildren();
    this.again.hidden = true;
    this.field.focus();
  }

  async submit() {
    const settings = byId("settings", HTMLDetailsElement);
    const wrong = [this.temperature, this.maxTokens].find((field) => !field.checkValidity());
    if (wrong !== undefined) {
      settings.open = true;
      wrong.reportValidity();
      return;
    }
    const text = this.field.value;
    if (this.running !== null || text.trim() === "") return;
    this.field.value = "";
    this.again.hidden = false;
    if (this.template) this.log.append(said("You", text));
    const answer = new Answer(this.model(), this.template);
    if (!this.template) answer.body.prepend(element("span", { class: "given" }, text));
    this.log.append(answer.root);
    this.toEnd();
    await this.run(text, answer);
  }

  /**
   * Streams an answer into the log; a failed exchange is no part of the conversation.
   *
   * @param {string} text
   * @param {Answer} answer
   */
  async run(text, answer) {
    const running = new AbortController();
    const messages = this.messages;
    this.setRunning(running);
    try {
      const [path, body] = this.question(text);
      const response = await request(path, body, running.signal);
      if (response.body === null) throw new Error("the answer is empty");
      for await (const data of eventData(response.body)) {
        answer.take(data);
        this.follow();
      }
      answer.sum();
      messages.push({ role: "user", content: text }, { role: "assistant", content: answer.text });
    } catch (error) {
      if (running.signal.aborted) {
        setText(answer.note, "stopped");
        messages.push({ role: "user", content: text }, { role: "assistant", content: answer.text });
      } else {
        answer.root.append(element("p", { class: "fault", role: "alert" }, sentence(error)));
        if (this.field.value === "") this.field.value = text;
      }
    }
    answer.draw();
    this.setRunning(null);
    this.follow();
  }

  /**
   * @param {string} text
   * @returns {[string, object]}
   */
  question(text) {
    const limit = this.maxTokens.valueAsNumber; // not a number if the field is empty
    const common = {
      model: this.model(),
      temperature: this.temperature.valueAsNumber,
      stream: true,
      stream_options: { include_usage: true },
      ...(Number.isNaN(limit) ? {} : { max_tokens: limit }),
    };
    if (!this.template) return ["v1/completions", { ...common, prompt: text }];
    const system = this.system.value.trim() === "" ? [] : [{ role: "system", content: this.system.value }];
    const messages = [...system, ...this.messages, { role: "user", content: text }];
    return ["v1/chat/completions", { ...common, messages }];
  }

  /** @param {AbortController | null} running */
  setRunning(running) {
    this.running = running;
    const had = document.activeElement;
    this.send.disabled = running !== null;
    this.stop.disabled = running === null;
    // A screen reader reads the answer when it is whole, not each of its pieces.
    this.log.setAttribute("aria-busy", String(running !== null));
    // A button that is disabled loses the focus to nowhere.
    if (had === this.send || had === this.stop) this.field.focus();
  }

  /** Scrolls along, unless the reader has scrolled back. */
  follow() {
    const left = this.log.scrollHeight - this.log.scrollTop - this.log.clientHeight;
    if (left < 80) this.toEnd();
  }

  toEnd() {
    this.log.scrollTop = this.log.scrollHeight;
  }
}

/**
 * @param {string} who
 * @param {string} text
 * @returns {HTMLElement}
 */
function said(who, text) {
  return element("article", { class: "said you" }, element("h3", {}, who), element("div", { class: "text" }, text));
}

/**
 * @param {unknown} error
 * @returns {string}
 */
export function sentence(error) {
  if (error instanceof TypeError) return "The server does not answer, or the answer broke off.";
  return error instanceof Error ? error.message : String(error);
}
