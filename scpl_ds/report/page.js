"use strict";
// Values under the pointer; without this script the page shows everything else.
(() => {
  const near = (points, step) =>
    points.reduce((best, p) => (Math.abs(p[0] - step) < Math.abs(best[0] - step) ? p : best));
  const show = (value, scale) => (value === null ? "NaN or infinite" : Number((value * scale).toPrecision(4)).toLocaleString("en"));

  for (const figure of document.querySelectorAll("figure.chart")) {
    const svg = figure.querySelector("svg");
    const cursor = svg.querySelector(".cursor");
    const series = JSON.parse(figure.dataset.series);
    const scale = Number(figure.dataset.scale);
    const { left, width, inner, first, last } = svg.dataset;
    const tip = document.createElement("div");
    tip.className = "tip";
    tip.hidden = true;
    figure.append(tip);

    const hide = () => {
      tip.hidden = true;
      cursor.setAttribute("hidden", "");
    };
    svg.addEventListener("pointerleave", hide);
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect();
      const at = ((event.clientX - box.left) / box.width) * width - left;
      const share = Math.min(1, Math.max(0, at / inner));
      const asked = Number(first) + share * (last - first);
      const all = series.flatMap((s) => s.points);
      const step = near(all, asked)[0];
      const x = Number(left) + (inner * (step - first)) / (last - first || 1);
      cursor.setAttribute("x1", x);
      cursor.setAttribute("x2", x);
      cursor.removeAttribute("hidden");
      tip.replaceChildren(`step ${step.toLocaleString("en")}`);
      for (const one of series) {
        const point = near(one.points, step);
        if (point[0] !== step) continue;
        const line = document.createElement("div");
        const mark = document.createElement("i");
        mark.className = `c${one.style % 7}`;
        line.append(mark, `${one.name} ${show(point[1], scale)}${figure.dataset.unit.startsWith("%") ? " %" : ""}`);
        tip.append(line);
      }
      tip.hidden = false;
      const middle = (x / width) * box.width;
      const right = middle + 12 + tip.offsetWidth > figure.clientWidth;
      tip.style.left = `${Math.max(0, right ? middle - 12 - tip.offsetWidth : middle + 12)}px`;
      tip.style.top = `${svg.offsetTop + 14}px`;
    });
  }

  // On paper nothing can be opened.
  let closed = [];
  addEventListener("beforeprint", () => {
    closed = [...document.querySelectorAll("details:not([open])")];
    closed.forEach((each) => (each.open = true));
  });
  addEventListener("afterprint", () => closed.forEach((each) => (each.open = false)));
})();
