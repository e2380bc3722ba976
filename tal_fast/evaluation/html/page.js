"use strict";
// The title of a column sorts by it: numbers by value, the best end first, and text by letters.
for (const head of document.querySelectorAll(".sortable thead th")) {
  const button = document.createElement("button");
  button.append(...head.childNodes);
  head.append(button);
  button.addEventListener("click", () => {
    const body = head.closest("table").tBodies[0], column = head.cellIndex;
    const before = head.getAttribute("aria-sort");
    const up = before ? before === "descending" : column === 0 || head.textContent.includes("↓");
    for (const other of head.parentElement.children) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const value = (row) => row.cells[column].textContent;
    const number = (row) => parseFloat(value(row).replace(/,/g, ""));
    const compare = (a, b) => {
      const x = number(a), y = number(b);
      if (column === 0 || (isNaN(x) && isNaN(y))) return value(a).localeCompare(value(b), "en", { numeric: true });
      return isNaN(x) - isNaN(y) || x - y;
    };
    body.append(...[...body.rows].sort((a, b) => (up ? compare(a, b) : compare(b, a))));
  });
}
