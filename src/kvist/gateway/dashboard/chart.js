// Line charts over time, drawn in the pixels they have, so that text is never stretched.

// A round step (1, 2 or 5 times a power of ten) that makes about `parts` steps up to `most`.
function niceStep(most, parts) {
  const raw = most / parts, power = 10 ** Math.floor(Math.log10(raw)), lead = raw / power;
  return power * (lead <= 1 ? 1 : lead <= 2 ? 2 : lead <= 5 ? 5 : 10);
}

// Axis labels share one unit, that of the largest.
const axis = {
  time: (value, most) => most >= 1 ? `${+value.toFixed(2)} s` : `${+(1000 * value).toFixed(most < 0.01 ? 2 : 0)} ms`,
  percent: value => `${Math.round(100 * value)} %`,
  count: value => value.toLocaleString("en"),
};
const LEAST = { time: 0.001, percent: 1, count: 4 };
const SHOWN = { time: value => duration(value).join(" "), percent: value => `${(100 * value).toFixed(1)} %`, count: value => whole(value) };

class Chart {
  // kind: time, percent or count. empty: what is said while there is nothing to draw.
  constructor(id, kind, empty) {
    this.kind = kind;
    this.box = byId(id);
    this.box.innerHTML = `<svg role="img"></svg><div class="legend"></div><div class="waiting">${text(empty)}</div>`;
    [this.svg, this.legend, this.waiting] = this.box.children;
    this.hover = null;
    this.times = []; this.lines = [];
    this.svg.addEventListener("pointermove", event => { this.hover = event.offsetX; this.draw(); });
    this.svg.addEventListener("pointerleave", () => { this.hover = null; this.draw(); });
    new ResizeObserver(() => this.draw()).observe(this.svg);
  }

  // lines: [name, values] pairs; a value is null where there was nothing to measure.
  set(times, lines) {
    this.times = times; this.lines = lines;
    this.draw();
  }

  draw() {
    const { times, lines, kind } = this, values = lines.flatMap(([, own]) => own).filter(known);
    this.waiting.hidden = values.length > 0;
    const width = this.svg.clientWidth || 400, height = 160, left = 46, right = 6, top = 8, bottom = 20;
    const step = niceStep(kind === "percent" ? 1 : Math.max(...values, LEAST[kind]), 4);
    const most = kind === "percent" ? 1 : step * Math.ceil(Math.max(...values, LEAST[kind]) / step - 1e-9);
    const to = times[times.length - 1] ?? 0, from = Math.min(times[0] ?? 0, to - 30);
    const x = at => left + (width - left - right) * (at - from) / (to - from);
    const y = value => height - bottom - (height - bottom - top) * value / most;
    let out = "";
    for (let value = 0; value <= most * 1.001; value += kind === "percent" ? 0.25 : step)
      out += `<line class="${value ? "grid" : "zero"}" x1="${left}" x2="${width - right}" y1="${y(value)}" y2="${y(value)}"/>` +
        `<text x="${left - 8}" y="${y(value) + 4}" text-anchor="end">${axis[kind](value, most)}</text>`;
    const gap = [5, 10, 15, 30, 60, 120].find(seconds => (to - from) / seconds <= Math.max(width / 90, 2)) ?? 120;
    for (let back = gap; x(to - back) > left + 14; back += gap)
      out += `<text x="${x(to - back)}" y="${height - 4}" text-anchor="middle">−${back < 120 ? back + " s" : back / 60 + " min"}</text>`;
    out += `<text x="${width - right}" y="${height - 4}" text-anchor="end">now</text>`;
    lines.forEach(([, own], i) => { out += this.path(own, x, y, i, lines.length === 1 && y(0)); });
    const at = this.hover === null ? times.length - 1 : this.nearest(x);
    if (this.hover !== null && times.length)
      out += `<line class="cursor" x1="${x(times[at])}" x2="${x(times[at])}" y1="${top}" y2="${height - bottom}"/>` +
        lines.map(([, own], i) => known(own[at]) ? `<circle cx="${x(times[at])}" cy="${y(own[at])}" r="3" fill="var(--c${i % 8})"/>` : "").join("");
    this.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    this.svg.innerHTML = out;
    const ago = this.hover === null || !times.length ? "" : `<span>${age(to - times[at])}</span>`;
    this.legend.innerHTML = ago + lines.map(([name, own], i) => `<span><i style="background:var(--c${i % 8})"></i>${text(name)} ` +
      `<b>${known(own[at]) ? SHOWN[kind](own[at]) : "–"}</b></span>`).join("");
  }

  path(values, x, y, i, floor) {
    let path = "", area = "", start = null, last = null;
    const close = () => { if (floor && start !== null && last !== start) area += `L${last} ${floor}L${start} ${floor}Z`; start = null; };
    values.forEach((value, at) => {
      if (!known(value)) { close(); return; }
      const here = x(this.times[at]).toFixed(1), point = `${here} ${y(value).toFixed(1)}`;
      path += (start === null ? "M" : "L") + point;
      area += (start === null ? "M" : "L") + point;
      start ??= here; last = here;
    });
    close();
    return (floor ? `<path class="area" d="${area}" fill="var(--c${i % 8})"/>` : "") +
      `<path class="line" d="${path}" stroke="var(--c${i % 8})"/>`;
  }

  nearest(x) {
    let best = 0;
    this.times.forEach((at, i) => { if (Math.abs(x(at) - this.hover) < Math.abs(x(this.times[best]) - this.hover)) best = i; });
    return best;
  }
}
