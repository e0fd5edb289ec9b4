const byId = id => document.getElementById(id);
const known = value => value !== null && value !== undefined;
const text = value => { const node = document.createElement("span"); node.textContent = value; return node.innerHTML; };
const short = url => url.replace(/^https?:\/\//, "");
const small = unit => `<small>${unit}</small>`;

// A duration in seconds as [number, unit] with three digits at most.
function duration(seconds) {
  if (!known(seconds)) return ["–", ""];
  if (seconds >= 120) return [(seconds / 60).toFixed(1), "min"];
  if (seconds >= 0.9995) return [seconds.toFixed(seconds < 9.995 ? 2 : 1), "s"];
  const ms = 1000 * seconds;
  return [ms.toFixed(ms < 9.95 ? 1 : 0), "ms"];
}
const time = seconds => { const [number, unit] = duration(seconds); return unit ? `${number}<span class="unit">${unit}</span>` : number; };
const bigTime = seconds => { const [number, unit] = duration(seconds); return number + (unit && small(unit)); };
const percent = share => known(share) ? `${(100 * share).toFixed(share < 0.9995 ? 1 : 0)}<span class="unit">%</span>` : "–";
const whole = value => known(value) ? Math.round(value).toLocaleString("en") : "–";
const compact = value => value < 1e4 ? whole(value) : value < 1e6 ? `${(value / 1e3).toFixed(0)}<span class="unit">k</span>`
  : `${(value / 1e6).toFixed(1)}<span class="unit">M</span>`;

function age(seconds) {
  if (seconds < 1) return "now";
  if (seconds < 60) return `${Math.floor(seconds)} s ago`;
  return seconds < 3600 ? `${Math.floor(seconds / 60)} min ago` : `${Math.floor(seconds / 3600)} h ago`;
}
function span(seconds) {
  const minutes = Math.floor(seconds / 60), hours = Math.floor(minutes / 60);
  if (minutes < 1) return `${Math.floor(seconds)} s`;
  if (hours < 1) return `${minutes} min`;
  return hours < 48 ? `${hours} h ${minutes % 60} min` : `${Math.floor(hours / 24)} days`;
}
