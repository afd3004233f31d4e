// What pages can do more with JavaScript: buttons that copy, tables that sort. Everything else works without.
(() => {
  "use strict";
  const prepare = (root) => {
    for (const button of root.querySelectorAll("button.copy[hidden]")) {
      button.hidden = !navigator.clipboard;
    }
  };
  prepare(document);
  document.addEventListener("click", async (event) => {
    const button = event.target.closest("button.copy");
    if (!button) return;
    const source = document.getElementById(button.dataset.copy);
    try {
      await navigator.clipboard.writeText(source.innerText.trim() + "\n");
      button.textContent = "Copied";
    } catch {
      button.textContent = "Select and copy";
      getSelection().selectAllChildren(source);
    }
    setTimeout(() => { button.textContent = "Copy"; }, 2000);
  });
})();

(() => {
  "use strict";
  // A cell's value is its data-sort, its first number where the column is of numbers, or its text; empty ones come last.
  const valueOf = (cell, numbers) => {
    const text = cell.dataset.sort ?? cell.innerText.trim();
    if (!numbers) return text.toLowerCase();
    const found = text.match(/-?\d+(\.\d+)?/);
    return found ? Number(found[0]) : NaN;
  };
  const sort = (table, column, falling) => {
    const numbers = table.tHead.rows[0].cells[column].matches(".num, [data-numbers]");
    const rows = [...table.tBodies[0].rows].map((row) => [valueOf(row.cells[column], numbers), row]);
    rows.sort(([a], [b]) => {
      if (Number.isNaN(a) || Number.isNaN(b)) return Number.isNaN(a) - Number.isNaN(b);
      return (a < b ? -1 : a > b ? 1 : 0) * (falling ? -1 : 1);
    });
    table.tBodies[0].append(...rows.map(([, row]) => row));
  };
  for (const table of document.querySelectorAll("table[data-sortable]")) {
    for (const head of table.tHead.rows[0].cells) {
      const button = document.createElement("button");
      button.type = "button";
      button.className = "sorts";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const falling = head.getAttribute("aria-sort") === "ascending";
        for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", falling ? "descending" : "ascending");
        sort(table, head.cellIndex, falling);
      });
    }
  }
})();
