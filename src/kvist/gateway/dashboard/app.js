const MOST_LINES = 8, LISTED = 20, MINUTE = 60;
const charts = {
  latency: new Chart("latency", "time", "No request has ended yet"),
  flight: new Chart("flight", "count", "No worker yet"),
  hits: new Chart("hits", "percent", "No request has ended yet"),
  error: new Chart("error", "time", "Nothing predicted yet"),
};
let key = sessionStorage.getItem("kvist-key") || "";

// Mean of a series over the last minute, each second weighted by its requests; null without any.
function lastMinute(series, name) {
  let sum = 0, weight = 0;
  series[name].slice(-MINUTE).forEach((value, i, own) => {
    const rate = series.rate[series.rate.length - own.length + i];
    if (known(value)) { sum += value * rate; weight += rate; }
  });
  return weight ? sum / weight : null;
}

function tiles(data) {
  const series = data.series, recent = series.rate.slice(-10);
  const rate = recent.length ? recent.reduce((sum, value) => sum + value, 0) / recent.length : 0;
  byId("rate").innerHTML = (rate < 99.5 ? rate.toFixed(1) : whole(rate)) + small("/s");
  byId("rate-note").textContent = `${whole(data.workers.reduce((sum, row) => sum + row.requests, 0))} ended in all`;
  const refused = Object.values(data.refused).reduce((sum, value) => sum + value, 0);
  byId("active").textContent = whole(data.active);
  byId("active-note").textContent = `${whole(data.queued)} waiting, ${whole(refused)} refused`;
  const hits = lastMinute(series, "hit_rate"), p50 = lastMinute(series, "p50"), error = lastMinute(series, "error");
  byId("hits-now").innerHTML = known(hits) ? (100 * hits).toFixed(1) + small("%") : "–";
  byId("ttft-now").innerHTML = bigTime(lastMinute(series, "ttft"));
  byId("p50-now").innerHTML = bigTime(p50);
  const tail = ["p95", "p99"].map(name => `${name} ${duration(lastMinute(series, name)).join(" ").trim()}`);
  byId("latency-note").textContent = known(p50) ? tail.join(", ") : "median, last minute";
  byId("error-now").innerHTML = bigTime(error);
  byId("error-note").textContent = known(error) && p50 ? `${Math.round(100 * error / p50)} % of the latency` : "median, last minute";
}

// What is wrong with a worker: [its dot's class, words].
function condition(row) {
  if (!row.healthy) return ["bad", "unhealthy"];
  if (row.draining) return ["warn", "draining"];
  return row.breaker === "closed" ? ["", ""] : ["bad", `breaker ${row.breaker.replace("_", " ")}`];
}

function workers(rows) {
  const most = Math.max(...rows.map(row => row.in_flight), 1);
  const columns = [
    ["In flight", row => `<span class="meter"><i style="width:${100 * row.in_flight / most}%"></i></span><b>${row.in_flight}</b>`],
    ["Load", row => row.load.toFixed(row.load < 99.95 ? 1 : 0)],
    ["Requests", row => whole(row.requests)],
    ["Cache hits", row => percent(row.hit_rate)],
    ["p50", row => time(row.p50)],
    ["p95", row => time(row.p95)],
    ["p99", row => time(row.p99)],
    ["Prediction error", row => time(row.error)],
    ["Index, tokens", row => compact(row.index_tokens)],
  ];
  if (rows.some(row => row.running !== null)) // the workers' own metrics are read
    columns.splice(1, 0, ["Runs + waits", row => row.running === null ? "–" : `${row.running} + ${row.waiting ?? 0}`],
      ["KV in use", row => percent(row.kv_usage)]);
  if (rows.some(row => row.predictions)) // actual over predicted, of late
    columns.splice(-1, 0, ["Drift", row => row.predictions ? `× ${row.predictions.drift.toFixed(2)}` : "–"]);
  if (rows.some(row => row.knows !== "own")) columns.push(["KV events", row => text(row.knows)]);
  byId("workers-head").innerHTML = `<tr><th>Worker</th>${columns.map(([name]) => `<th data-label="${name}">${name}</th>`).join("")}</tr>`;
  byId("workers").innerHTML = rows.map(row => {
    const [kind, words] = condition(row);
    return `<tr><td class="name"><span class="dot ${kind}"></span>${text(short(row.id))}` +
      `${words && `<span class="why ${kind}">${words}</span>`}</td>` +
      columns.map(([name, cell]) => `<td data-label="${name}">${cell(row)}</td>`).join("") + "</tr>";
  }).join("");
  byId("no-workers").hidden = rows.length > 0;
}

