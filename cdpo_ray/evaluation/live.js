// Replace the parts of the page that have changed; the server has escaped everything in them.
const SECONDS = 3;
async function refresh() {
  try {
    const answer = await fetch("/content");
    const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
    const parts = [...fresh.body.children];
    const main = document.querySelector("main");
    const before = [...main.children];
    parts.forEach((part, place) => {
      if (before[place] === undefined) main.append(part);
      else if (before[place].outerHTML !== part.outerHTML) before[place].replaceWith(part);
    });
    before.slice(parts.length).forEach((part) => part.remove());
  } catch {
    const note = document.getElementById("ended");
    if (note) note.hidden = false;
  }
  setTimeout(refresh, 1000 * SECONDS);
}
setTimeout(refresh, 1000 * SECONDS);
