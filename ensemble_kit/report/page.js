"use strict";

// A click on a heading sorts by its column; a second click reverses the order.
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const heading = button.parentElement;
    const table = heading.closest("table");
    const column = [...heading.parentElement.children].indexOf(heading);
    const isNumber = !heading.classList.contains("text");
    const was = heading.getAttribute("aria-sort");
    const order = was ? (was === "ascending" ? -1 : 1) : isNumber ? -1 : 1;
    const value = (row) => row.children[column].dataset.value ?? row.children[column].textContent;
    const compare = (a, b) => {
      if (!isNumber) return order * value(a).localeCompare(value(b), undefined, { numeric: true });
      const [x, y] = [parseFloat(value(a)), parseFloat(value(b))];
      if (isNaN(x) || isNaN(y)) return isNaN(x) - isNaN(y); // unknown values stay last
      return order * (x - y);
    };
    for (const other of table.querySelectorAll("th")) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", order === 1 ? "ascending" : "descending");
    const body = table.tBodies[0];
    body.append(...[...body.rows].sort(compare));
  });
}

// A search box shows the rows of its table whose first column has what was typed.
for (const box of document.querySelectorAll("[data-filters]")) {
  const rows = [...document.getElementById(box.dataset.filters).tBodies[0].rows];
  const count = document.getElementById(`${box.dataset.filters}-count`);
  box.addEventListener("input", () => {
    const wanted = box.value.trim().toLocaleLowerCase();
    for (const row of rows) {
      row.hidden = !row.children[0].textContent.toLocaleLowerCase().includes(wanted);
    }
    count.textContent = wanted ? `${rows.filter((row) => !row.hidden).length} found` : "";
  });
}

// What is wider than its place says so; in the next frame, for that changes its size again.
const watch = new ResizeObserver((entries) =>
  requestAnimationFrame(() => {
    for (const { target } of entries) {
      target.toggleAttribute("data-is-wide", target.scrollWidth > target.clientWidth + 1);
    }
  })
);
for (const place of document.querySelectorAll(".scroll")) watch.observe(place);

// Charts are painted once, in the page's colours at that time.
const scheme = matchMedia("(prefers-color-scheme: dark)");
for (const item of document.querySelectorAll("script[data-chart]")) {
  Bokeh.embed.embed_item(JSON.parse(item.textContent), item.dataset.chart).then((views) =>
    scheme.addEventListener("change", () => {
      for (const view of views) view.request_paint?.(); // some views are no charts
    })
  );
}
