// The table of all questions in a run's report. Data: finetune/report/questions.py.

const data = JSON.parse(document.getElementById("data").textContent);
const last = data.models.length - 1;
const OUTCOMES = data.models.length === 2 ? ["won", "lost", "right before and after", "wrong before and after"] : ["right", "wrong"];

function outcome(answers) {
  if (answers.some((answer) => !answer)) return "";
  const right = answers.map((answer) => answer.verdict === "correct");
  if (right.length === 1) return right[0] ? "right" : "wrong";
  return OUTCOMES[right[0] === right[1] ? (right[1] ? 2 : 3) : (right[1] ? 0 : 1)];
}

const rows = data.questions.map((question, number) => {
  const { answers } = question;
  const texts = [question.id, question.question, question.db_id, question.gold, ...answers.map((answer) => answer?.sql ?? "")];
  return { ...question, key: String(number), number, outcome: outcome(answers), words: texts.join("\n").toLowerCase() };
});

function result(place) {
  const found = data.tables[place];
  if (!found) return null;
  const values = found.rows.map((row) => element("tr", {},
    ...row.map((value) => (value === null ? element("td", { class: "null" }, "NULL") : element("td", {}, value)))));
  const head = element("thead", {}, element("tr", {}, ...found.columns.map((name) => element("th", {}, name))));
  return element("div", { class: "result" },
    found.rows.length ? element("table", {}, head, element("tbody", {}, ...values)) : null,
    element("p", { class: "meta" }, found.note));
}

function answered(model, answer) {
  if (!answer) return element("div", {}, element("span", { class: "label" }, `${model} model`), element("p", { class: "meta" }, "was not asked"));
  const isRight = answer.verdict === "correct";
  const verdict = [answer.verdict, answer.class === answer.verdict ? "" : answer.class].filter(Boolean).join(" · ");
  const why = isRight ? "" : data.classes[answer.class] ?? data.meaning[answer.verdict] ?? "";
  return element("div", { "data-model": model },
    element("span", { class: "label" }, `${model} model`), " ",
    element("span", { class: `label ${isRight ? "right" : "wrong"}` }, verdict),
    why ? element("div", { class: "meta" }, `the answer ${why}`) : null,
    element("pre", {}, answer.sql || "(nothing)"),
    answer.is_sql || !answer.sql ? null : element("div", { class: "meta" }, "the whole answer, which has no SQL"),
    answer.error ? element("div", { class: "error" }, answer.error) : null,
    result(answer.rows));
}

function detail(row) {
  const asked = row.prompt === null ? element("p", { class: "meta" }, "The prompt was not kept.")
    : element("details", {}, element("summary", {}, "Prompt"), element("pre", {}, data.starts[row.prompt[0]] + row.prompt[1]));
  const gold = element("div", { "data-model": "gold" }, element("span", { class: "label" }, "gold"),
    element("pre", {}, row.gold || "(nothing)"), result(row.rows));
  const rows_kept = row.rows !== null || row.answers.some((answer) => answer && answer.rows !== null);
  return element("div", {}, element("div", { class: "meta" }, row.id), asked,
    element("div", { class: "answers" }, gold, ...data.models.map((model, number) => answered(model, row.answers[number]))),
    rows_kept ? null : element("p", { class: "meta" }, "No rows were kept of these queries."));
}

const order = ["easy", "medium", "hard", "extra"];
const level = (row) => (order.includes(row.difficulty) ? order.indexOf(row.difficulty) : null);
const verdictOf = (number) => (row) => row.answers[number]?.verdict ?? null;
const classOf = (row) => row.answers[last]?.class || null;

const columns = [
  { key: "question", label: "Question", whole: true, value: (row) => row.question, cell: (row) => view.opener(row, row.question || row.id) },
  { key: "db_id", label: "Database", value: (row) => row.db_id, cell: (row) => row.db_id },
  { key: "difficulty", label: "Difficulty", value: level, cell: (row) => row.difficulty },
  ...data.models.map((model, number) => ({
    key: model,
    label: model[0].toUpperCase() + model.slice(1),
    label_each: true,
    value: verdictOf(number),
    class: (row) => (row.answers[number] ? (row.answers[number].verdict === "correct" ? "right" : "wrong") : ""),
    cell: (row) => verdictOf(number)(row) ?? "–",
  })),
  { key: "class", label: "Error class", value: classOf, cell: (row) => classOf(row) ?? "" },
];

const view = table(document.getElementById("all-questions"), {
  rows,
  columns,
  noun: "questions",
  searched: (row) => row.words,
  detail,
  filters: [
    { key: "outcome", label: "Outcome", of: (row) => row.outcome, names: OUTCOMES },
    ...data.models.map((model, number) => ({ key: `verdict-${model}`, label: `Verdict, ${model}`, of: verdictOf(number) })),
    { key: "class", label: `Error class, ${data.models[last]}`, of: classOf },
    { key: "difficulty", label: "Difficulty", of: (row) => row.difficulty, names: [...new Set([...order, ...rows.map((row) => row.difficulty)])] },
    { key: "database", label: "Database", of: (row) => row.db_id },
  ],
});
view.draw();

for (const button of document.querySelectorAll("button[data-filter]")) {
  button.addEventListener("click", () => {
    view.choose(button.dataset.filter, button.dataset.value);
    document.getElementById("questions").scrollIntoView();
  });
}
