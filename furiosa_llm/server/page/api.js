/** Requests to the server, with the key if one was given, and its errors as messages. */

const STORED = "furiosa-llm-api-key";

/** An answer that is an error. Its message is the server's. */
export class AnswerError extends Error {
  /**
   * @param {number} status
   * @param {string} message
   */
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** @returns {string | null} */
export function storedKey() {
  return sessionStorage.getItem(STORED);
}

/**
 * Keeps the key as long as the tab is open; null forgets it.
 *
 * @param {string | null} key
 */
export function storeKey(key) {
  if (key === null) sessionStorage.removeItem(STORED);
  else sessionStorage.setItem(STORED, key);
}

/**
 * An answer of the server; throws AnswerError for an error, TypeError if there is no server.
 *
 * The path is relative, so that the page also works below the folder of a proxy.
 *
 * @param {string} path
 * @param {object} [body]  Sent as JSON; without one the method is GET.
 * @param {AbortSignal} [signal]
 * @returns {Promise<Response>}
 */
export async function request(path, body, signal) {
  const key = storedKey();
  /** @type {Record<string, string>} */
  const headers = key === null ? {} : { Authorization: `Bearer ${key}` };
  /** @type {RequestInit} */
  const options = { headers, signal, cache: "no-store" };
  if (body !== undefined) {
    options.method = "POST";
    options.body = JSON.stringify(body);
    headers["Content-Type"] = "application/json";
  }
  const response = await fetch(path, options);
  if (!response.ok) throw new AnswerError(response.status, await messageOf(response));
  return response;
}

/**
 * What an error says; a proxy's own may be HTML.
 *
 * @param {Response} response
 * @returns {Promise<string>}
 */
async function messageOf(response) {
  const text = await response.text();
  try {
    return errorMessage(JSON.parse(text)) ?? `status ${response.status}`;
  } catch {
    return `status ${response.status} ${response.statusText}`.trim();
  }
}

/**
 * The message of an error in OpenAI's shape, null if `body` is none.
 *
 * @param {any} body
 * @returns {string | null}
 */
export function errorMessage(body) {
  const message = body?.error?.message;
  return typeof message === "string" ? message : null;
}
