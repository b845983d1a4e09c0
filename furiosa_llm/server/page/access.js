/** The API key: asked for when the server wants one, kept as long as the tab is open. */

import { storeKey, storedKey } from "./api.js";
import { byId, setText } from "./dom.js";

const ASKED = "This server asks for a key. It stays in this tab and is sent to this server only.";
const WRONG = "The server does not know this key. Give another one.";

/** The field for the key, shown when it is needed. */
export class Access {
  /** @param {() => void} given  Called when there is a key to try. */
  constructor(given) {
    this.panel = byId("access", HTMLElement);
    this.field = byId("access-key", HTMLInputElement);
    this.why = byId("access-why", HTMLElement);
    byId("access-form", HTMLFormElement).addEventListener("submit", (event) => {
      event.preventDefault();
      storeKey(this.field.value.trim());
      this.field.value = "";
      given();
    });
  }

  /** Asks for a key: there was none, or a wrong one. */
  ask() {
    setText(this.why, storedKey() === null ? ASKED : WRONG);
    storeKey(null);
    if (!this.panel.hidden) return;
    this.panel.hidden = false;
    this.field.focus();
  }

  /** The key was right, or none is needed. */
  granted() {
    this.panel.hidden = true;
  }
}
