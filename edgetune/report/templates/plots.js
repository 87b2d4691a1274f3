"use strict";
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const touch = matchMedia("(pointer: coarse)").matches;
  const shown = [];

  // Text, grid and error_bars take the colours of the page, so that one figure serves light, dark and paper.
  function theme(paper) {
    const light = {ink: "#000000", soft: "#444444", grid: "#dddddd", paper: "#ffffff"};
    const style = getComputedStyle(document.documentElement);
    return paper ? light : Object.fromEntries(Object.keys(light).map((name) => [name, style.getPropertyValue("--" + name).trim()]));
  }
  function themed(spec, colors) {
    const {data, layout} = structuredClone(spec);
    layout.font.color = colors.ink;
    layout.hoverlabel = {bgcolor: colors.paper, bordercolor: colors.soft, font: {color: colors.ink}};
    for (const [name, axis] of Object.entries(layout)) {
      if (!/^[xy]axis/.test(name)) continue;
      Object.assign(axis, {gridcolor: colors.grid, linecolor: colors.soft, tickcolor: colors.soft, fixedrange: touch});
      axis.tickfont = {...axis.tickfont, color: name.startsWith("x") ? colors.soft : colors.ink};
    }
    for (const trace of data) {
      if (trace.error_x) trace.error_x.color = colors.ink;
    }
    return {data, layout};
  }
  const div_width = (entry) => entry.div.getBoundingClientRect().width;
  function draw(entry, paper) {
    const {data, layout} = themed(entry.spec, theme(paper));
    if (div_width(entry) < 440 && !paper) {
      // The ranges stand in the table; beside the bars of a narrow plot there is no room for them.
      for (const trace of data) if (trace.mode === "text") trace.text = trace.text.map((text) => text.split(" (")[0]);
      for (const note of layout.annotations ?? []) note.text = note.text.replace(/<\/b>,.*/, "</b>");
    }
    if (paper) layout.width = entry.wide ? 690 : 660;
    Plotly.react(entry.div, data, layout, {displayModeBar: false, responsive: true, doubleClick: "reset"});
  }
  for (const [key, figure] of Object.entries(figures)) {
    const div = document.getElementById("plot-" + key);
    const entry = {div, spec: figure.spec, wide: figure.wide};
    shown.push(entry);
    draw(entry, false);
  }
  const redraw = (paper) => shown.forEach((entry) => draw(entry, paper));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => redraw(false));
  addEventListener("beforeprint", () => redraw(true));
  addEventListener("afterprint", () => redraw(false));
})();
