/** What counters did between two snapshots of the machine. */

/**
 * @typedef {object} PE
 * @property {number} pe
 * @property {number | null} replica
 * @property {number | null} stage
 * @property {number | null} rank
 * @property {number} memory_nbytes
 * @property {number} weights_nbytes
 * @property {number} kv_nbytes
 * @property {number} kv_used_nbytes
 * @property {string | null} [host]
 *
 * @typedef {{npu: number, pes: PE[]}} Card
 *
 * @typedef {object} Replica
 * @property {number} replica
 * @property {boolean} alive
 * @property {boolean} ready
 * @property {number} running
 * @property {number} waiting
 * @property {number} used_pages
 * @property {number} num_pages
 *
 * @typedef {object} Stage
 * @property {number} replica
 * @property {number} stage
 * @property {number} first_block
 * @property {number} num_blocks
 * @property {number} busy_seconds
 * @property {number} batches
 *
 * @typedef {object} Collective
 * @property {number} replica
 * @property {number} stage
 * @property {string} kind
 * @property {number} calls
 * @property {number} nbytes
 * @property {number} seconds
 *
 * @typedef {object} Machine  What `GET /machine` gives.
 * @property {string} model
 * @property {string} task
 * @property {string} version
 * @property {string} verification
 * @property {number} time
 * @property {number} uptime_seconds
 * @property {Record<string, number | string>} parallelism
 * @property {Card[]} cards
 * @property {Replica[]} replicas
 * @property {Stage[]} stages
 * @property {Collective[]} collectives
 * @property {{prompt: number, generation: number}} tokens
 * @property {{received: number, succeeded: number, cancelled: number, failed: number}} requests
 * @property {import("./prediction.js").Expected | null} [prediction]
 *
 * @typedef {{calls: number, nbytes: number}} Traffic  Per second.
 *
 * @typedef {object} StageRates
 * @property {number} busy  Share of the time that the stage computed in, at most 1.
 * @property {number} batches  Per second.
 * @property {number} exchange  Share of the time that it spent in collectives.
 * @property {Map<string, Traffic>} traffic  By the kind of collective.
 *
 * @typedef {object} Rates
 * @property {number} prompt  Tokens per second.
 * @property {number} generation  Tokens per second.
 * @property {Map<string, StageRates>} stages  By `stageKey`.
 */

/**
 * @param {{replica: number, stage: number}} where
 * @returns {string}
 */
export function stageKey({ replica, stage }) {
  return `${replica}.${stage}`;
}

/**
 * What happened between two snapshots; null if nothing can be said: no time passed, or the server began anew.
 *
 * @param {Machine} before
 * @param {Machine} after
 * @returns {Rates | null}
 */
export function between(before, after) {
  const seconds = after.time - before.time;
  if (seconds <= 0 || restarted(before, after)) return null;
  const stages = new Map();
  const stagesBefore = new Map(before.stages.map((stage) => [stageKey(stage), stage]));
  for (const stage of after.stages) {
    const earlier = stagesBefore.get(stageKey(stage));
    stages.set(stageKey(stage), {
      busy: Math.min(1, grown(stage.busy_seconds, earlier?.busy_seconds) / seconds),
      batches: grown(stage.batches, earlier?.batches) / seconds,
      exchange: 0,
      traffic: new Map(),
    });
  }
  addTraffic(stages, before, after, seconds);
  return {
    prompt: grown(after.tokens.prompt, before.tokens.prompt) / seconds,
    generation: grown(after.tokens.generation, before.tokens.generation) / seconds,
    stages,
  };
}

/**
 * Whether the second snapshot is of another process than the first.
 *
 * @param {Machine} before
 * @param {Machine} after
 * @returns {boolean}
 */
export function restarted(before, after) {
  return after.uptime_seconds < before.uptime_seconds || after.requests.received < before.requests.received;
}

/**
 * @param {Map<string, StageRates>} stages
 * @param {Machine} before
 * @param {Machine} after
 * @param {number} seconds
 */
function addTraffic(stages, before, after, seconds) {
  /** @type {(one: Collective) => string} */
  const key = (one) => `${stageKey(one)}.${one.kind}`;
  const collectivesBefore = new Map(before.collectives.map((one) => [key(one), one]));
  for (const collective of after.collectives) {
    const stage = stages.get(stageKey(collective));
    if (stage === undefined) continue;
    const earlier = collectivesBefore.get(key(collective));
    stage.exchange = Math.min(1, stage.exchange + grown(collective.seconds, earlier?.seconds) / seconds);
    stage.traffic.set(collective.kind, {
      calls: grown(collective.calls, earlier?.calls) / seconds,
      nbytes: grown(collective.nbytes, earlier?.nbytes) / seconds,
    });
  }
}

/**
 * @param {number} now
 * @param {number | undefined} before
 * @returns {number}
 */
function grown(now, before = 0) {
  return Math.max(0, now - before);
}

/**
 * Snapshots of the last seconds. Shares of one second would jump with every batch that ends in it or behind it.
 */
export class Recent {
  /** @param {number} seconds */
  constructor(seconds) {
    this.seconds = seconds;
    /** @type {Machine[]} */
    this.snapshots = [];
  }

  /**
   * Takes a snapshot, and gives the rates since the last one and over all that is kept.
   *
   * @param {Machine} snapshot
   * @returns {{last: Rates | null, smooth: Rates | null}}
   */
  push(snapshot) {
    const previous = this.snapshots.at(-1);
    if (previous !== undefined && restarted(previous, snapshot)) this.snapshots = [];
    this.snapshots.push(snapshot);
    // The one before the window stays, so that the rates are of the whole window.
    while (this.snapshots.length > 2 && this.snapshots[1].time <= snapshot.time - this.seconds) this.snapshots.shift();
    const [oldest, newest] = [this.snapshots[0], this.snapshots.at(-2)];
    return {
      last: newest === undefined ? null : between(newest, snapshot),
      smooth: oldest === snapshot ? null : between(oldest, snapshot),
    };
  }
}

/** Values of the last seconds, each with its time. */
export class History {
  /** @param {number} seconds */
  constructor(seconds) {
    this.seconds = seconds;
    /** @type {{time: number, value: number}[]} */
    this.points = [];
  }

  /**
   * @param {number} time
   * @param {number} value
   */
  push(time, value) {
    // A clock that was set back would draw a line that runs backwards.
    this.points = this.points.filter((point) => point.time < time && point.time >= time - this.seconds);
    this.points.push({ time, value });
  }

  /** @returns {number} */
  get peak() {
    return Math.max(0, ...this.points.map((point) => point.value));
  }
}
