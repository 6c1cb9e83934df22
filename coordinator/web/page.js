"use strict";
// Draws what /status.json says, every second. Text from the cluster only ever becomes text nodes.
(() => {
  const POLL_MS = 1000;
  const PATIENCE_MS = 4000;
  const SILENT_SECONDS = 3;
  const SVG = "http://www.w3.org/2000/svg";
  const at = (id) => document.getElementById(id);
  const num = (value) => Number(value ?? 0);
  const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
  let heard = null; // ms, of performance.now
  let known = null; // the newest figures
  const since = performance.now();
  const drawn = new Map(); // what each part was last drawn from

  function element(name, attributes = {}, ...children) {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) {
      if (key === "class") made.className = value;
      else made.setAttribute(key, value);
    }
    made.append(...children);
    return made;
  }

  function shape(name, attributes, text) {
    const made = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text !== undefined) made.textContent = text;
    return made;
  }

  // Nothing is touched that stays as it is: a selection, a scroll position and a focus survive.
  function once(part, values, draw) {
    const key = JSON.stringify(values);
    if (drawn.get(part) !== key) {
      drawn.set(part, key);
      draw();
    }
  }

  const span = (first, end) => (end === first + 1 ? `${first}` : `${first}–${end - 1}`);
  const clock = (seconds) => new Date(seconds * 1000).toLocaleTimeString([], { hour12: false });
  const word = (state) => state.replace("RUN_STATE_", "").toLowerCase();

  function duration(seconds) {
    const minutes = Math.floor(seconds / 60);
    if (minutes < 1) return `${Math.round(seconds)} s`;
    return minutes < 60 ? `${minutes} min ${Math.round(seconds % 60)} s` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
  }

  function drawHead(status) {
    const state = word(status.state);
    const looks = { training: "good", finished: "good", paused: "warn", gathering: "warn", failed: "bad" };
    at("run").textContent = status.runId;
    at("state").textContent = state;
    at("state").className = `badge ${looks[state] ?? ""}`;
    at("why").textContent = status.reason || (status.waitingFor ? `waiting for ${status.waitingFor}` : "");
    const version = num(status.version), last = num(status.lastStep);
    at("progress").firstElementChild.style.width = `${last ? (100 * version) / last : 0}%`;
    at("progress").setAttribute("aria-valuenow", version);
    at("progress").setAttribute("aria-valuemax", last);
    at("steps").textContent = `step ${whole.format(version)} of ${whole.format(last)}`;
    const speed = num(status.tokensPerSecond), left = (last - version) * num(status.newest?.tokens);
    at("eta").textContent = state === "training" && speed > 0 ? `${duration(left / speed)} to go` : "";
    document.title = `${status.runName}: ${state}, step ${version}`;
  }

  function drawTiles(status) {
    const newest = status.newest, version = num(status.version);
    const fixed = (value, digits) => (newest ? num(value).toFixed(digits) : "–");
    const lag = status.consistency === "bsp" ? "BSP" : `${status.consistency.toUpperCase()}, staleness ${status.staleness}`;
    const skipped = num(status.skippedSteps), lacking = num(status.underReplicatedChunks);
    const filling = status.holdings.reduce((sum, each) => sum + num(each.learner), 0);
    const tiles = [
      ["training loss", fixed(newest?.loss, 4), `grad norm ${fixed(newest?.gradNorm, 3)}`],
      ["validation loss", num(status.validationLoss) ? num(status.validationLoss).toFixed(4) : "–",
        newest ? `learning rate ${num(newest.learningRate).toExponential(2)}` : ""],
      ["tokens/s", num(status.tokensPerSecond) ? whole.format(num(status.tokensPerSecond)) : "–",
        skipped ? `${skipped} steps skipped` : "over the last steps"],
      ["goodput", num(status.goodput) ? `${(100 * num(status.goodput)).toFixed(1)} %` : "–",
        `${whole.format(num(status.goodputTokensPerSecond))} tokens/s count`],
      ["clock spread", num(status.clockSpreadSteps) === 1 ? "1 step" : `${num(status.clockSpreadSteps)} steps`, `${lag}; as last told`],
      ["members", `${status.members.length}`, `plan ${num(status.plan?.number?.term)}.${num(status.plan?.number?.epoch)}, timeline ${num(status.plan?.timeline?.id)}`],
      ["checkpoint", num(status.newestCheckpoint) ? whole.format(num(status.newestCheckpoint)) : "none",
        num(status.newestCheckpoint) ? `${whole.format(version - num(status.newestCheckpoint))} steps ago` : "yet"],
      ["chunks lacking a copy", `${lacking}`, filling ? `${filling} being filled` : lacking ? "until a shard can take them" : "all in sync"],
    ];
    once("tiles", tiles, () => at("tiles").replaceChildren(
      ...tiles.map(([name, value, more]) => element("div", { class: "tile" }, element("span", {}, name), element("b", {}, value), element("span", {}, more)))));
  }

  function ticks(low, high, most) {
    const raw = (high - low || 1) / most, power = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 5, 10].find((each) => each * power >= raw) * power;
    const found = [];
    for (let each = Math.ceil(low / step) * step; each <= high + step / 1e6; each += step) found.push(each);
    return [found, Math.max(0, -Math.floor(Math.log10(step)))];
  }

  function drawChart(status) {
    const points = status.losses.map((each) => [num(each.step) + 1, num(each.loss)]);
    const checks = status.validations.map((each) => [num(each.step), num(each.loss)]);
    const box = at("chart"), width = Math.max(280, box.clientWidth), height = box.clientWidth < 600 ? 240 : 300;
    once("chart", [points, checks, width, height], () => {
      const all = [...points, ...checks];
      if (!all.length) return;
      const [left, right, top, bottom] = [44, 10, 10, 24];
      const end = Math.max(...all.map((each) => each[0]), 2);
      const values = all.map((each) => each[1]);
      const pad = (Math.max(...values) - Math.min(...values) || 1) * 0.06;
      const low = Math.min(...values) - pad, high = Math.max(...values) + pad;
      const x = (step) => left + ((step - 1) / (end - 1)) * (width - left - right);
      const y = (loss) => top + ((high - loss) / (high - low)) * (height - top - bottom);
      const svg = shape("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `loss over ${end} steps` });
      const [ys, digits] = ticks(low, high, 5);
      for (const each of ys) {
        svg.append(shape("line", { class: "grid", x1: left, x2: width - right, y1: y(each), y2: y(each) }));
        svg.append(shape("text", { x: left - 6, y: y(each) + 4, "text-anchor": "end" }, each.toFixed(digits)));
      }
      for (const each of ticks(1, end, width < 500 ? 4 : 8)[0].filter((step) => step >= 1 && Number.isInteger(step)))
        svg.append(shape("text", { x: x(each), y: height - 6, "text-anchor": "middle" }, whole.format(each)));
      svg.append(shape("polyline", { class: "loss", points: points.map(([step, loss]) => `${x(step).toFixed(1)},${y(loss).toFixed(1)}`).join(" ") }));
      for (const [step, loss] of checks) svg.append(shape("circle", { class: "validation", cx: x(step), cy: y(loss), r: 4 }));
      const cursor = shape("line", { class: "cursor", y1: top, y2: height - bottom, visibility: "hidden" });
      svg.append(cursor);
      svg.addEventListener("pointermove", (event) => {
        const where = ((event.clientX - svg.getBoundingClientRect().left) / svg.getBoundingClientRect().width) * width;
        const near = (list) => list.reduce((best, each) => (!best || Math.abs(x(each[0]) - where) < Math.abs(x(best[0]) - where) ? each : best), null);
        const point = near(points), check = near(checks);
        if (!point) return;
        cursor.setAttribute("x1", x(point[0]));
        cursor.setAttribute("x2", x(point[0]));
        cursor.setAttribute("visibility", "visible");
        at("reading").textContent = `step ${whole.format(point[0])}: ${point[1].toFixed(4)}` +
          (check ? ` · validation at ${whole.format(check[0])}: ${check[1].toFixed(4)}` : "");
      });
      svg.addEventListener("pointerleave", () => {
        cursor.setAttribute("visibility", "hidden");
        at("reading").textContent = "";
      });
      box.replaceChildren(svg);
    });
  }

  function drawTopology(status) {
    const plan = status.plan;
    if (!plan) return;
    const members = new Map(status.members.map((each) => [each.member.incarnation, each]));
    const seat = (name) => {
      const found = members.get(name);
      if (!found) return [name, "gone", "gone"];
      const silent = num(found.leaseAgeSeconds) > SILENT_SECONDS;
      const doing = found.leaving ? "leaving" : silent ? `silent for ${Math.round(num(found.leaseAgeSeconds))} s` : found.activity || "joined";
      return [name, doing, silent || found.leaving ? "quiet" : "well", num(found.version)];
    };
    const stages = plan.stages.map((each, index) => `stage ${index} · layers ${span(num(each.first), num(each.end))}`);
    const rows = plan.replicas.map((replica, index) => [
      `replica ${index}${replica.shadow ? " (shadow)" : ""} · lanes ${replica.blocks.map((each) => span(num(each.first), num(each.first) + num(each.size))).join(", ")}`,
      replica.workers.map((worker) => seat(plan.members[worker].incarnation)),
    ]);
    const seated = new Set(plan.replicas.flatMap((replica) => replica.workers.map((worker) => plan.members[worker].incarnation)));
    const spares = status.members.filter((each) => each.member.role === "ROLE_WORKER" && !seated.has(each.member.incarnation));
    at("plan").textContent = `plan ${num(plan.number.term)}.${num(plan.number.epoch)}: ${plan.reason}`;
    once("pipelines", [stages, rows, spares.map((each) => each.member.incarnation)], () => {
      const parts = rows.map(([name, seats]) => element("div", { class: "replica" }, element("h3", { class: "muted" }, name),
        element("div", { class: "seats" }, ...seats.map(([who, doing, look, version], stage) => element("div", { class: `seat ${look}` },
          element("span", {}, stages[stage] ?? ""), doing, element("span", {}, version === undefined ? who : `${who} · version ${whole.format(version)}`))))));
      if (spares.length) parts.push(element("p", { class: "muted" }, `Spare: ${spares.map((each) => each.member.incarnation).join(", ")}`));
      at("pipelines").replaceChildren(...parts);
    });
    const shards = plan.members.filter((each) => each.role === "ROLE_SHARD").map((each, index) => {
      const held = status.holdings[index] ?? {};
      return [...seat(each.incarnation), num(held.primary), num(held.backup), num(held.learner)];
    });
    const most = Math.max(1, ...shards.map((each) => each[4] + each[5] + each[6]));
    const short = num(status.underReplicatedChunks);
    at("copies").textContent = short ? `${short} chunks lack a copy` : "every copy is in sync";
    once("shards", shards, () => at("shards").replaceChildren(...shards.map(([who, doing, look, , primary, backup, learner]) => {
      const bar = element("div", { class: "bar" });
      for (const [kind, count] of [["primary", primary], ["backup", backup], ["learner", learner]]) {
        const part = element("div", { class: kind, title: `${kind}: ${count}` });
        part.style.width = `${(100 * count) / most}%`;
        bar.append(part);
      }
      const counts = `${primary} primary, ${backup} backup${learner ? `, ${learner} being filled` : ""}`;
      return element("div", { class: "shard" }, element("div", { class: "row" }, element("span", {}, who), element("span", { class: "muted" }, look === "well" ? counts : `${doing}; ${counts}`)), bar);
    })));
  }

  function drawPast(status) {
    const checkpoints = status.checkpoints.slice(-8).reverse();
    once("checkpoints", checkpoints, () => at("checkpoints").replaceChildren(...(checkpoints.length
      ? checkpoints.map((each) => element("li", {}, element("time", {}, num(each.unixSeconds) ? clock(num(each.unixSeconds)) : "before"), `version ${whole.format(num(each.version))}`))
      : [element("li", { class: "muted" }, "none yet")])));
    const events = status.events.slice(-100).reverse();
    once("events", events, () => at("events").replaceChildren(...(events.length
      ? events.map((each) => element("li", each.isWarning ? { class: "warning" } : {}, element("time", {}, clock(num(each.unixSeconds))), element("span", {}, each.text)))
      : [element("li", { class: "muted" }, "none yet")])));
  }

  function drawLost(isLost) {
    at("lost").hidden = !isLost;
    if (!isLost) return;
    const last = known === null ? "" : word(known.state);
    if (last === "finished" || last === "failed") {
      at("lost").textContent = `The run has ${last}, and its coordinator has ended.`;
      return;
    }
    const ago = Math.round((performance.now() - (heard ?? since)) / 1000);
    at("lost").textContent = heard === null
      ? `The coordinator cannot be reached, for ${ago} s now.`
      : `The coordinator cannot be reached. What is shown is ${ago} s old; a run that goes on trains without it.`;
    at("state").textContent = "not reached";
    at("state").className = "badge bad";
  }

  async function poll() {
    const limit = new AbortController();
    const timer = setTimeout(() => limit.abort(), PATIENCE_MS);
    try {
      const answer = await fetch("status.json", { cache: "no-store", signal: limit.signal });
      if (!answer.ok) throw new Error(`status ${answer.status}`);
      const status = known = await answer.json();
      heard = performance.now();
      at("control").hidden = answer.headers.get("X-Shardlane-Control") !== "on";
      drawLost(false);
      for (const draw of [drawHead, drawTiles, drawChart, drawTopology, drawPast]) draw(status);
    } catch {
      drawLost(true);
    } finally {
      clearTimeout(timer);
      setTimeout(poll, POLL_MS);
    }
  }

  at("control").addEventListener("submit", async (event) => {
    event.preventDefault();
    const action = event.submitter?.value, answer = at("answer"), buttons = [...at("control").querySelectorAll("button")];
    if (!action || (action === "stop" && !confirm("End the run after the next step, with a checkpoint?"))) return;
    buttons.forEach((each) => { each.disabled = true; });
    try {
      const response = await fetch("control", {
        method: "POST",
        headers: { Authorization: `Bearer ${at("token").value.trim()}`, "X-Shardlane-Control": "1", "Content-Type": "application/json" },
        body: JSON.stringify({ action }),
      });
      const text = await response.text();
      answer.textContent = response.headers.get("Content-Type") === "application/json" ? JSON.parse(text).reason : text;
      answer.className = response.ok ? "good" : "bad";
    } catch {
      answer.textContent = "The coordinator cannot be reached; nothing was asked.";
      answer.className = "bad";
    } finally {
      buttons.forEach((each) => { each.disabled = false; });
    }
  });

  addEventListener("resize", () => known && drawChart(known));
  poll();
})();
