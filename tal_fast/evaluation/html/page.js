"use strict";
// Checkboxes show and hide scores; the page is complete without scripts.
for (const box of document.querySelectorAll("input[data-score]")) {
  box.hidden = false;
  const apply = () => {
    for (const line of document.querySelectorAll(".s" + box.dataset.score)) line.classList.toggle("off", !box.checked);
  };
  box.addEventListener("change", apply);
  apply(); // a browser may restore boxes on reload
}

// A tooltip shows the risk of every curve at the pointer's coverage.
const tip = document.getElementById("tip");
const SVG = "http://www.w3.org/2000/svg";

// The height of a polyline, whose points have ascending x, at x.
function heightAt(points, x) {
  let low = 0, high = points.numberOfItems - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (points.getItem(middle).x > x) high = middle; else low = middle;
  }
  const a = points.getItem(low), b = points.getItem(high);
  const share = b.x > a.x ? Math.min(1, Math.max(0, (x - a.x) / (b.x - a.x))) : 0;
  return a.y + share * (b.y - a.y);
}

for (const svg of document.querySelectorAll('svg[data-kind="risk"]')) {
  const [left, right, top, bottom, max] = ["left", "right", "top", "bottom", "max"].map((key) => Number(svg.dataset[key]));
  const cross = document.createElementNS(SVG, "line");
  cross.setAttribute("class", "cross off");
  cross.setAttribute("y1", top);
  cross.setAttribute("y2", bottom);
  svg.append(cross);
  svg.addEventListener("pointermove", (event) => {
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    if (at.x < left || at.x > right || at.y < top || at.y > bottom) return leave();
    cross.setAttribute("x1", at.x);
    cross.setAttribute("x2", at.x);
    cross.classList.remove("off");
    const head = document.createElement("b");
    head.textContent = "coverage " + ((100 * (at.x - left)) / (right - left)).toFixed(1) + "%";
    const rows = [];
    for (const line of svg.querySelectorAll("g.line:not(.off)")) {
      const curve = line.querySelector("polyline");
      const risk = (max * (bottom - heightAt(curve.points, at.x))) / (bottom - top);
      const row = document.createElement("div"), name = document.createElement("span"), value = document.createElement("span");
      name.textContent = line.dataset.name;
      value.textContent = risk.toFixed(2) + "%";
      row.append(name, value);
      rows.push([risk, row]);
    }
    rows.sort((a, b) => a[0] - b[0]);
    tip.replaceChildren(head, ...rows.map((row) => row[1]));
    tip.hidden = false;
    const width = document.documentElement.clientWidth;
    const x = event.clientX + 16 + tip.offsetWidth > width ? event.clientX - 16 - tip.offsetWidth : event.clientX + 16;
    tip.style.left = Math.max(4, x) + window.scrollX + "px";
    tip.style.top = event.clientY + 16 + window.scrollY + "px";
  });
  const leave = () => {
    tip.hidden = true;
    cross.classList.add("off");
  };
  svg.addEventListener("pointerleave", leave);
}

// Folded parts are opened for printing.
addEventListener("beforeprint", () => {
  for (const folded of document.querySelectorAll("details")) folded.open = true;
});
