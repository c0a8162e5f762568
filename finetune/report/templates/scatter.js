// Dollars against accuracy, each run with its 95% interval, as an SVG that is drawn for the width it has.

const HEIGHT = 340;
const EDGE = { left: 46, right: 18, top: 14, bottom: 44 };
const LABELLED = 25;

function svg(tag, attributes, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

// Round values between low and high, on a logarithmic scale 1, 2 and 5 times powers of ten.
function ticks(low, high, logarithmic, most) {
  if (logarithmic) {
    const found = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++) {
      for (const times of [1, 2, 5]) found.push(times * 10 ** power);
    }
    const inside = found.filter((value) => value >= low * 0.999 && value <= high * 1.001);
    const every = Math.ceil(inside.length / most);
    return inside.filter((_, number) => number % every === 0);
  }
  const rough = (high - low || 1) / most;
  const unit = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((times) => times * unit).find((value) => value >= rough);
  const found = [];
  for (let value = Math.ceil(low / step - 1e-9) * step; value <= high + step * 1e-9; value += step) found.push(value);
  return found;
}

// As usd_text of finetune/runtime/quantities.py, without the sign: two digits that say something, also of a small number.
function usdText(usd) {
  if (usd >= 0.1 || usd === 0) return usd.toLocaleString("en-US", { minimumFractionDigits: 2, maximumFractionDigits: 2 });
  if (usd >= 0.0001) return String(Number(usd.toPrecision(2)));
  const [digits, power] = usd.toExponential(1).split("e-");
  return `${digits}e-${power.padStart(2, "0")}`;
}

// Of an axis, where the values are round.
const dollars = (usd) => (usd >= 100 ? `$${usd.toFixed(0)}` : usd >= 0.1 ? `$${usd.toFixed(2)}` : `$${Number(usd.toPrecision(2))}`);

// runs: with usd, accuracy, interval. Those without one of them are not drawn; the caption says how many.
function scatter(place, caption, runs) {
  const drawn = runs.filter((run) => run.usd !== null && run.accuracy !== null);
  const left = runs.length - drawn.length;
  const unsure = drawn.some((run) => run.problem);
  caption.textContent = `accuracy with 95% intervals over questions; dollars by the ledger (measured seconds × the machine's price)${
    left ? `; ${left} without dollars or without a score ${left === 1 ? "is" : "are"} not drawn` : ""}${
    unsure ? "; hollow: with a problem, which the table names, so its dollars may be too few" : ""}`;
  if (!drawn.length) {
    place.replaceChildren(element("p", { class: "muted" }, "No run here has both dollars and a score."));
    return;
  }
  const width = Math.max(260, place.clientWidth);
  const prices = drawn.map((run) => run.usd);
  const [least, dearest] = [Math.min(...prices), Math.max(...prices)];
  const logarithmic = least > 0 && dearest / least > 20;
  const [from, to] = logarithmic ? [least / 1.4, dearest * 1.4] : [0, dearest * 1.1 || 1];
  const highest = Math.max(...drawn.map((run) => run.interval?.[1] ?? run.accuracy));
  const top = Math.min(1, Math.ceil(highest * 10) / 10 || 0.1);
  const scale = logarithmic ? Math.log : (value) => value;
  const x = (usd) => EDGE.left + ((scale(usd) - scale(from)) / (scale(to) - scale(from))) * (width - EDGE.left - EDGE.right);
  const y = (share) => HEIGHT - EDGE.bottom - (share / top) * (HEIGHT - EDGE.bottom - EDGE.top);
  const shown = svg("svg", { viewBox: `0 0 ${width} ${HEIGHT}`, role: "img", class: "scatter",
    "aria-label": `Dollars against accuracy of ${drawn.length} ${drawn.length === 1 ? "run" : "runs"}` });

  for (const share of ticks(0, top, false, 5)) {
    shown.append(svg("line", { x1: EDGE.left, x2: width - EDGE.right, y1: y(share), y2: y(share), class: "grid" }),
      svg("text", { x: EDGE.left - 8, y: y(share) + 4, "text-anchor": "end" }, `${Math.round(100 * share)}%`));
  }
  for (const usd of ticks(from, to, logarithmic, width < 500 ? 4 : 8)) {
    shown.append(svg("line", { x1: x(usd), x2: x(usd), y1: HEIGHT - EDGE.bottom, y2: HEIGHT - EDGE.bottom + 5, class: "grid" }),
      svg("text", { x: x(usd), y: HEIGHT - EDGE.bottom + 20, "text-anchor": "middle" }, dollars(usd)));
  }
  shown.append(svg("text", { x: (EDGE.left + width - EDGE.right) / 2, y: HEIGHT - 4, "text-anchor": "middle" },
    `dollars of the run${logarithmic ? " (logarithmic)" : ""}`));

  const taken = drawn.map((run) => ({ from: x(run.usd) - 6, to: x(run.usd) + 6, at: y(run.accuracy), run }));
  for (const run of drawn) {
    const [cx, cy] = [x(run.usd), y(run.accuracy)];
    const interval = run.interval ? ` (95% interval ${(100 * run.interval[0]).toFixed(1)} to ${(100 * run.interval[1]).toFixed(1)})` : "";
    const point = svg(run.report ? "a" : "g", run.report ? { href: run.report } : {},
      svg("title", {}, `${run.name}: ${(100 * run.accuracy).toFixed(1)}%${interval}, $${usdText(run.usd)}${run.problem ? `; ${run.problem}` : ""}`));
    if (run.interval) {
      const [low, high] = run.interval.map(y);
      point.append(svg("path", { d: `M${cx} ${low}V${high}M${cx - 4} ${low}h8M${cx - 4} ${high}h8`, class: "error-bar" }));
    }
    point.append(svg("circle", { cx, cy, r: 5, class: run.problem ? "dot unsure" : "dot" }));
    if (drawn.length <= LABELLED) label(point, run, cx, cy, width, taken);
    shown.append(point);
  }
  place.replaceChildren(shown);
}

// The name beside its point, where it covers no other name and no other point; the title has it in any case.
function label(point, run, cx, cy, width, taken) {
  const { name } = run;
  const text = name.length > 24 ? `${name.slice(0, 10)}…${name.slice(-12)}` : name;
  const length = text.length * 7;
  const free = ([from, to]) => from >= EDGE.left && to <= width
    && !taken.some((box) => box.run !== run && from < box.to && to > box.from && Math.abs(cy - box.at) < 15);
  const [right, left] = [[cx + 10, cx + 10 + length], [cx - 10 - length, cx - 10]];
  const found = [right, left].find(free);
  if (!found) return;
  taken.push({ from: found[0], to: found[1], at: cy });
  const anchor = found === right ? { x: found[0], "text-anchor": "start" } : { x: found[1], "text-anchor": "end" };
  point.append(svg("text", { ...anchor, y: cy + 4, class: "name" }, text));
}
