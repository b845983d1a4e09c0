/** The page: asks what the server is, shows the machine as it runs, and opens the box that suits the model. */

import { Access } from "./access.js";
import { request, storedKey } from "./api.js";
import { Chat } from "./chat.js";
import { byId, setText } from "./dom.js";
import { Embed } from "./embed.js";
import { Figures } from "./figures.js";
import { duration } from "./format.js";
import { Poll } from "./poll.js";
import { Prediction } from "./prediction.js";
import { Rack } from "./rack.js";
import { Recent } from "./rates.js";
import { Replicas } from "./replicas.js";

const SMOOTH_SECONDS = 5;

/** @typedef {"waiting" | "live" | "gone" | "locked"} State */

/**
 * @param {State} state
 * @param {string} text
 */
function setState(state, text) {
  const where = byId("state", HTMLElement);
  where.dataset.state = state;
  setText(where, text);
  document.body.dataset.state = state;
}

/** @param {import("./rates.js").Machine} machine */
function showHead(machine) {
  const { tensor_parallel_size, pipeline_parallel_size, data_parallel_size, devices } = machine.parallelism;
  const sizes = [
    ["tp", tensor_parallel_size],
    ["pp", pipeline_parallel_size],
    ["dp", data_parallel_size],
  ].filter(([, size]) => size !== undefined);
  setText(byId("sizes", HTMLElement), [...sizes.map((size) => size.join(" ")), devices ?? ""].join(" · "));
  setText(byId("model", HTMLElement), machine.model);
  setText(byId("uptime", HTMLElement), `up ${duration(Math.floor(machine.uptime_seconds))}`);
  setText(byId("verification", HTMLElement), `Verification: ${machine.verification}`);
  setText(byId("version", HTMLElement), `furiosa-llm ${machine.version}`);
  const title = `${machine.model} – furiosa-llm`;
  if (document.title !== title) document.title = title;
}

/**
 * @param {"chat" | "completion" | "embedding" | null} box
 * @param {() => string} model
 */
function openBox(box, model) {
  if (box === "chat" || box === "completion") new Chat(box === "chat", model);
  else if (box === "embedding") new Embed(model);
  else byId("no-box", HTMLElement).hidden = false;
}

/** @returns {Promise<{api_key_required: boolean, box: "chat" | "completion" | "embedding" | null}>} */
async function config() {
  for (;;) {
    try {
      return await (await request("page/config.json")).json();
    } catch {
      setState("gone", "the server does not answer");
      await new Promise((resolve) => setTimeout(resolve, 2000));
    }
  }
}

async function run() {
  const figures = new Figures(byId("figures", HTMLElement));
  const rack = new Rack(byId("rack", HTMLElement), byId("readout", HTMLElement));
  const prediction = new Prediction(byId("prediction", HTMLElement));
  const replicas = new Replicas(byId("replicas", HTMLElement));
  const recent = new Recent(SMOOTH_SECONDS);
  let model = "";
  const access = new Access(() => poll.start());
  const lock = () => {
    setState("locked", "API key needed");
    access.ask();
  };
  const poll = new Poll({
    show(machine) {
      access.granted();
      setState("live", "live");
      model = machine.model;
      showHead(machine);
      const { last, smooth } = recent.push(machine);
      figures.show(machine, last, smooth);
      rack.show(machine);
      prediction.show(machine);
      replicas.show(machine, smooth);
    },
    gone: (reason, seconds) => setState("gone", `${reason}; next try in ${seconds} s`),
    refused: lock,
  });
  const { api_key_required: keyRequired, box } = await config();
  openBox(box, () => model);
  if (keyRequired && storedKey() === null) lock();
  else poll.start();
}

void run();
