// Sorts and filters the leaderboard. It reads the page's own cells as text and writes only
// attributes and one count: nothing from data, models or messages ever becomes markup or code.
"use strict";
for (const tools of document.querySelectorAll(".tools")) {
  const table = document.getElementById(tools.dataset.table);
  const body = table.tBodies[0];
  const rows = Array.from(body.rows);
  const [words, ended] = [tools.querySelector("input"), tools.querySelector("select")];
  const count = tools.querySelector("output");
  const value = (row, column) => row.cells[column].dataset.v ?? row.cells[column].textContent.trim();

  const show = () => {
    const wanted = words.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      const fits = wanted.every((word) => text.includes(word));
      row.hidden = !fits || (ended.value !== "" && row.dataset.ended !== ended.value);
      shown += row.hidden ? 0 : 1;
    }
    count.textContent = `${shown} of ${rows.length} rows`;
  };

  const sort = (header, column) => {
    const down = header.getAttribute("aria-sort") === "ascending";
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    header.setAttribute("aria-sort", down ? "descending" : "ascending");
    const sign = down ? -1 : 1;
    const numeric = rows.every((row) => !Number.isNaN(Number(value(row, column))));
    const order = (a, b) => {
      const [x, y] = [value(a, column), value(b, column)];
      if (x === "" || y === "") return (x === "") - (y === "");
      return sign * (numeric ? Number(x) - Number(y) : x.localeCompare(y, "en", { numeric: true }));
    };
    body.append(...rows.sort(order));
  };

  Array.from(table.tHead.rows[0].cells).forEach((header, column) => {
    const button = header.querySelector("button");
    if (button === null) return;
    button.disabled = false;
    button.addEventListener("click", () => sort(header, column));
  });
  words.addEventListener("input", show);
  ended.addEventListener("change", show);
  tools.hidden = false;
  show();
}
