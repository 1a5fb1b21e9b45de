"use strict";
(() => {
  // Sorting: a heading's button cycles ascending, descending; what was not measured stays last.
  const table = document.getElementById("table");
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[1].cells];
  const figure = (row, k) => {
    const text = row.cells[k].dataset.v;
    return text === "" ? null : Number(text);
  };
  heads.forEach((head, k) => {
    head.firstElementChild.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      heads.forEach((other) => other.setAttribute("aria-sort", "none"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const rows = [...body.rows].map((row, place) => ({ row, place, value: figure(row, k) }));
      rows.sort((a, b) => {
        if (a.value === null || b.value === null) return (a.value === null) - (b.value === null) || a.place - b.place;
        return (up ? a.value - b.value : b.value - a.value) || a.place - b.place;
      });
      body.append(...rows.map((item) => item.row));
    });
  });

  // Layers: histograms from the embedded data, drawn with plain SVG elements; text is only ever set as text.
  const source = document.getElementById("explorer-data");
  if (!source) return;
  const data = JSON.parse(source.textContent);
  const plot = document.getElementById("layer-plot");
  const details = document.getElementById("layer-details");
  const pickVariant = document.getElementById("pick-variant");
  const pickLayer = document.getElementById("pick-layer");
  const box = { left: 4, right: 716, top: 14, bottom: 206 };

  const add = (tag, attributes, text) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    if (text !== undefined) element.textContent = text;
    plot.append(element);
  };
  const option = (select, text, value) => {
    const element = document.createElement("option");
    element.textContent = text;
    element.value = value;
    select.append(element);
  };
  const share = (counts) => {
    const total = counts.reduce((sum, n) => sum + n, 0);
    return total ? counts.map((n) => n / total) : [];
  };
  const across = (k, count) => box.left + ((box.right - box.left) * k) / count;

  const draw = () => {
    const variant = data.variants[pickVariant.value];
    const layer = variant.layers[pickLayer.value];
    plot.replaceChildren();
    if (!layer) return;
    // One unit is one pixel, so that text keeps its size at any width.
    const width = Math.max(plot.clientWidth, 200);
    plot.setAttribute("viewBox", `0 0 ${width} 230`);
    box.right = width - 4;
    details.textContent = layer.d;
    const bars = share(layer.h);
    const reference = data.baseline === null ? undefined : data.variants[data.baseline].layers.find((other) => other.n === layer.n);
    const outline = reference && reference.l === layer.l && reference.h.length === layer.h.length ? share(reference.h) : [];
    const highest = Math.max(0, ...bars);
    const ceiling = Math.min(outline.length ? 2 * Math.max(...outline) : Infinity, Math.max(highest, ...outline) * 1.05) || 1;
    const up = (value) => box.bottom - (box.bottom - box.top) * Math.min(value / ceiling, 1);
    bars.forEach((value, k) => {
      if (value === 0) return;
      const x = across(k, bars.length);
      add("rect", { x, y: up(value), width: across(k + 1, bars.length) - x, height: box.bottom - up(value), fill: `var(--p-${variant.family})` });
    });
    if (outline.length) {
      const path = outline.map((value, k) => `V${up(value).toFixed(1)}H${across(k + 1, outline.length).toFixed(1)}`).join("");
      add("path", { d: `M${box.left} ${box.bottom}${path}V${box.bottom}`, fill: "none", stroke: "var(--p-ink)", "stroke-width": 1.2 });
    }
    add("path", { d: `M${box.left} ${box.bottom}H${box.right}`, stroke: "var(--p-muted)", "stroke-width": 1 });
    for (let k = 0; k <= 4; k++) {
      const value = (layer.l * (k - 2)) / 2;
      const anchor = k === 0 ? "start" : k === 4 ? "end" : "middle";
      add("text", { x: across(k, 4), y: 224, "text-anchor": anchor, class: "tick" }, value.toPrecision(2).replace("-", "−").replace(/^0\.0$/, "0"));
    }
    if (highest > ceiling) add("text", { x: box.right, y: 26, "text-anchor": "end", class: "tick" }, `highest bin ${(highest * 100).toFixed(0)} %`);
  };
  const fill = () => {
    const wanted = pickLayer.selectedOptions[0]?.textContent;
    pickLayer.replaceChildren();
    const layers = data.variants[pickVariant.value].layers;
    layers.forEach((layer, k) => option(pickLayer, layer.n, k));
    const place = layers.findIndex((layer) => layer.n === wanted);
    pickLayer.value = String(place < 0 ? Math.min(1, layers.length - 1) : place);
    draw();
  };
  const step = (by) => {
    const count = pickLayer.options.length;
    pickLayer.value = String((Number(pickLayer.value) + by + count) % count);
    draw();
  };
  data.variants.forEach((variant, k) => option(pickVariant, variant.name, k));
  pickVariant.value = document.getElementById("explorer").dataset.start;
  pickVariant.addEventListener("change", fill);
  pickLayer.addEventListener("change", draw);
  window.addEventListener("resize", draw);
  document.getElementById("layer-back").addEventListener("click", () => step(-1));
  document.getElementById("layer-next").addEventListener("click", () => step(1));
  fill();
})();
