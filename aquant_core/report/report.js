"use strict";
// Of the layers' plots, which are all there, one is shown at a time.
for (const choice of document.querySelectorAll("[data-chooses]")) {
  const plots = [...document.querySelectorAll("." + choice.dataset.chooses)];
  const select = choice.querySelector("select");
  const show = () => plots.forEach((plot) => { plot.hidden = plot.id !== select.value; });
  select.addEventListener("change", show);
  choice.hidden = false;
  show();
}