function lines(data) {
  const series = data.series, names = Object.keys(series.in_flight);
  charts.latency.set(series.time, ["p50", "p95", "p99"].map(name => [name, series[name]]));
  charts.hits.set(series.time, [["cached", series.hit_rate]]);
  charts.error.set(series.time, [["error", series.error]]);
  if (names.length <= MOST_LINES) {
    charts.flight.set(series.time, names.map(name => [short(name), series.in_flight[name]]));
    return;
  }
  const at = series.time.map((_, i) => names.map(name => series.in_flight[name][i]));
  charts.flight.set(series.time, [
    ["busiest", at.map(row => Math.max(...row))],
    ["mean", at.map(row => row.reduce((sum, value) => sum + value, 0) / row.length)],
    ["idlest", at.map(row => Math.min(...row))],
  ]);
}

// Why a request went where it did: the rule, and what it compared.
function explanation(entry) {
  const prompt = `Prompt of ${whole(entry.prompt)} ${entry.prompt_unit}, ${percent(entry.prompt ? entry.cached / entry.prompt : 0)} of it thought cached there` +
    (known(entry.cached_true) && entry.prompt ? `, ${percent(entry.cached_true / entry.prompt)} by the engine's own count.` : ".");
  const seconds = known(entry.predicted);
  const pairs = entry.candidates.map((id, i) => [id, entry.scores[i]]).filter(pair => known(pair[1]));
  pairs.sort((a, b) => a[1] - b[1]);
  const most = Math.max(...pairs.map(pair => pair[1]), 1e-9);
  const bars = pairs.slice(0, 12).map(([id, score]) => {
    const chosen = id === entry.worker ? " chosen" : "";
    return `<span class="${chosen}">${text(short(id))}</span><div class="bar${chosen}" style="width:${100 * Math.max(score, 0) / most}%"></div>` +
      `<span class="${chosen}">${seconds ? time(score) : +score.toFixed(3)}</span>`;
  }).join("");
  const more = pairs.length > 12 ? `<p class="soft">and ${pairs.length - 12} more</p>` : "";
  const among = pairs.length > 1 ? `, of ${pairs.length} workers` : "";
  const compared = pairs.length ? `<p class="soft">What it compared; the smallest wins:</p>` : "";
  return `<div class="explain"><p>Why <b>${text(short(entry.worker))}</b>: ${text(entry.reason)}${among}. <span class="soft">${prompt}</span></p>` +
    `${compared}<div class="scores">${bars}</div>${more}</div>`;
}

function recent(data) {
  const box = byId("recent");
  if (box.querySelector("details[open]")) return;
  const rows = data.recent.slice(-LISTED).reverse().map(entry => {
    const cached = entry.prompt ? entry.cached / entry.prompt : 0;
    return `<details><summary><span class="soft when">${age(data.now - entry.at)}</span><span class="to">${text(short(entry.worker))}</span>` +
      `<span class="soft path">${text(entry.path.replace(/^\/v1\//, ""))}</span><span class="prompt">${compact(entry.prompt)}</span>` +
      `<span class="cached"><span class="meter"><i style="width:${100 * cached}%"></i></span><b>${percent(cached)}</b></span>` +
      `<span class="soft predicted">${time(entry.predicted)}</span><span class="took">${time(entry.latency)}</span>` +
      `<span class="status ${entry.status === "ok" ? "good" : "bad"}">${text(entry.status)}</span></summary>${explanation(entry)}</details>`;
  });
  const head = `<div class="row"><span>When</span><span>Sent to</span><span class="path">Path</span><span class="prompt">Prompt, ${data.recent.at(-1)?.prompt_unit}</span>` +
    `<span>Thought cached</span><span>Predicted</span><span>Took</span><span>Outcome</span></div>`;
  box.innerHTML = rows.length ? head + rows.join("") : `<p class="empty">No request yet. Send one to <code>${text(location.origin)}/v1/chat/completions</code></p>`;
}

function held() {
  byId("held").textContent = byId("recent").querySelector("details[open]") ? "held while one is open" : "select one to see why";
}

function show(data) {
  byId("policy").textContent = data.policy;
  byId("ready").textContent = `${data.workers.filter(row => condition(row)[0] === "").length} of ${data.workers.length} ready`;
  byId("uptime").textContent = span(data.uptime);
  byId("main").hidden = false;
  tiles(data); workers(data.workers); lines(data); recent(data);
}

function state(words, kind) {
  byId("state").textContent = words;
  byId("state").className = `state ${kind}`;
}

async function refresh() {
  if (document.hidden) return;
  try {
    const answer = await fetch("/dashboard/data", { headers: key ? { authorization: `Bearer ${key}` } : {} });
    byId("login").hidden = answer.status !== 401;
    if (answer.status === 401) { byId("main").hidden = true; state(key ? "wrong key" : "key needed", key ? "lost" : ""); return; }
    show(await answer.json());
    state("live", "live");
  } catch (error) {
    state("no connection", "lost");
  }
}

byId("login").addEventListener("submit", event => {
  event.preventDefault();
  key = byId("key").value.trim();
  sessionStorage.setItem("kvist-key", key);
  refresh();
});
document.addEventListener("visibilitychange", refresh);
byId("recent").addEventListener("toggle", held, true);
held();
refresh();
setInterval(refresh, 1000);
