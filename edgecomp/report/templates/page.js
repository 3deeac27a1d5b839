"use strict";
for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0];
  const heads = Array.from(table.tHead.rows[0].cells);
  if (body.rows.length < 2) continue;
  heads.forEach((head, place) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    head.textContent = "";
    head.append(button);
    head.setAttribute("aria-sort", "none");
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((other) => other.setAttribute("aria-sort", "none"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const key = (row) => row.cells[place].dataset.v;
      const rows = Array.from(body.rows);
      rows.sort((one, other) => {
        const a = key(one), b = key(other);
        if ((a === undefined) !== (b === undefined)) return a === undefined ? 1 : -1;
        const order = a === undefined
          ? (one.cells[place].textContent < other.cells[place].textContent ? -1
            : one.cells[place].textContent > other.cells[place].textContent ? 1 : 0)
          : Number(a) - Number(b);
        return down ? -order : order;
      });
      body.append(...rows);
    });
  });
}
