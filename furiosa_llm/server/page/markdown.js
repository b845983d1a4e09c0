/** Markdown as models write it, as elements: what it holds of HTML stays text, and links lead to the web alone. */

import { element } from "./dom.js";

// Each repetition has a limit: a text of one kind of bracket would be searched through from each of them.
const INLINE =
  /`([^`\n]{1,2000})`|\*\*([^\n]{1,2000}?)\*\*|\*([^\s*][^*\n]{0,2000})\*|\[([^\]\n]{1,500})\]\((https?:\/\/[^)\s]{1,2000})\)/g;
const FENCE = /^ {0,3}(?:```|~~~)/;
const HEADING = /^#{1,6} +(.*)$/;
const QUOTE = /^> ?(.*)$/;
const ITEM = /^( *)(?:[-*+]|(\d{1,9})[.)]) +(.*)$/;
const RULE = /^\|?[ :|-]*-[ :|-]*$/;

/**
 * @param {string} text
 * @returns {DocumentFragment}
 */
export function markdown(text) {
  const made = document.createDocumentFragment();
  const lines = text.split("\n");
  for (let at = 0; at < lines.length; ) {
    const [block, next] = blockAt(lines, at);
    if (block !== null) made.append(block);
    at = next;
  }
  return made;
}

/**
 * The block that begins at a line, if one does, and the line behind it.
 *
 * @param {string[]} lines
 * @param {number} at
 * @returns {[HTMLElement | null, number]}
 */
function blockAt(lines, at) {
  const line = lines[at];
  if (line.trim() === "") return [null, at + 1];
  if (FENCE.test(line)) {
    const end = from(lines, at + 1, (one) => !FENCE.test(one));
    return [element("pre", { tabindex: 0 }, element("code", {}, lines.slice(at + 1, end).join("\n"))), end + 1];
  }
  const heading = HEADING.exec(line);
  if (heading !== null) return [element("p", { class: "heading" }, ...inline(heading[1])), at + 1];
  if (QUOTE.test(line)) {
    const end = from(lines, at, (one) => QUOTE.test(one));
    const quoted = lines.slice(at, end).map((one) => one.replace(QUOTE, "$1"));
    return [element("blockquote", {}, ...inline(quoted.join("\n"))), end];
  }
  if (ITEM.test(line)) return list(lines, at);
  if (line.includes("|") && RULE.test(lines[at + 1] ?? "")) return table(lines, at);
  const end = from(lines, at + 1, (one) => one.trim() !== "" && ![FENCE, HEADING, QUOTE, ITEM].some((r) => r.test(one)));
  return [element("p", {}, ...inline(lines.slice(at, end).join("\n"))), end];
}

/**
 * @param {string[]} lines
 * @param {number} at
 * @returns {[HTMLElement, number]}
 */
function list(lines, at) {
  const end = from(lines, at, (one) => ITEM.test(one));
  const items = lines.slice(at, end).map((one) => /** @type {RegExpExecArray} */ (ITEM.exec(one)));
  const [, indent, first] = items[0];
  const made = element(first === undefined ? "ul" : "ol", { start: first });
  for (const [, spaces, , words] of items) {
    const depth = Math.min(4, Math.floor(Math.max(0, spaces.length - indent.length) / 2));
    made.append(element("li", { class: `depth-${depth}` }, ...inline(words)));
  }
  return [made, end];
}

/**
 * @param {string[]} lines
 * @param {number} at
 * @returns {[HTMLElement, number]}
 */
function table(lines, at) {
  const end = from(lines, at + 2, (one) => one.includes("|"));
  const rows = [lines[at], ...lines.slice(at + 2, end)].map((line, row) => {
    const cells = line.trim().replace(/^\||\|$/g, "").split("|");
    return element("tr", {}, ...cells.map((cell) => element(row === 0 ? "th" : "td", {}, ...inline(cell.trim()))));
  });
  return [element("div", { class: "scrolled", tabindex: 0 }, element("table", {}, ...rows)), end];
}

/**
 * The first line from `at` on that is not `inside`.
 *
 * @param {string[]} lines
 * @param {number} at
 * @param {(line: string) => boolean} inside
 * @returns {number}
 */
function from(lines, at, inside) {
  let end = at;
  while (end < lines.length && inside(lines[end])) end += 1;
  return end;
}

/**
 * @param {string} text
 * @returns {(Node | string)[]}
 */
function inline(text) {
  const parts = [];
  let done = 0;
  for (const found of text.matchAll(INLINE)) {
    const [whole, code, strong, slanted, label, address] = found;
    parts.push(text.slice(done, found.index));
    if (code !== undefined) parts.push(element("code", {}, code));
    else if (strong !== undefined) parts.push(element("strong", {}, ...inline(strong)));
    else if (slanted !== undefined) parts.push(element("em", {}, slanted));
    else parts.push(element("a", { href: address, rel: "noreferrer noopener", target: "_blank" }, label));
    done = found.index + whole.length;
  }
  parts.push(text.slice(done));
  return parts;
}
