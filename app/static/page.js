// Seeking, the playhead over the figures, light and dark. Listens on the document, because Gradio
// replaces the elements it draws.
(() => {
  const clock = (seconds) => {
    const whole = Math.max(0, Math.floor(seconds));
    const two = (n) => String(n).padStart(2, "0");
    const h = Math.floor(whole / 3600), m = Math.floor(whole / 60) % 60, s = whole % 60;
    return h ? `${h}:${two(m)}:${two(s)}` : `${m}:${two(s)}`;
  };
  const player = () => document.querySelector(".player video");
  const seek = (seconds, stay = false) => {
    const video = player();
    if (!video) return;
    video.currentTime = seconds;
    if (stay) return;
    const box = video.getBoundingClientRect();
    if (box.bottom < 40 || box.top > innerHeight - 40) {
      video.scrollIntoView({ behavior: "smooth", block: "center" });
    }
  };
  const timeIn = (plot, event) => {
    const box = plot.getBoundingClientRect();
    const share = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
    return { share, seconds: share * Number(plot.dataset.duration) };
  };

  document.addEventListener("click", (event) => {
    const button = event.target.closest("[data-seek]");
    if (button) return seek(Number(button.dataset.seek));
    const link = event.target.closest('a[href*="#t="]');
    if (link) {
      event.preventDefault();
      return seek(Number(link.getAttribute("href").split("#t=")[1]));
    }
    const plot = event.target.closest(".plot");
    // A cell of the grid shows its frame beside it: the page stays there.
    if (plot) return seek(timeIn(plot, event).seconds, plot.matches(".cell-plot"));
    if (event.target.closest("[data-new-video]")) {
      document.querySelector("#talk").classList.toggle("choosing");
    }
    if (event.target.closest("[data-theme-toggle]")) {
      const dark = document.body.classList.toggle("dark");
      document.documentElement.classList.toggle("dark", dark);
    }
  });

  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || event.defaultPrevented) return;
    const stop = document.querySelector("#stop, #cancel, [data-tool=keep]");
    if (stop) stop.click();
  });

  // A click on a word of an answer shows where that word looked; the panel's own buttons do the same
  // for the keyboard. Words are counted as the panel counts them: what lies between spaces.
  const wordAt = (event) => {
    const said = event.target.closest && event.target.closest('#chat [data-testid="bot"]');
    if (!said || event.target.closest("a, em")) return null;
    const spot = document.caretPositionFromPoint
      ? document.caretPositionFromPoint(event.clientX, event.clientY)
      : document.caretRangeFromPoint(event.clientX, event.clientY);
    const node = spot && (spot.offsetNode || spot.startContainer);
    if (!node || node.nodeType !== Node.TEXT_NODE || !said.contains(node)) return null;
    const at = Math.min(spot.offset ?? spot.startOffset, node.data.length);
    const start = at - node.data.slice(0, at).match(/\S*$/)[0].length;
    const end = at + node.data.slice(at).match(/^\S*/)[0].length;
    if (start === end) return null;
    const before = document.createRange(), range = document.createRange();
    before.setStart(said, 0);
    before.setEnd(node, start);
    range.setStart(node, start);
    range.setEnd(node, end);
    const answers = [...document.querySelectorAll('#chat [data-testid="bot"]')];
    const word = before.toString().split(/\s+/).filter(Boolean).length;
    return { range, told: `${answers.indexOf(said)}:${word}` };
  };
  const mark = (range) => {
    if (!window.Highlight) return;
    if (range) CSS.highlights.set("word", new Highlight(range));
    else CSS.highlights.delete("word");
  };
  document.addEventListener("pointermove", (event) => mark(wordAt(event)?.range));
  document.addEventListener("click", (event) => {
    const found = wordAt(event);
    if (!found || String(getSelection())) return;  // text that is being copied is no click
    document.dispatchEvent(new CustomEvent("crosslmm-word", { detail: found.told }));
    const panel = document.querySelector("#attention");
    if (panel.getBoundingClientRect().top > innerHeight) {
      panel.scrollIntoView({ behavior: "smooth", block: "start" });
    }
  });

  // The filmstrip is one stop of the Tab key; arrows go along it.
  document.addEventListener("keydown", (event) => {
    const shot = event.target.closest && event.target.closest(".shot");
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!shot || !step) return;
    const all = [...shot.parentElement.querySelectorAll(".shot")];
    const next = all[all.indexOf(shot) + step];
    if (!next) return;
    event.preventDefault();
    shot.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  });

  document.addEventListener("pointermove", (event) => {
    const plot = event.target.closest && event.target.closest(".plot");
    if (!plot) return;
    const { share, seconds } = timeIn(plot, event);
    const pointer = plot.querySelector(".pointer");
    pointer.style.left = `${100 * share}%`;
    pointer.dataset.time = clock(seconds);
  });

  const follow = (event) => {
    if (!event.target.matches || !event.target.matches(".player video")) return;
    for (const plot of document.querySelectorAll(".plot")) {
      const share = event.target.currentTime / Number(plot.dataset.duration);
      plot.querySelector(".playhead").style.left = `${100 * Math.min(1, share)}%`;
    }
  };
  document.addEventListener("timeupdate", follow, true);
  document.addEventListener("seeking", follow, true);
  document.addEventListener("loadstart", (event) => {
    if (event.target.matches && event.target.matches(".player video")) {
      document.querySelector("#talk").classList.remove("choosing");
    }
  }, true);
  document.addEventListener("error", (event) => {
    if (event.target.matches && event.target.matches(".player video")) {
      event.target.parentElement.querySelector(".unplayable").hidden = false;
    }
  }, true);
  document.addEventListener("loadedmetadata", (event) => {
    // Sound without pictures: the browser has no decoder for this codec.
    if (event.target.matches(".player video") && event.target.videoWidth === 0) {
      event.target.parentElement.querySelector(".unplayable").hidden = false;
    }
  }, true);
})();
