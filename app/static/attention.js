// The panel "Where it looked": its controls, and the cells of its grid by mouse and by keys.
const send = (look) => trigger("look", { look });
const plotOf = (target) => target.closest(".cell-plot");
const rows = () => [...element.querySelectorAll(".cells[data-row]")];
let focused = null;

element.addEventListener("click", (event) => {
  const button = event.target.closest("[data-look]");
  if (button) {
    focused = button.dataset.look;
    return send(button.dataset.look);
  }
  const plot = plotOf(event.target);
  if (!plot) return;
  const hit = rows().find((row) => {
    const box = row.getBoundingClientRect();
    return event.clientY >= box.top - 2 && event.clientY <= box.bottom + 2;
  });
  if (!hit) return;
  const box = plot.getBoundingClientRect();
  const share = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
  focused = "plot";
  send(`cell:${hit.dataset.row}:${share * Number(plot.dataset.duration)}`);
});

element.addEventListener("change", (event) => {
  const name = event.target.dataset.lookSelect;
  if (!name) return;
  focused = `select-${name}`;
  send(`${name}:${event.target.value}`);
});

// Keys move a cursor over the grid; Enter shows the frame behind it.
let cursor = { row: 0, share: 0 };
const drawCursor = (plot) => {
  let mark = plot.querySelector(".cursor-cell");
  if (!mark) {
    mark = document.createElement("span");
    mark.className = "cursor-cell";
    plot.append(mark);
  }
  place(mark, plot, cursor.row);
  mark.style.left = `${100 * cursor.share}%`;
};
const place = (mark, plot, row) => {
  const cells = rows()[row];
  if (!cells) return;
  const box = plot.getBoundingClientRect(), line = cells.getBoundingClientRect();
  mark.style.top = `${line.top - box.top}px`;
  mark.style.height = `${line.height}px`;
};
element.addEventListener("keydown", (event) => {
  const plot = plotOf(event.target);
  if (!plot) return;
  const last = rows().length - 1, step = event.shiftKey ? 0.1 : 0.01;
  const moves = {
    ArrowUp: () => (cursor.row = Math.max(0, cursor.row - 1)),
    ArrowDown: () => (cursor.row = Math.min(last, cursor.row + 1)),
    ArrowLeft: () => (cursor.share = Math.max(0, cursor.share - step)),
    ArrowRight: () => (cursor.share = Math.min(1, cursor.share + step)),
    Home: () => (cursor.share = 0),
    End: () => (cursor.share = 1),
  };
  if (moves[event.key]) {
    event.preventDefault();
    moves[event.key]();
    drawCursor(plot);
  } else if (event.key === "Enter" || event.key === " ") {
    event.preventDefault();
    focused = "plot";
    send(`cell:${cursor.row}:${cursor.share * Number(plot.dataset.duration)}`);
  }
});

// After every drawing: the chosen cell in its row, the playhead, and the focus where it was.
const settle = () => {
  const plot = element.querySelector(".cell-plot");
  const chosen = element.querySelector(".chosen-cell");
  if (plot && chosen) place(chosen, plot, Number(chosen.dataset.row));
  const video = document.querySelector(".player video");
  if (plot && video) {
    const share = Math.min(1, video.currentTime / Number(plot.dataset.duration));
    plot.querySelector(".playhead").style.left = `${100 * share}%`;
  }
  if (focused && (document.activeElement === document.body || !document.activeElement)) {
    const target = focused === "plot" ? plot
      : focused.startsWith("select-") ? element.querySelector("[data-look-select]")
      : element.querySelector(`[data-look="${focused}"]`);
    if (target) target.focus({ preventScroll: true });
  }
};
watch("value", settle);
new ResizeObserver(settle).observe(element);
