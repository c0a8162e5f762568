// The page of all runs. Data: finetune/report/runs_page.py.

const data = JSON.parse(document.getElementById("data").textContent);
const chosen = []; // keys of at most two runs, the reference first
const rows = data.runs.map((run, number) => ({ ...run, key: String(number), words: [run.name, run.model, run.status].join("\n").toLowerCase() }));
const byKey = new Map(rows.map((row) => [row.key, row]));
const UNKNOWN = "–";
const percent = (share) => (share === null ? UNKNOWN : `${oneDigit(100 * share)}%`);
const fixed = (value, digits) => (value === null ? UNKNOWN : value.toFixed(digits));
const usdOf = (value) => (value === null ? UNKNOWN : usdText(value));

function nameOf(row) {
  const name = row.report ? element("a", { href: row.report }, row.name) : element("span", {}, row.name);
  return row.problem ? element("span", {}, name, element("div", { class: "error" }, row.problem)) : name;
}

function choice(row) {
  const box = element("input", { type: "checkbox", checked: chosen.includes(row.key), "aria-label": `compare ${row.name}` });
  if (!row.compared?.bits) {
    box.disabled = true;
    box.title = row.compared?.refused ?? "no score";
  }
  box.addEventListener("change", () => {
    if (box.checked) chosen.push(row.key);
    else chosen.splice(chosen.indexOf(row.key), 1);
    if (chosen.length > 2) chosen.shift();
    view.draw();
    showComparison();
  });
  return box;
}

const columns = [
  { key: "compare", label: "Compare", label_each: true, cell: choice },
  { key: "name", label: "Run", whole: true, value: (row) => row.name, cell: nameOf },
  { key: "status", label: "Status", value: (row) => row.status, cell: (row) => row.status ?? UNKNOWN },
  { key: "model", label: "Model", value: (row) => row.model, cell: (row) => row.model ?? UNKNOWN },
  { key: "steps", label: "Steps", kind: "number", label_each: true, value: (row) => row.steps,
    cell: (row) => (row.steps === null ? UNKNOWN : `${row.steps}${row.steps_planned === null ? "" : ` of ${row.steps_planned}`}`) },
  { key: "accuracy", label: "Right", kind: "number", label_each: true, value: (row) => row.accuracy, cell: (row) => percent(row.accuracy) },
  { key: "interval", label: "95% interval", kind: "number", label_each: true, value: (row) => row.interval?.[0] ?? null,
    cell: (row) => (row.interval ? row.interval.map((bound) => oneDigit(100 * bound)).join(" to ") : UNKNOWN) },
  { key: "base", label: "Base", kind: "number", label_each: true, value: (row) => row.base_accuracy, cell: (row) => percent(row.base_accuracy) },
  { key: "hours", label: "Hours", kind: "number", label_each: true, value: (row) => row.hours, cell: (row) => fixed(row.hours, 2) },
  { key: "usd", label: "$", kind: "number", label_each: true, value: (row) => row.usd, cell: (row) => usdOf(row.usd) },
  { key: "point", label: "$ a point", kind: "number", label_each: true, value: (row) => row.usd_per_point, cell: (row) => usdOf(row.usd_per_point) },
  { key: "started", label: "Started", value: (row) => row.started_at, cell: (row) => (row.started_at ?? UNKNOWN).slice(0, 10) },
];

const [plot, caption] = ["plot", "plot-caption"].map((id) => document.getElementById(id));
let shown = rows;
const view = table(document.getElementById("all-runs"), {
  rows,
  columns,
  noun: "runs",
  searched: (row) => row.words,
  detail: () => element("span"),
  filters: [
    { key: "status", label: "Status", of: (row) => row.status },
    { key: "model", label: "Model", of: (row) => row.model },
    { key: "scored", label: "Score", of: (row) => (row.accuracy === null ? "not scored" : "scored") },
  ],
  changed: (found) => {
    shown = found;
    scatter(plot, caption, found);
  },
});

function bits({ bits: text, set }) {
  const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  return data.sets[set].of.map((_, number) => (bytes[number >> 3] >> (7 - (number & 7))) & 1);
}

// Why these two cannot be compared here; "" if they can. The same reasons as those of `finetune compare`.
function refusal(first, second) {
  const [a, b] = [first.compared, second.compared];
  if (a.split !== b.split) return "they were asked different splits";
  const differing = Object.keys(a.judging).filter((key) => key in b.judging && a.judging[key] !== b.judging[key]);
  if (differing.length) return `they were judged differently: ${differing.map((key) => `${key} ${a.judging[key]} and ${b.judging[key]}`).join(", ")}`;
  if (a.data !== b.data) return "they were evaluated on other prepared data";
  return a.set === b.set ? "" : "they were asked other questions";
}

function command(first, second, more = "") {
  const quoted = [first, second].map((row) => (/^[\w@%+=:,./-]+$/.test(row.given) ? row.given : `'${row.given.replaceAll("'", "'\"'\"'")}'`));
  return element("pre", {}, `finetune compare ${quoted.join(" ")}${more}`);
}

function comparison(first, second) {
  const why = refusal(first, second);
  if (why) {
    const notice = element("p", { class: "notice" }, `${second.name} and ${first.name} are not compared here: ${why}.`);
    if (first.compared.split !== second.compared.split) return [notice];
    return [notice,
      element("p", {}, "On the questions that they have in common, if they were judged alike:"), command(first, second, " --common")];
  }
  const found = difference(bits(first.compared), bits(second.compared), data.sets[first.compared.set].of, data);
  const said = conclusion(found, first.name, second.name, data);
  const narrow = found.databases < data.few_databases ? ` (of ${found.databases} databases: too narrow)` : "";
  const facts = [
    [`${first.name} (reference)`, `${percent(first.accuracy)} of ${found.questions} questions`],
    [second.name, `${percent(second.accuracy)} of ${found.questions} questions`],
    ["Difference", `${signed(100 * found.share)} points`],
    ["95% interval, questions", span(found.overQuestions)],
    ["95% interval, databases", found.overDatabases ? span(found.overDatabases) + narrow : "one database only: unknown"],
    ["Won, lost", `${found.won}, ${found.lost}`],
    ["Both right, neither", `${found.both}, ${found.neither}`],
    ["Exact test", `p ${pValue(found.p)} (McNemar, two-sided)`],
  ];
  return [element("p", { class: "conclusion" }, `${said.startsWith("no difference") ? "N" : said[0]}${said.slice(1)}.`),
    element("dl", {}, ...facts.map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, value)))),
    element("p", { class: "meta" }, "By difficulty, database and error class, and under the other rules:"), command(first, second)];
}

function showComparison() {
  const place = document.getElementById("comparison");
  const [first, second] = chosen.map((key) => byKey.get(key));
  if (!second) {
    place.replaceChildren(element("p", { class: "muted" }, first ? `${first.name} is the reference; choose another run.` : "Choose two runs in the table."));
    return;
  }
  const swap = element("button", { type: "button", class: "more" }, "Swap");
  swap.addEventListener("click", () => {
    chosen.reverse();
    showComparison();
  });
  place.replaceChildren(...comparison(first, second), swap);
}

view.draw();
showComparison();
addEventListener("resize", () => scatter(plot, caption, shown));
addEventListener("beforeprint", () => scatter(plot, caption, shown));
