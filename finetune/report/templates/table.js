// A table with filters, a search and sorting, whose rows are made as they are shown. Text gets into the page as text only.

const STEP = 100;

function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "class") made.className = value;
    else if (name.includes("-") || ["role", "for", "colspan", "scope"].includes(name)) made.setAttribute(name, value);
    else made[name] = value;
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

// Unknown values come last, whatever the direction.
function compared(first, second, direction) {
  const [a, b] = [first ?? null, second ?? null];
  if (a === null || b === null) return (a === null) - (b === null);
  const order = typeof a === "string" ? a.localeCompare(String(b), "en", { numeric: true }) : a - b;
  return direction * order;
}

function counted(rows, of) {
  const counts = new Map();
  for (const row of rows) {
    const value = of(row);
    if (value !== null && value !== "") counts.set(value, (counts.get(value) ?? 0) + 1);
  }
  return counts;
}

// columns: {key, label, value(row), cell(row), kind, whole, label_each}; filters: {key, label, of(row), names}.
// detail(row): what a row opens. changed(rows): called with the rows that are shown. noun: in the plural, "questions".
function table(place, { rows, columns, filters, searched, detail, noun, sort, changed = () => {} }) {
  const state = { shown: STEP, sort: sort ?? null, chosen: {}, words: "" };
  const opened = new Set();
  const body = element("tbody");
  const status = element("p", { class: "meta", role: "status" });
  const more = element("button", { class: "more", type: "button" });
  const search = element("input", { type: "search", placeholder: "words", autocomplete: "off" });
  const selects = new Map(filters.map((filter) => [filter.key, select(filter)]));
  const clear = element("button", { type: "button" }, "Show all");

  function select(filter) {
    const counts = counted(rows, filter.of);
    const order = filter.names ?? [...counts.keys()].sort((a, b) => compared(a, b, 1));
    const options = order.filter((name) => counts.has(name)).map((name) => {
      const option = element("option", { value: name }, `${name} (${counts.get(name)})`);
      return option;
    });
    const made = element("select", {}, element("option", { value: "" }, "all"), ...options);
    made.addEventListener("change", () => choose(filter.key, made.value));
    return made;
  }

  function choose(key, value) {
    state.chosen[key] = value;
    selects.get(key).value = value;
    state.shown = STEP;
    draw();
  }

  function matching() {
    const words = state.words.toLowerCase().split(/\s+/).filter(Boolean);
    const found = rows.filter((row) =>
      filters.every((filter) => !state.chosen[filter.key] || filter.of(row) === state.chosen[filter.key])
      && words.every((word) => searched(row).includes(word)));
    if (state.sort) {
      const { value } = columns.find((column) => column.key === state.sort.key);
      found.sort((a, b) => compared(value(a), value(b), state.sort.direction));
    }
    return found;
  }

  function sortBy(column) {
    const before = state.sort;
    const first = column.kind === "number" ? -1 : 1;
    state.sort = { key: column.key, direction: before?.key === column.key ? -before.direction : first };
    draw();
  }

  const heads = columns.map((column) => {
    if (!column.value) return element("th", { scope: "col" }, column.label);
    const button = element("button", { type: "button" }, column.label);
    button.addEventListener("click", () => sortBy(column));
    return element("th", { scope: "col", class: column.kind === "number" ? "count" : "" }, button);
  });

  function line(row) {
    const cells = columns.map((column) => {
      const cell = element("td", { class: [column.kind === "number" ? "count" : "", column.whole ? "whole" : "",
        column.class?.(row) ?? ""].join(" ").trim() });
      if (column.label_each) cell.setAttribute("data-label", column.label);
      cell.append(column.cell(row));
      return cell;
    });
    const made = element("tr", { "data-row": row.key }, ...cells);
    return opened.has(row.key) ? [made, open(row)] : [made];
  }

  function open(row) {
    return element("tr", { "data-detail": row.key },
      element("td", { class: "detail", colspan: columns.length }, detail(row)));
  }

  // A button that shows and hides what is known about the row.
  function opener(row, label) {
    const button = element("button", { type: "button", class: "opener", "aria-expanded": String(opened.has(row.key)) }, label);
    button.addEventListener("click", () => {
      const isOpen = opened.has(row.key);
      button.setAttribute("aria-expanded", String(!isOpen));
      if (isOpen) {
        opened.delete(row.key);
        button.closest("tr").nextElementSibling.remove();
      } else {
        opened.add(row.key);
        button.closest("tr").after(open(row));
      }
    });
    return button;
  }

  function draw(limit = state.shown) {
    const found = matching();
    const visible = found.slice(0, limit);
    body.replaceChildren(...visible.flatMap(line));
    columns.forEach((column, number) => {
      const mine = state.sort?.key === column.key;
      if (mine) heads[number].setAttribute("aria-sort", state.sort.direction > 0 ? "ascending" : "descending");
      else heads[number].removeAttribute("aria-sort");
    });
    const of = found.length === rows.length ? "" : ` of ${rows.length}`;
    const counted = rows.length === 1 ? noun.replace(/s$/, "") : noun;
    status.textContent = `${found.length}${of} ${counted}${visible.length < found.length ? `, the first ${visible.length} shown` : ""}`;
    more.hidden = visible.length >= found.length;
    more.textContent = `Show ${Math.min(STEP, found.length - visible.length)} more`;
    changed(found);
  }

  search.addEventListener("input", () => {
    state.words = search.value;
    state.shown = STEP;
    draw();
  });
  more.addEventListener("click", () => {
    state.shown += STEP;
    draw();
  });
  clear.addEventListener("click", () => {
    state.words = search.value = "";
    state.chosen = {};
    selects.forEach((made) => { made.value = ""; });
    state.shown = STEP;
    draw();
  });
  addEventListener("beforeprint", () => draw(Infinity));
  addEventListener("afterprint", () => draw());

  const labelled = filters.map((filter) => element("label", {}, filter.label, selects.get(filter.key)));
  place.replaceChildren(
    element("div", { class: "filters" }, element("label", { class: "search" }, "Search", search), ...labelled, clear),
    status,
    element("div", { class: "card scroll" },
      element("table", { class: "browse" }, element("thead", {}, element("tr", {}, ...heads)), body)),
    more,
  );
  return { draw, choose, opener };
}
