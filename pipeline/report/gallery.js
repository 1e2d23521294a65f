// The gallery of a report: filter, sort, layers, opacity, and one image large.  Without it the page is a plain list.
"use strict";
(() => {
  const gallery = document.getElementById("gallery");
  if (!gallery) return;
  const list = gallery.querySelector(".shots");
  const shots = [...list.children];
  const control = (name) => gallery.querySelector(`[name="${name}"]`);
  const dialog = gallery.querySelector("dialog");
  const large = dialog.querySelector(".large");
  const caption = dialog.querySelector(".caption");
  const names = new Map([...control("class").options].map((option) => [option.value, option.text]));
  const byName = new Intl.Collator("en", { numeric: true });
  const scores = new Map(shots.map((shot) => [shot, new Map(shot.dataset.classes.split(" ").map((pair) => pair.split(":")))]));
  let shown = shots;
  let place = 0;

  const score = (shot) => {
    const chosen = control("class").value;
    return Number(chosen ? scores.get(shot).get(chosen) : shot.dataset.iou);
  };

  function update() {
    const chosen = control("class").value;
    const group = control("set").value;
    const fits = (shot) => shot.dataset.set === group && (!chosen || scores.get(shot).has(chosen));
    const orders = {
      worst: (a, b) => score(a) - score(b),
      best: (a, b) => score(b) - score(a),
      name: (a, b) => byName.compare(a.dataset.name, b.dataset.name),
    };
    shown = shots.filter(fits).sort(orders[control("sort").value]);
    const kept = new Set(shown);
    for (const shot of shots) shot.hidden = !kept.has(shot);
    list.append(...shown);
    for (const shot of shown) {
      shot.querySelector(".score").textContent = `${score(shot).toFixed(1)} %${chosen ? ` IoU of ${names.get(chosen)}` : ""}`;
    }
    const total = shots.filter((shot) => shot.dataset.set === group).length;
    gallery.querySelector("output").textContent = `${shown.length} of ${total} images`;
  }

  function look() {
    gallery.dataset.layer = gallery.querySelector('[name="layer"]:checked').value;
    gallery.style.setProperty("--opacity", control("opacity").value / 100);
  }

  function show(next) {
    if (!shown.length) return;
    place = Math.min(Math.max(next, 0), shown.length - 1);
    const shot = shown[place];
    large.replaceChildren(...[...shot.querySelectorAll("img")].map((image) => image.cloneNode()));
    const classes = [...scores.get(shot)].map(([index, value]) => `${names.get(index)} ${value} %`).join(", ");
    caption.textContent = `${shot.dataset.name} (${place + 1} of ${shown.length}): mean IoU ${shot.dataset.iou} %; ${classes}`;
    if (!dialog.open) dialog.showModal();
  }

  list.addEventListener("click", (event) => {
    const shot = event.target.closest(".shot");
    if (shot) show(shown.indexOf(shot));
  });
  list.addEventListener("keydown", (event) => {
    const at = shown.indexOf(event.target);
    if (at < 0) return;
    const columns = getComputedStyle(list).gridTemplateColumns.split(" ").length;
    const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns };
    if (event.key === "Enter" || event.key === " ") show(at);
    else if (event.key in steps) shown[at + steps[event.key]]?.focus();
    else return;
    event.preventDefault();
  });
  gallery.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("select")) return;
    const layers = [...gallery.querySelectorAll('[name="layer"]')];
    const slider = control("opacity");
    if (/^[1-9]$/.test(event.key) && layers[event.key - 1]) layers[event.key - 1].checked = true;
    else if (event.key === "+" || event.key === "-") slider.value = Number(slider.value) + (event.key === "+" ? 10 : -10);
    else return;
    look();
    event.preventDefault();
  });
  dialog.addEventListener("keydown", (event) => {
    const steps = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1, Home: -Infinity, End: Infinity };
    if (!(event.key in steps)) return;
    show(place + steps[event.key]);
    event.preventDefault();
  });
  dialog.addEventListener("click", (event) => {
    const step = event.target.dataset.step;
    if (step) show(place + Number(step));
    else if (event.target === dialog || event.target.matches(".close")) dialog.close();
  });
  dialog.addEventListener("close", () => shown[place]?.focus());
  for (const name of ["set", "class", "sort"]) control(name).addEventListener("change", update);
  for (const input of gallery.querySelectorAll('[name="layer"], [name="opacity"]')) input.addEventListener("input", look);
  for (const element of document.querySelectorAll("[data-scripted]")) element.hidden = false;
  for (const shot of shots) shot.tabIndex = 0;
  gallery.dataset.live = "";
  update();
  look();
})();
